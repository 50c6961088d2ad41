import { Component } from "preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { Histogram } from "./charts";
import { JobView } from "./jobs";
import { marks, attempt, jobs, mark, opened, provider, readRun, start, wording } from "./store";
import { count, decimals, figure, fixed } from "./text";
import type { CorpusQuery, CorpusRow, CorpusSummary, RunOverview, SortKey } from "./types";
import { Await, Choice, Command, Empty, Failed, Skeleton, Title, useLoad, useWidth } from "./ui";
import { useVirtual } from "./virtual";

const PAGE = 200;

export function CorpusPage(props: { run: RunOverview }) {
  const surveys = Object.values(jobs.value).map((f) => f.job).filter((job) => job.kind === "survey");
  const finished = surveys.filter((job) => job.state === "done").length;
  useEffect(() => void (finished && attempt(async () => void (await readRun()))), [finished]);
  const loaded = useLoad(() => provider.summary(), [finished]);
  return (
    <>
      <Title>The training data</Title>
      <Await of={loaded} lines={6}>
        {(summary) => (
          <>
            <p class="standfirst">{summary.told || `${count(summary.n, "example")} of ${props.run.corpus}.`}</p>
            {!summary.surveyed && <NotSurveyed />}
            {surveys.filter((job) => job.state !== "done").map((job) => <JobView key={job.id} job={job} />)}
            <Survey summary={summary} />
            <All summary={summary} key={finished} />
          </>
        )}
      </Await>
    </>
  );
}

function NotSurveyed() {
  const going = Object.values(jobs.value).some(({ job }) => job.kind === "survey" && (job.state === "running" || job.state === "queued"));
  if (going) return null;
  return (
    <Empty title="This corpus has not been surveyed yet.">
      <p>A survey makes one pass over the training data. It finds each example’s influence on itself, its loss, near-duplicates, outliers and clusters.</p>
      {provider.live
        ? <p><button type="button" class="primary" onClick={() => void attempt(async () => void (await start({ kind: "survey" })))}>Survey it</button></p>
        : <Command line="headwater serve RUN" />}
    </Empty>
  );
}

function Survey(props: { summary: CorpusSummary }) {
  const { self_influence, loss, outliers, clusters, sources } = props.summary;
  return (
    <div class="survey">
      {(self_influence || loss) && (
        <section class="two" aria-label="Distributions">
          {self_influence && <Histogram bins={self_influence} title="Self-influence" unit="nats" />}
          {loss && <Histogram bins={loss} title="Training loss" unit="nats" />}
        </section>
      )}
      {(outliers.length > 0 || clusters.length > 0) && (
        <section class="two">
          {outliers.length > 0 && (
            <div>
              <h2 class="h3">Outliers</h2>
              <p class="soft small">Examples that influence themselves far more than the others: rare, wrong, or learnt by heart.</p>
              <ol class="plain-list">
                {outliers.slice(0, 12).map((o) => (
                  <li key={o.id}><button type="button" class="link" dir="auto" aria-haspopup="dialog" onClick={() => (opened.value = o)}>{o.title}</button><span class="num soft">{o.score}</span></li>
                ))}
              </ol>
            </div>
          )}
          {clusters.length > 0 && <Clusters of={clusters} />}
        </section>
      )}
      {sources.length > 0 && <SourceTable summary={props.summary} />}
    </div>
  );
}

function Clusters(props: { of: CorpusSummary["clusters"] }) {
  const largest = Math.max(...props.of.map((c) => c.n), 1);
  return (
    <div>
      <h2 class="h3">Near-duplicates</h2>
      <p class="soft small">Groups of examples that are nearly the same, named after one of them, with their number.</p>
      <ol class="plain-list">
        {props.of.slice(0, 12).map((c) => (
          <li key={c.id}>
            <button type="button" class="link" dir="auto" aria-haspopup="dialog" onClick={() => (opened.value = { id: c.title, number: c.members[0] ?? null, title: c.title })}>{c.title}</button>
            <span class="meter"><svg height="8" aria-hidden="true" focusable="false"><rect class="share" width={`${(100 * c.n) / largest}%`} height="8" rx="2" /></svg></span>
            <span class="num soft">{c.n}</span>
          </li>
        ))}
      </ol>
    </div>
  );
}

