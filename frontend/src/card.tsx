import { useState } from "preact/hooks";
import { Bar, Pairs, Pieces } from "./ui";
import { Marks } from "./marks";
import { marks, opened } from "./store";
import { count, visible } from "./text";
import type { Card, Span } from "./types";

/** One training example and what it did. */
export function CardView(props: { card: Card; rank: number; band: Span | null; heading?: "h3" | "h4" }) {
  const { card } = props;
  const open = () => (opened.value = { id: card.id, number: card.number, title: card.title, card });
  const [more, show] = useState(false);
  const [unfolded, unfold] = useState(false);
  const copies = card.copy_ids.flatMap((id, i) => (id === card.id ? [] : [{ id, number: card.copy_numbers[i] ?? null, title: visible(id) }]));
  const marked = marks.value.get(card.id);
  return (
    <li class={`card${marked ? ` marked-${marked.action}` : ""}`} tabIndex={-1} data-card={card.id}>
      <div class="head">
        <span class="rank num">{props.rank}</span>
        <h4 dir="auto">{card.title}</h4>
        <span class="score num">{card.score}<span class="sr"> nats</span></span>
        <div class="meta num">
          <span class="chips">
            {card.source && <span class="chip" dir="auto">{card.source}</span>}
            {copies.length > 0 && (
              <button type="button" class="chip plain unfold" title="Nearly the same text; shown once" aria-expanded={unfolded} onClick={() => unfold(!unfolded)}>+ {count(copies.length, "near-duplicate")}</button>
            )}
          </span>
          <span>
            {card.interval}{card.p !== "–" && ` · p ${card.p}`}
            {card.significant === true && <span class="told" title="Told apart from noise"> ✓<span class="sr"> told apart from noise</span></span>}
          </span>
        </div>
      </div>
      <Bar at={card.at} span={card.span} band={props.band} />
      {card.excerpt.length > 0 && (
        <p class="passage" dir="auto">{card.before && "… "}<Pieces of={card.excerpt} />{card.after && " …"}</p>
      )}
      {unfolded && (
        <ul class="copies" aria-label={`Near-duplicates of ${card.title}`}>
          {copies.map((copy) => (
            <li key={copy.id} data-example={copy.id}>
              <button type="button" class="link" dir="auto" aria-haspopup="dialog" onClick={() => (opened.value = copy)}>{copy.title}</button>
              <Marks of={copy} />
            </li>
          ))}
        </ul>
      )}
      <div class="acts">
        <button type="button" class="quiet open" onClick={open} aria-haspopup="dialog">Open<span class="sr"> {card.title}</span></button>
        <Marks of={card} />
        <button type="button" class="quiet more" aria-expanded={more} onClick={() => show(!more)}>Details</button>
      </div>
      {more && <div class="details">
        {card.query_heat.length > 0 && (
          <>
            <p class="label">What it did to each token of the completion</p>
            <p class="passage effect" dir="auto"><Pieces of={card.query_heat} /></p>
          </>
        )}
        {card.strongest.length > 0 && (
          <>
            <p class="label">Its tokens that carried the score</p>
            <ul class="carried num">{card.strongest.map(([token, score], i) => <li key={i}><b dir="auto">{token}</b> {score}</li>)}</ul>
          </>
        )}
        <Pairs of={card.metadata} label="What is known of this example" />
      </div>}
    </li>
  );
}
