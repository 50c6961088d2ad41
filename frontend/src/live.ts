import { messages } from "./events";
import { Failure, type Heard, type Provider } from "./provider";
import type {
  Answer, ChangeSet, Corpus, CorpusQuery, CorpusSummary, Example, Job, JobRequest, RunOverview, Timeline, Trace, Verification,
} from "./types";

const PAUSES = [300, 1000, 3000]; // milliseconds before a lost stream is opened again; the last one repeats

/** A server on this machine. */
export class LiveProvider implements Provider {
  readonly live = true;

  /** @param connected is told after every request whether the server could be reached. */
  constructor(
    private readonly token: () => string,
    private readonly connected: (state: "ok" | "lost" | "denied") => void,
  ) {}

  run = () => this.json<RunOverview>("/api/run");
  trace = (id: string) => this.json<Trace>(`/api/traces/${encodeURIComponent(id)}`);
  summary = () => this.json<CorpusSummary>("/api/corpus/summary");
  example = (number: number) => this.json<Example>(`/api/examples/${number}`);
  verification = (id: string) => this.json<Verification>(`/api/verifications/${encodeURIComponent(id)}`);
  timeline = (id: string) => this.json<Timeline>(`/api/timelines/${encodeURIComponent(id)}`);
  changes = () => this.json<ChangeSet>("/api/changes");
  jobs = async () => {
    const found = await this.json<Job[] | { jobs: Job[] }>("/api/jobs");
    return Array.isArray(found) ? found : found.jobs;
  };
  start = (request: JobRequest) => this.json<Job>("/api/jobs", { method: "POST", ...content(request) });

  corpus(query: CorpusQuery, signal?: AbortSignal): Promise<Corpus> {
    const asked = new URLSearchParams();
    for (const [name, value] of Object.entries(query)) if (value !== "") asked.set(name, String(value));
    return this.json<Corpus>(`/api/corpus?${asked}`, signal ? { signal } : {});
  }

  async save(changes: ChangeSet): Promise<void> {
    await this.request("/api/changes", { method: "PUT", ...content(changes) });
  }

  async exported(changes: ChangeSet): Promise<Blob> {
    await this.save(changes);
    return (await this.request("/api/changes/export")).blob();
  }

  async cancel(id: string): Promise<void> {
    await this.request(`/api/jobs/${encodeURIComponent(id)}`, { method: "DELETE" });
  }

  async follow(id: string, heard: Heard, signal: AbortSignal): Promise<Job> {
    for (let lost = 0; ; lost++) {
      try {
        const response = await this.request(`/api/jobs/${encodeURIComponent(id)}/events`, { signal });
        if (!response.body) throw new TypeError("no stream");
        for await (const { event, data } of messages(response.body)) {
          lost = 0;
          const told = JSON.parse(data) as unknown;
          if (event === "job") heard.job?.(told as Job);
          else if (event === "token") {
            const said = told as { text: string; at?: number };
            heard.token?.(said.text, said.at);
          }
          else if (event === "partial") heard.partial?.((told as { answers: Answer[] }).answers);
          else if (event === "end") return told as Job;
        }
        this.connected("lost"); // the stream stopped before the job's end
      } catch (error) {
        if (signal.aborted || (error instanceof Failure && error.status !== 0)) throw error;
        this.connected("lost");
      }
      await pause(PAUSES[Math.min(lost, PAUSES.length - 1)] ?? 3000, signal);
    }
  }

  private async json<T>(path: string, init: RequestInit = {}): Promise<T> {
    return (await (await this.request(path, init)).json()) as T;
  }

  private async request(path: string, init: RequestInit = {}): Promise<Response> {
    const headers = { ...(init.headers as Record<string, string>), "X-Headwater-Token": this.token() };
    let response: Response;
    try {
      response = await fetch(path, { ...init, headers, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (init.signal?.aborted) throw error;
      this.connected("lost");
      throw new Failure("The server does not answer. Is headwater serve still running?", 0);
    }
    this.connected(response.status === 401 ? "denied" : "ok");
    if (!response.ok) throw new Failure(await sentence(response), response.status);
    return response;
  }
}

function content(value: unknown): RequestInit {
  return { body: JSON.stringify(value), headers: { "Content-Type": "application/json" } };
}

async function sentence(response: Response): Promise<string> {
  const said = (await response.json().catch(() => null)) as { error?: string } | null;
  return said?.error ?? `The server answered with status ${response.status}.`;
}

function pause(milliseconds: number, signal: AbortSignal): Promise<void> {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("stopped", "AbortError"));
    });
  });
}
