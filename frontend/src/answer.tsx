import { useMemo, useState } from "preact/hooks";
import { CardView } from "./card";
import { Rankings } from "./rankings";
import { count } from "./text";
import type { Answer, Card, Side, SourceRow } from "./types";
import { Choice, Shares } from "./ui";

type Filter = { side: "both" | "raised" | "lowered"; source: string; column: string; value: string; told: boolean; text: string };
const OPEN: Filter = { side: "both", source: "", column: "", value: "", told: false, text: "" };

/** One answer of the model, and the training data behind it. */
export function AnswerView(props: { answer: Answer; columns: Record<string, string[]>; partial?: boolean }) {
  const { answer } = props;
  return (
    <article class="answer-body">
      <Asked answer={answer} />
      <p class="stats">
        <b class="num">{answer.measurement} {answer.value} nats</b>
        {answer.n_tokens > 0 && ` over ${count(answer.n_tokens, "token")}`}. {answer.n_train} training examples were scored. {answer.noise} Bars run from −{answer.limit} to +{answer.limit} nats.
      </p>
      <Examples answer={answer} columns={props.columns} />
      {(answer.sources.rows.length > 0 || answer.layers.length > 0 || answer.modules.length > 0) && (
        <div class="totals">
          {answer.sources.rows.length > 0 && <Sources answer={answer} />}
          {(answer.layers.length > 0 || answer.modules.length > 0) && (
            <div class="parts">
              {answer.layers.length > 0 && <Shares of={answer.layers} title="By layer" told="Share of the absolute score that each group of layers carries." />}
              {answer.modules.length > 0 && <Shares of={answer.modules} title="By module" told="The same, by kind of module." />}
            </div>
          )}
        </div>
      )}
      {answer.rankings.length > 0 && <Rankings answer={answer} />}
      {answer.stages.length > 0 && !props.partial && (
        <section class="stages-told">
          <h3>Stages</h3>
          <dl class="facts">{answer.stages.map((s) => [<dt key={`${s.name}-t`}>{s.name}</dt>, <dd key={`${s.name}-d`}>{s.told}</dd>])}</dl>
        </section>
      )}
    </article>
  );
}

function Asked(props: { answer: Answer }) {
  const { answer } = props;
  return (
    <>
      <blockquote class="asked" dir="auto">
        <span class="prompt">{answer.prompt}</span>
        <span class="completion">
          {answer.tokens.length
            ? answer.tokens.map((t, i) => [t.space, <span key={i} class={t.level ? `t${t.level}` : undefined} title={t.title}>{t.text}</span>])
            : answer.completion}
        </span>
      </blockquote>
      {answer.whole_prompt && (
        <details>
          <summary>The whole prompt</summary>
          <div class="full" dir="auto" tabIndex={0} role="region" aria-label="The whole prompt">{answer.whole_prompt}</div>
        </details>
      )}
    </>
  );
}

function Examples(props: { answer: Answer; columns: Record<string, string[]> }) {
  const { answer } = props;
  const [filter, set] = useState<Filter>(OPEN);
  const sides = useMemo(
    () => answer.sides.map((side) => ({ ...side, shown: ranked(side).filter(([card]) => passes(card, side, filter)) })),
    [answer, filter],
  );
  const all = answer.sides.reduce((n, side) => n + side.cards.length, 0);
  const left = sides.reduce((n, side) => n + side.shown.length, 0);
  const visibleSides = sides.filter((side) => filter.side === "both" || side.name === filter.side);
  return (
    <>
      {all > 0 && <Filters answer={answer} columns={props.columns} filter={filter} set={set} told={left === all ? `${all} examples` : `${left} of ${all} examples`} />}
      <div class={`columns${visibleSides.length === 1 ? " single" : ""}`}>
        {visibleSides.map((side) => (
          <section key={side.name} class={side.name} aria-label={side.heading}>
            <h3><span class="dot" />{side.heading}</h3>
            {side.shown.length
              ? <ol class="cards">{side.shown.map(([card, rank]) => <CardView key={card.id} card={card} rank={rank} band={answer.band} />)}</ol>
              : <p class="soft">{side.cards.length ? "No example passes the filter." : "No example."}</p>}
          </section>
        ))}
      </div>
    </>
  );
}

