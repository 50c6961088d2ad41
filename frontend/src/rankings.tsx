import { useState } from "preact/hooks";
import { opened } from "./store";
import type { Answer, Ranking } from "./types";

/** The same question under several methods, next to one another; what several list is marked. */
export function Rankings(props: { answer: Answer }) {
  const [pointed, point] = useState<string | null>(null);
  const { rankings } = props.answer;
  return (
    <section class="compare" aria-label="The same question under other methods">
      <h3>The same question under other methods</h3>
      <p class="soft small">Which texts look alike (BM25, embeddings) is a different question from which ones taught the model. Examples that more than one method lists are marked ●.</p>
      <div class="compare-columns">
        {rankings.map((ranking) => <Column key={ranking.method} ranking={ranking} pointed={pointed} point={point} />)}
      </div>
    </section>
  );
}

function Column(props: { ranking: Ranking; pointed: string | null; point: (id: string | null) => void }) {
  const { ranking, pointed, point } = props;
  const shared = ranking.rows.filter((row) => row.also.length).length;
  return (
    <section class="ranking" aria-label={ranking.method}>
      <h4>{ranking.method}</h4>
      <p class="soft small">{ranking.about.replace(/([^.])$/, "$1.")}{ranking.rows.length > 0 && ` ${shared} of ${ranking.rows.length} listed by another method too.`}</p>
      {ranking.skipped && <p class="notice small">Left out: {ranking.skipped}</p>}
      <ol>
        {ranking.rows.map((row, i) => (
          <li key={row.id} class={`${row.also.length ? "shared" : ""}${pointed === row.id ? " pointed" : ""}`} data-example={row.id}
            onMouseEnter={() => point(row.id)} onMouseLeave={() => point(null)} onFocusCapture={() => point(row.id)} onBlurCapture={() => point(null)}>
            <span class="rank num">{i + 1}</span>
            <div>
              <button type="button" class="link" dir="auto" aria-haspopup="dialog" onClick={() => (opened.value = { id: row.id, number: row.number, title: row.title })}>{row.title}</button>
              <p class="line" dir="auto">{row.excerpt}</p>
              {row.also.length > 0 && <p class="also small">● also in {row.also.join(", ")}</p>}
            </div>
            <span class="num soft small" title={ranking.unit}>{row.score}</span>
          </li>
        ))}
      </ol>
    </section>
  );
}
