import { computed, signal } from "@preact/signals";
import { EmbeddedProvider } from "./embedded";
import { LiveProvider } from "./live";
import { Failure, type Provider } from "./provider";
import type { Action, Answer, Card, Change, ChangeSet, Embedded, Job, JobRequest, RunOverview, Trace } from "./types";

// The way to the data.

export const connection = signal<"ok" | "lost" | "denied">("ok");
export const token = signal("");

function session(): Storage | null {
  try {
    return window.sessionStorage;
  } catch {
    return null; // a page opened from disk may be denied it
  }
}

const embedded = document.getElementById("headwater-data");
export const provider: Provider = embedded?.textContent
  ? new EmbeddedProvider(JSON.parse(embedded.textContent) as Embedded, session())
  : new LiveProvider(() => token.value, (state) => (connection.value = state));

/** Take the token out of the address, so that it is neither seen nor shared, and keep it for this tab. */
export function takeToken(): void {
  const found = /[#&]token=([^&]+)/.exec(location.hash)?.[1];
  if (found) {
    session()?.setItem("headwater-token", decodeURIComponent(found));
    history.replaceState(null, "", location.pathname);
  }
  token.value = session()?.getItem("headwater-token") ?? "";
}

export function giveToken(given: string): void {
  session()?.setItem("headwater-token", given);
  token.value = given;
}

// What is said to people who listen, and what went wrong.

export const said = signal("");
export const trouble = signal("");

/** Do something asynchronous for a press of a button; what goes wrong is told. */
export async function attempt(what: () => Promise<void>): Promise<void> {
  trouble.value = "";
  try {
    await what();
  } catch (error) {
    if (error instanceof Failure && error.status === 0) return; // that the server is lost is told already
    trouble.value = error instanceof Error ? error.message : String(error);
  }
}

// The run and its traces.

export const run = signal<RunOverview | null>(null);
const traces = new Map<string, Promise<Trace>>();

export async function readRun(): Promise<RunOverview> {
  return (run.value = await provider.run());
}

export function readTrace(id: string): Promise<Trace> {
  const reading = traces.get(id) ?? provider.trace(id);
  traces.set(id, reading);
  reading.catch(() => traces.delete(id));
  return reading;
}

// The example that is open.

export type Opened = { id: string; number: number | null; title: string; card?: Card };
export const opened = signal<Opened | null>(null);

// The change set.

export const changes = signal<ChangeSet>({ name: "changes", changes: [] });
/** Titles of the examples that were marked here, as they are shown. */
export const titles = new Map<string, string>();
export const drawer = signal(false);
export const marks = computed(() => new Map(changes.value.changes.map((change) => [change.id, change])));
const past = signal<ChangeSet[]>([]);
export const canUndo = computed(() => past.value.length > 0);
let saving: ReturnType<typeof setTimeout> | undefined;

export async function readChanges(): Promise<void> {
  changes.value = await provider.changes();
}

function change(next: ChangeSet): void {
  past.value = [...past.value, changes.value];
  keep(next);
}

function keep(next: ChangeSet): void {
  changes.value = next;
  clearTimeout(saving);
  saving = setTimeout(() => void attempt(() => provider.save(changes.value)), 250);
}

/** Mark an example, or take the mark off when it is the one it has. */
export function mark(example: { id: string; number: number | null; title: string }, action: Action, more: { weight?: number; label?: string } = {}): void {
  titles.set(example.id, example.title);
  const before = marks.value.get(example.id);
  const same = before?.action === action && before.weight === more.weight && before.label === more.label;
  const others = changes.value.changes.filter((c) => c.id !== example.id);
  const next: Change = { id: example.id, number: example.number, action, ...more };
  change({ ...changes.value, changes: same ? others : [...others, next] });
  said.value = same ? "Mark taken off." : `Marked: ${wording(next)}.`;
}

export function unmark(id: string): void {
  change({ ...changes.value, changes: changes.value.changes.filter((c) => c.id !== id) });
  said.value = "Mark taken off.";
}

export function clearMarks(): void {
  change({ ...changes.value, changes: [] });
  said.value = "All marks taken off.";
}

export function nameChanges(name: string): void {
  keep({ ...changes.value, name });
}

export function undo(): void {
  const before = past.value.at(-1);
  if (!before) return;
  past.value = past.value.slice(0, -1);
  keep({ ...before, name: changes.value.name });
  said.value = "Undone.";
}

export function wording(change: Change): string {
  if (change.action === "upweight") return `counts ${change.weight ?? 2} times`;
  if (change.action === "relabel") return `label ${change.label ?? "?"}`;
  return { remove: "remove", duplicate: "duplicate", keep: "keep" }[change.action];
}

// Jobs.

export type Followed = { job: Job; text: string; answers: Answer[] };
export const jobs = signal<Record<string, Followed>>({});
const following = new Map<string, Promise<Job>>();

export const active = computed(() =>
  Object.values(jobs.value).map((f) => f.job).filter((job) => job.state === "queued" || job.state === "running"),
);

function heard(id: string, what: (before: Followed) => Partial<Followed>): void {
  const before = jobs.value[id];
  if (before) jobs.value = { ...jobs.value, [id]: { ...before, ...what(before) } };
}

/** Follow a job to its end. However often it is asked for, one stream serves all. */
export function follow(job: Job): Promise<Job> {
  if (!jobs.value[job.id]) jobs.value = { ...jobs.value, [job.id]: { job, text: "", answers: [] } };
  const present = following.get(job.id);
  if (present) return present;
  const stages = new Set(job.stages.map((stage) => stage.name));
  const ended = provider
    .follow(
      job.id,
      {
        job: (now) => {
          heard(job.id, () => ({ job: now }));
          for (const stage of now.stages) {
            if (!stages.has(stage.name)) said.value = `Stage ${stage.name} done: ${stage.told}`;
            stages.add(stage.name);
          }
        },
        token: (text, at) => heard(job.id, (before) => ({ text: [...before.text].slice(0, at).join("") + text })),
        partial: (answers) => heard(job.id, () => ({ answers })),
      },
      new AbortController().signal,
    )
    .then((end) => {
      heard(job.id, () => ({ job: end }));
      said.value = `${end.title}: ${end.state}.`;
      return end;
    });
  following.set(job.id, ended);
  ended.catch(() => following.delete(job.id));
  return ended;
}

export async function start(request: JobRequest): Promise<Job> {
  const job = await provider.start(request);
  const ended = follow(job);
  ended.catch((error: unknown) => (trouble.value = error instanceof Failure ? error.message : "The job's stream was lost."));
  return job;
}

/** Take up what is in the queue when the page is opened. */
export async function readJobs(): Promise<void> {
  const found = await provider.jobs();
  jobs.value = { ...Object.fromEntries(found.map((job) => [job.id, { job, text: "", answers: [] }])), ...jobs.value };
  for (const job of found) if (job.state === "queued" || job.state === "running") void follow(job).catch(() => undefined);
}