function Filters(props: { answer: Answer; columns: Record<string, string[]>; filter: Filter; set: (filter: Filter) => void; told: string }) {
  const { answer, filter, set } = props;
  const cards = answer.sides.flatMap((side) => side.cards);
  const sources = [...new Set(cards.map((card) => card.source).filter((s): s is string => s !== null))].sort();
  const columns = Object.entries(props.columns).filter(([name, values]) => values.length > 1 && name !== answer.source_column);
  const judged = cards.some((card) => card.significant !== null);
  return (
    <form class="filters" role="search" aria-label="Filter the examples" onSubmit={(event) => event.preventDefault()}>
      <label class="field grow">
        <span>Text</span>
        <input type="search" data-filter value={filter.text} placeholder="in title or text" onInput={(event) => set({ ...filter, text: event.currentTarget.value })} />
      </label>
      <Choice label="Side" value={filter.side} onChange={(side) => set({ ...filter, side })}
        options={[["both", "both"], ["raised", "raised it"], ["lowered", "lowered it"]]} />
      {sources.length > 1 && (
        <Choice label={answer.source_column} value={filter.source} onChange={(source) => set({ ...filter, source })}
          options={[["", "any"], ...sources.map((s) => [s, s] as const)]} />
      )}
      {columns.length > 0 && (
        <Choice label="Metadata" value={filter.column} onChange={(column) => set({ ...filter, column, value: "" })}
          options={[["", "any"], ...columns.map(([name]) => [name, name] as const)]} />
      )}
      {filter.column && (
        <Choice label={filter.column} value={filter.value} onChange={(value) => set({ ...filter, value })}
          options={[["", "any"], ...(props.columns[filter.column] ?? []).map((v) => [v, v] as const)]} />
      )}
      {judged && (
        <label class="check">
          <input type="checkbox" checked={filter.told} onChange={(event) => set({ ...filter, told: event.currentTarget.checked })} />
          <span>told apart from noise</span>
        </label>
      )}
      <p class="soft small num" role="status">{props.told}{filter !== OPEN && (
        <> · <button type="button" class="link" onClick={() => set(OPEN)}>show all</button></>
      )}</p>
    </form>
  );
}

function ranked(side: Side): [Card, number][] {
  return side.cards.map((card, i) => [card, i + 1]);
}

function passes(card: Card, side: Side, filter: Filter): boolean {
  const wanted = filter.text.trim().toLowerCase();
  return (
    (filter.side === "both" || side.name === filter.side) &&
    (!filter.source || card.source === filter.source) &&
    (!filter.column || !filter.value || card.raw_metadata[filter.column] === filter.value) &&
    (!filter.told || card.significant === true) &&
    (!wanted || written(card).includes(wanted))
  );
}

function written(card: Card): string {
  const pieces = card.full.length ? card.full : card.excerpt;
  return `${card.title}\n${pieces.map((p) => p.text).join("")}`.toLowerCase();
}

function Sources(props: { answer: Answer }) {
  const { source_column: column, n_train, sources } = props.answer;
  return (
    <section class="sources">
      <h3>By {column}</h3>
      <p>Sums over all {n_train} training examples, in nats: <span class="down">lowered</span>, <span class="up">raised</span>, and ◆ the net.</p>
      <table>
        <thead>
          <tr>
            <th scope="col">{column}</th><th scope="col" class="right wide">examples</th><th scope="col" class="chart"><span class="sr">chart</span></th>
            <th scope="col" class="right wide">raised</th><th scope="col" class="right wide">lowered</th><th scope="col" class="right">net</th>
          </tr>
        </thead>
        <tbody>{sources.rows.map((row) => <SourceLine key={row.name} row={row} />)}</tbody>
      </table>
    </section>
  );
}

function SourceLine(props: { row: SourceRow }) {
  const { row } = props;
  return (
    <tr>
      <th scope="row" dir="auto">{row.name}</th>
      <td class="right num wide soft">{row.n}</td>
      <td class="chart">
        <svg height="16" aria-hidden="true" focusable="false">
          {row.lowered && <rect class="r-down" x={`${row.lowered.x}%`} width={`${row.lowered.width}%`} y="3" height="10" />}
          {row.raised && <rect class="r-up" x={`${row.raised.x}%`} width={`${row.raised.width}%`} y="3" height="10" />}
          <line class="zero" x1="50%" x2="50%" y1="0" y2="16" />
          {row.at !== null && <svg x={`${row.at}%`} y="8" width="1" height="1" overflow="visible"><path class="net" d="M0-6L5 0 0 6-5 0z" /></svg>}
        </svg>
      </td>
      <td class="right num wide soft">{row.numbers[0]}</td><td class="right num wide soft">{row.numbers[1]}</td><td class="right num">{row.numbers[2]}</td>
    </tr>
  );
}
