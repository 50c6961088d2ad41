/** What the server sends and an exported file carries. Every text is already harmless to show; a number
 * for a bar is a position from 0 to 100; null means: not known. */

export type Heat = "" | "u1" | "u2" | "u3" | "u4" | "d1" | "d2" | "d3" | "d4";
export type Span = { x: number; width: number };
export type Piece = { text: string; heat: Heat; title?: string };
export type Pair = [string, string];

export type Card = {
  id: string;
  number: number | null;
  title: string;
  source: string | null;
  score: string;
  score_value: number;
  interval: string;
  p: string;
  significant: boolean | null;
  at: number | null;
  span: Span | null;
  before: boolean;
  after: boolean;
  excerpt: Piece[];
  full: Piece[];
  strongest: Pair[];
  metadata: Pair[];
  raw_metadata: Record<string, string>;
  copies: number;
  copy_ids: string[];
  copy_numbers: (number | null)[];
  query_heat: Piece[];
};

export type SideName = "raised" | "lowered";
export type Side = { name: SideName; heading: string; cards: Card[] };
export type Token = { text: string; space: string; level: number; title: string };

export type SourceRow = {
  name: string;
  n: string;
  raised: Span | null;
  lowered: Span | null;
  at: number | null;
  numbers: [string, string, string];
};

export type Share = { name: string; share: string; width: number };

export type RankingRow = {
  id: string;
  number: number | null;
  title: string;
  source: string | null;
  score: string;
  excerpt: string;
  also: string[];
};
export type Ranking = { method: string; about: string; unit: string; skipped: string | null; rows: RankingRow[] };

export type Stage = { name: string; told: string };

export type Answer = {
  query_id: string;
  prompt: string;
  label: string;
  brief: string;
  whole_prompt: string | null;
  completion: string;
  tokens: Token[];
  measurement: string;
  value: string;
  n_tokens: number;
  n_train: string;
  noise: string;
  limit: string;
  band: Span | null;
  sides: Side[];
  source_column: string;
  sources: { rows: SourceRow[] };
  layers: Share[];
  modules: Share[];
  rankings: Ranking[];
  stages: Stage[];
};

export type Trace = {
  id: string;
  name: string;
  answers: Answer[];
  headlines: Pair[];
  facts: Pair[];
  columns: Record<string, string[]>;
};

export type Cost = { name: string; passes: number | null; seconds: number | null; told: string };
export type Spectrum = { layer: string; kind: string; points: [number, number][]; told: string };
export type Coverage = {
  followed: string;
  share: number;
  rows: { name: string; kind: string; parameters: string; state: string }[];
};

export type RunOverview = {
  name: string;
  model: string;
  corpus: string;
  n_train: number | null;
  task: string;
  has: { index: boolean; heldout: boolean; survey: boolean; trajectory: boolean; finetuned: boolean };
  columns: string[];
  facts: Pair[];
  costs: Cost[];
  spectrum: Spectrum[];
  coverage: Coverage | null;
  traces: { id: string; name: string; asked: { prompt: string; completion: string }[] }[];
  verifications: { id: string; title: string }[];
  timelines: { id: string; name: string }[];
};

export type CorpusRow = {
  number: number;
  id: string;
  title: string;
  excerpt: string;
  source: string | null;
  length: number | null;
  loss: number | null;
  self_influence: number | null;
  outlier: boolean | null;
  cluster: number | null;
  n_copies: number;
};
export type Corpus = { total: number; offset: number; rows: CorpusRow[] };
export type SortKey = "number" | "length" | "loss" | "self_influence";
export type CorpusQuery = {
  offset: number;
  limit: number;
  sort: SortKey;
  descending: boolean;
  source: string;
  search: string;
};

export type Bins = { edges: number[]; counts: number[]; told?: string };
export type CorpusSummary = {
  surveyed: boolean;
  told: string;
  n: number;
  self_influence: Bins | null;
  loss: Bins | null;
  outliers: { id: string; number: number; title: string; score: string }[];
  clusters: { id: number; n: number; title: string; members: number[] }[];
  sources: { name: string; n: number; self_influence: string; net: (number | null)[] }[];
  queries: string[];
};

export type Example = { number: number; id: string; title: string; pieces: Piece[]; metadata: Pair[]; truncated: boolean };

export type Action = "remove" | "duplicate" | "upweight" | "relabel" | "keep";
export type Change = { id: string; number: number | null; action: Action; weight?: number; label?: string; note?: string };
export type ChangeSet = { name: string; changes: Change[] };

export type VerificationRow = {
  change: string;
  query: string;
  control: boolean;
  predicted: string;
  actual: string;
  predicted_value: number;
  actual_value: number;
  spread: string;
};
export type Verification = { id: string; title: string; told: string; rows: VerificationRow[]; facts: Pair[] };

export type Segment = {
  start: number;
  stop: number;
  stage: string;
  net: number;
  raised: number;
  lowered: number;
  strongest: Pair[];
  totals: Pair[];
};
export type Timeline = { id: string; name: string; measurement: string; queries: { text: string; segments: Segment[] }[]; told: string };

export type JobKind = "complete" | "trace" | "survey" | "verify" | "timeline";
export type JobState = "queued" | "running" | "done" | "failed" | "cancelled";
export type Job = {
  id: string;
  kind: JobKind;
  state: JobState;
  title: string;
  created: string;
  asked: Record<string, unknown>;
  progress: { done: number; total: number; note: string } | null;
  stages: Stage[];
  result: { trace?: string; completion?: string; verification?: string; timeline?: string } | null;
  error: string | null;
  attempts: number;
  position: number;
};

export type TraceRequest = {
  kind: "trace";
  prompt: string;
  completion: string;
  rather_than: string | null;
  span: [number, number] | null;
  chat: boolean;
  source: string | null;
  top: number;
  thorough: boolean;
  compare: boolean;
  where: string[];
};
export type JobRequest =
  | { kind: "complete"; prompt: string; max_new_tokens: number; chat: boolean }
  | TraceRequest
  | { kind: "survey" }
  | { kind: "verify"; trace: string | null; changes: ChangeSet; seeds: number }
  | { kind: "verify"; trace: string; top: number }
  | { kind: "timeline"; prompt: string; completion: string; span: [number, number] | null; chat: boolean; segments: number };

/** What a file written by `headwater report` carries. */
export type Embedded = {
  run: RunOverview;
  traces: Record<string, Trace>;
  corpus: { rows: CorpusRow[]; total: number; summary: CorpusSummary };
  examples: Record<string, Example>;
  changes: ChangeSet | null;
  verifications: Record<string, Verification>;
  timelines: Record<string, Timeline>;
};