/** Every source against every question that was asked: its net influence. */
function SourceTable(props: { summary: CorpusSummary }) {
  const { sources, queries } = props.summary;
  const limit = Math.max(...sources.flatMap((s) => s.net.map((v) => Math.abs(v ?? 0))), 1e-12);
  const digits = Math.max(decimals(limit) - 1, 0);
  const heat = (value: number | null) => (value === null || Math.abs(value) < 0.1 * limit ? "" : `${value > 0 ? "u" : "d"}${Math.min(Math.ceil((4 * Math.abs(value)) / limit), 4)}`);
  return (
    <section>
      <h2 class="h3">Sources and questions</h2>
      <p class="soft small">Net influence of every source on every question asked so far, in nats: blue raised it, orange lowered it.</p>
      <div class="scroll" tabIndex={0} role="region" aria-label="Sources and questions">
        <table class="matrix">
          <thead><tr><th scope="col">source</th><th scope="col" class="right">examples</th><th scope="col" class="right">self-influence</th>{queries.map((q, i) => <th key={i} scope="col" class="query" dir="auto" title={q}>{q}</th>)}</tr></thead>
          <tbody>
            {sources.map((s) => (
              <tr key={s.name}><th scope="row" dir="auto">{s.name}</th><td class="right num">{figure(s.n)}</td><td class="right num">{s.self_influence}</td>{s.net.map((v, i) => <td key={i} class={`right num ${heat(v)}`}>{v !== null && v > 0 && "+"}{fixed(v, digits)}</td>)}</tr>
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

const COLUMNS: [SortKey, string][] = [["number", "no."], ["length", "tokens"], ["loss", "loss"], ["self_influence", "self-influence"]];

/** All examples, however many: only the pages in sight are fetched, only the rows in sight are drawn. */
function All(props: { summary: CorpusSummary }) {
  const surveyed = props.summary.surveyed;
  const [sort, setSort] = useState<SortKey>("number");
  const [descending, setDescending] = useState(false);
  const [source, setSource] = useState("");
  const [typed, setTyped] = useState("");
  const [search, setSearch] = useState("");
  useEffect(() => {
    const timer = setTimeout(() => setSearch(typed), 250);
    return () => clearTimeout(timer);
  }, [typed]);
  const sorted = (key: SortKey) => {
    setDescending(key === sort ? !descending : key !== "number");
    setSort(key);
  };
  const query = useMemo(() => ({ sort, descending, source, search }), [sort, descending, source, search]);
  return (
    <section class="all" aria-label="All examples">
      <h2 class="h3">All examples</h2>
      <form class="filters" role="search" aria-label="Search the training data" onSubmit={(event) => event.preventDefault()}>
        <label class="field grow"><span>Search</span><input type="search" data-filter value={typed} placeholder="in title or text" onInput={(event) => setTyped(event.currentTarget.value)} /></label>
        {props.summary.sources.length > 1 && (
          <Choice label="Source" value={source} onChange={setSource} options={[["", "any"], ...props.summary.sources.map((s) => [s.name, s.name] as const)]} />
        )}
        <Choice label="Sort by" value={sort} onChange={(key) => key !== sort && sorted(key)} options={surveyed ? COLUMNS : COLUMNS.slice(0, 2)} />
        <button type="button" class="quiet" onClick={() => setDescending(!descending)}>{descending ? "largest first" : "smallest first"}</button>
      </form>
      <Rows key={JSON.stringify(query)} query={query} />
    </section>
  );
}

function Rows(props: { query: Omit<CorpusQuery, "offset" | "limit"> }) {
  const pages = useRef(new Map<number, CorpusRow[]>());
  const [total, setTotal] = useState<number | null>(null);
  const [error, setError] = useState("");
  const [again, retry] = useState(0);
  const [, arrived] = useState(0);
  const [ref, width] = useWidth<HTMLDivElement>(900);
  const rowHeight = width < 620 ? 76 : 52;
  const { scroller, items, height, scrollTo } = useVirtual(total ?? 0, rowHeight);
  const [cursor, move] = useState(-1);
  const gutter = scroller.current ? scroller.current.offsetWidth - scroller.current.clientWidth : 0;
  const first = Math.floor((items[0]?.index ?? 0) / PAGE);
  const last = Math.floor((items.at(-1)?.index ?? 0) / PAGE);

  useEffect(() => {
    const stop = new AbortController();
    const wait = total === null ? 0 : 60; // a page that is only scrolled past is not fetched
    const timer = setTimeout(() => {
      for (let page = first; page <= last; page++) {
        if (pages.current.has(page)) continue;
        provider.corpus({ ...props.query, offset: page * PAGE, limit: PAGE }, stop.signal).then(
          (found) => {
            if (stop.signal.aborted) return;
            pages.current.set(page, found.rows);
            setTotal(found.total);
            setError("");
            arrived((n) => n + 1);
          },
          (problem: unknown) => !stop.signal.aborted && setError(problem instanceof Error ? problem.message : String(problem)),
        );
      }
    }, wait);
    return () => {
      clearTimeout(timer);
      stop.abort();
    };
  }, [first, last, again]);

  const at = (index: number) => pages.current.get(Math.floor(index / PAGE))?.[index % PAGE];
  const key = (event: KeyboardEvent) => {
    const steps: Record<string, number> = { ArrowDown: 1, ArrowUp: -1, j: 1, k: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };
    const step = steps[event.key];
    const row = at(cursor);
    if (step !== undefined && total) {
      const next = Math.min(Math.max(cursor + step, 0), total - 1);
      move(next);
      scrollTo(next);
    } else if ((event.key === "Enter" || event.key === "o") && row && event.target === event.currentTarget) opened.value = row;
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  if (error && total === null) return <Failed error={error} retry={() => retry((n) => n + 1)} />;
  return (
    <div ref={ref}>
      <p class="soft small num" role="status">{total === null ? "Loading …" : count(total, "example")}{error && <> · {error} <button type="button" class="link" onClick={() => retry((n) => n + 1)}>Try again</button></>}</p>
      {total === 0 ? <Empty title="No example matches." /> : (
        <div class="list" role="table" aria-label="Training examples" aria-rowcount={total ?? -1}>
          <div class="list-row list-head" role="row" style={{ paddingRight: `calc(1rem + ${gutter}px)` }}>
            <span role="columnheader" class="right">no.</span><span role="columnheader">example</span><span role="columnheader" class="wide">source</span>
            <span role="columnheader" class="right">tokens</span><span role="columnheader" class="right">loss</span><span role="columnheader" class="right">self-influence</span><span role="columnheader">mark</span>
          </div>
          <div class="list-body" ref={scroller} role="rowgroup" tabIndex={0} aria-label="Examples; arrow keys move, Enter opens" onKeyDown={key}>
            {total === null ? <Skeleton lines={8} /> : (
              <div class="list-inner" style={{ height: `${height}px` }}>
                {items.map((item) => <Row key={item.index} index={item.index} row={at(item.index)} start={item.start} height={rowHeight} current={item.index === cursor} />)}
              </div>
            )}
          </div>
        </div>
      )}
    </div>
  );
}

type RowProps = { index: number; row: CorpusRow | undefined; start: number; height: number; current: boolean };

/** A row is drawn again only when something of it changes: a list that scrolls draws the new rows alone. */
class Row extends Component<RowProps> {
  shouldComponentUpdate(next: RowProps, state: object): boolean {
    const now = this.props;
    return state !== this.state || next.row !== now.row || next.index !== now.index || next.start !== now.start || next.height !== now.height || next.current !== now.current;
  }

  render() {
    return row(this.props);
  }
}

function row(props: RowProps) {
  const { row } = props;
  const place = { transform: `translateY(${props.start}px)`, height: `${props.height}px` };
  if (!row) return <div class="list-row waiting" role="row" aria-rowindex={props.index + 1} style={place}><span role="cell" class="right num soft">…</span></div>;
  const marked = marks.value.get(row.id);
  return (
    <div class={`list-row${props.current ? " current" : ""}`} role="row" aria-rowindex={props.index + 1} style={place} data-row={row.number}>
      <span role="cell" class="right num soft">{row.number}</span>
      <span role="cell" class="what">
        <button type="button" class="link" dir="auto" aria-haspopup="dialog" onClick={() => (opened.value = row)}>{row.title}</button>
        {row.outlier && <span class="chip plain">outlier</span>}
        {row.n_copies > 1 && <span class="chip plain num">×{row.n_copies}</span>}
        <span class="line soft" dir="auto">{row.excerpt}</span>
      </span>
      <span role="cell" class="wide"><span class="chip" dir="auto">{row.source ?? "–"}</span></span>
      <span role="cell" class="right num">{figure(row.length)}</span>
      <span role="cell" class="right num">{fixed(row.loss, 2)}</span>
      <span role="cell" class="right num">{fixed(row.self_influence, 2)}</span>
      <span role="cell"><button type="button" class="mark-button" data-action="remove" aria-pressed={marked !== undefined} aria-label={`${marked ? wording(marked) : "Remove"}: ${row.title}`} onClick={() => mark(row, marked?.action ?? "remove", marked?.weight === undefined ? {} : { weight: marked.weight })}>{marked ? wording(marked) : "Remove"}</button></span>
    </div>
  );
}
