import { useEffect, useRef } from "preact/hooks";
import { Marks } from "./marks";
import { opened, provider, type Opened } from "./store";
import type { Card, Example, Piece } from "./types";
import { Await, Pairs, Pieces, useLoad } from "./ui";

/** The whole text of the example that is open, over the page. */
export function ExampleDialog() {
  const example = opened.value;
  return example ? <Shown key={example.id} of={example} /> : null;
}

function Shown(props: { of: Opened }) {
  const { of } = props;
  const dialog = useRef<HTMLDialogElement>(null);
  const close = () => (opened.value = null);
  useEffect(() => {
    const before = document.activeElement;
    dialog.current?.showModal();
    return () => before instanceof HTMLElement && before.focus();
  }, []);
  const loaded = useLoad<Example | null>(
    async () => (of.number === null ? null : provider.example(of.number).catch((error: unknown) => {
      if (of.card) return null; // what the card holds is shown instead
      throw error;
    })),
    [of.number],
  );
  const outside = (event: MouseEvent) => event.target === dialog.current && close();
  return (
    <dialog ref={dialog} class="sheet" aria-labelledby="open-title" onClose={close} onClick={outside}>
      <div class="sheet-body">
        <div class="sheet-head">
          <div>
            <p class="eyebrow"><span>Training example</span>{of.number !== null && <span class="chip num">no. {of.number}</span>}</p>
            <h2 id="open-title" dir="auto">{of.title}</h2>
          </div>
          <button type="button" class="quiet" onClick={close}>Close</button>
        </div>
        <Marks of={of} />
        <Await of={loaded} lines={8}>
          {(found) => <Body example={found} card={of.card} />}
        </Await>
      </div>
    </dialog>
  );
}

function Body(props: { example: Example | null; card: Card | undefined }) {
  const { example, card } = props;
  const heated = card && (card.full.length ? card.full : card.excerpt);
  const whole: Piece[] = heated?.length ? heated : (example?.pieces ?? []);
  const cut = card && !card.full.length && (card.before || card.after) && !example;
  return (
    <>
      {cut && <p class="soft small">Only this excerpt stands in the file.</p>}
      {whole.length > 0
        ? <div class="full" dir="auto" tabIndex={0} role="region" aria-label="Full text"><Pieces of={whole} /></div>
        : <p class="soft">This example has no text to show.</p>}
      {example?.truncated && <p class="soft small">The text is longer; only its beginning is shown.</p>}
      {card && card.query_heat.length > 0 && (
        <>
          <p class="label">What it did to each token of the completion</p>
          <p class="passage effect" dir="auto"><Pieces of={card.query_heat} /></p>
        </>
      )}
      <Pairs of={example?.metadata.length ? example.metadata : (card?.metadata ?? [])} label="What is known of this example" />
    </>
  );
}
