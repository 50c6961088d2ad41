import type {
  Answer, ChangeSet, Corpus, CorpusQuery, CorpusSummary, Example, Job, JobRequest, RunOverview, Timeline, Trace, Verification,
} from "./types";

/** What became of a job since its stream was opened. */
export type Heard = { job?: (job: Job) => void; token?: (text: string, at: number | undefined) => void; partial?: (answers: Answer[]) => void };

/** Where the page's data come from: a server on this machine, or the file the page stands in. */
export interface Provider {
  /** Whether there is a server that computes. */
  readonly live: boolean;
  run(): Promise<RunOverview>;
  trace(id: string): Promise<Trace>;
  corpus(query: CorpusQuery, signal?: AbortSignal): Promise<Corpus>;
  summary(): Promise<CorpusSummary>;
  example(number: number): Promise<Example>;
  verification(id: string): Promise<Verification>;
  timeline(id: string): Promise<Timeline>;
  changes(): Promise<ChangeSet>;
  save(changes: ChangeSet): Promise<void>;
  /** The change set as the file that the training loop reads. */
  exported(changes: ChangeSet): Promise<Blob>;
  jobs(): Promise<Job[]>;
  start(request: JobRequest): Promise<Job>;
  cancel(id: string): Promise<void>;
  /** Follow a job to its end, whatever happens to the connection; returns the job as it ended. */
  follow(id: string, heard: Heard, signal: AbortSignal): Promise<Job>;
}

export class Failure extends Error {
  constructor(message: string, readonly status: number) {
    super(message);
  }
}
