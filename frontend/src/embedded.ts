import { changeFile } from "./changefile";
import { Failure, type Provider } from "./provider";
import type { ChangeSet, Corpus, CorpusQuery, CorpusRow, Embedded, Job } from "./types";

const NO_SERVER = "This file holds saved results; a new question needs `headwater serve`.";

/** The data that stand in the page itself. Nothing is asked of any network. */
export class EmbeddedProvider implements Provider {
  readonly live = false;
  private readonly key = `headwater-changes ${location.pathname}`;
  private order: { key: string; rows: CorpusRow[] } | null = null;

  constructor(private readonly data: Embedded, private readonly storage: Storage | null) {}

  run = async () => this.data.run;
  trace = async (id: string) => known(this.data.traces[id], `trace ${id}`);
  summary = async () => this.data.corpus.summary;
  example = async (number: number) => known(this.data.examples[String(number)], `text of example ${number}`);
  verification = async (id: string) => known(this.data.verifications[id], `verification ${id}`);
  timeline = async (id: string) => known(this.data.timelines[id], `timeline ${id}`);

  async corpus(query: CorpusQuery): Promise<Corpus> {
    const key = JSON.stringify([query.sort, query.descending, query.source, query.search]);
    if (this.order?.key !== key) this.order = { key, rows: arranged(this.data.corpus.rows, query) };
    const { rows } = this.order;
    return { total: rows.length, offset: query.offset, rows: rows.slice(query.offset, query.offset + query.limit) };
  }

  async changes(): Promise<ChangeSet> {
    const kept = this.storage?.getItem(this.key);
    return kept ? (JSON.parse(kept) as ChangeSet) : (this.data.changes ?? { name: "changes", changes: [] });
  }

  async save(changes: ChangeSet): Promise<void> {
    this.storage?.setItem(this.key, JSON.stringify(changes));
  }

  async exported(changes: ChangeSet): Promise<Blob> {
    return new Blob([`${JSON.stringify(changeFile(changes), null, 2)}\n`], { type: "application/json" });
  }

  jobs = async (): Promise<Job[]> => [];
  start = (): Promise<Job> => Promise.reject(new Failure(NO_SERVER, 405));
  cancel = (): Promise<void> => Promise.reject(new Failure(NO_SERVER, 405));
  follow = (): Promise<Job> => Promise.reject(new Failure(NO_SERVER, 405));
}

function known<T>(value: T | undefined, what: string): T {
  if (value === undefined) throw new Failure(`This file does not hold the ${what}; open it with headwater serve.`, 404);
  return value;
}

/** The rows that a query asks for, in its order; rows without the value it sorts by come last. */
export function arranged(rows: CorpusRow[], query: CorpusQuery): CorpusRow[] {
  const wanted = query.search.trim().toLowerCase();
  const found = rows.filter(
    (row) =>
      (!query.source || row.source === query.source) &&
      (!wanted || `${row.title}\n${row.excerpt}\n${row.id}`.toLowerCase().includes(wanted)),
  );
  const sign = query.descending ? -1 : 1;
  return found.sort((a, b) => {
    const [x, y] = [a[query.sort], b[query.sort]];
    if (x === null || y === null) return x === y ? a.number - b.number : x === null ? 1 : -1;
    return sign * (x - y) || a.number - b.number;
  });
}
