import { useEffect, useId, useMemo, useRef, useState } from "preact/hooks";
import { visible, words, type Word } from "./text";

/** First and last chosen word. */
export type Chosen = [number, number] | null;

/** A completion whose words can be chosen: by arrow keys with Shift, by dragging, by a long press on a phone. */
export function Words(props: { text: string; chosen: Chosen; choose: (chosen: Chosen) => void }) {
  const { text, chosen, choose } = props;
  const list = useRef<HTMLSpanElement>(null);
  const found = useMemo(() => words(text), [text]);
  const [cursor, move] = useState(0);
  const anchor = useRef(0);
  const dragged = useRef(false);
  const id = useId();

  useEffect(() => {
    const selected = () => {
      const range = getSelection();
      if (!range || range.isCollapsed || !list.current?.contains(range.anchorNode) || !list.current.contains(range.focusNode)) return;
      const touched = [...list.current.querySelectorAll("[role=option]")].flatMap((word, i) => (range.containsNode(word, true) ? [i] : []));
      const [first, last] = [touched[0], touched.at(-1)];
      if (first !== undefined && last !== undefined) {
        dragged.current = true;
        anchor.current = first;
        move(last);
        choose([first, last]);
      }
    };
    // What was dragged over with a mouse is shown as chosen; a finger keeps its handles.
    const released = (event: PointerEvent) => {
      const range = getSelection();
      if (event.pointerType === "mouse" && range && !range.isCollapsed && list.current?.contains(range.anchorNode)) range.removeAllRanges();
    };
    document.addEventListener("selectionchange", selected);
    document.addEventListener("pointerup", released);
    return () => {
      document.removeEventListener("selectionchange", selected);
      document.removeEventListener("pointerup", released);
    };
  }, [choose]);

  const to = (next: number, extend: boolean) => {
    const at = Math.min(Math.max(next, 0), found.length - 1);
    move(at);
    if (extend) choose(ordered(anchor.current, at));
    else anchor.current = at;
    getSelection()?.removeAllRanges();
  };
  const key = (event: KeyboardEvent) => {
    const steps: Record<string, number> = { ArrowRight: cursor + 1, ArrowDown: cursor + 1, ArrowLeft: cursor - 1, ArrowUp: cursor - 1, Home: 0, End: found.length - 1 };
    const step = steps[event.key];
    if (step !== undefined) to(step, event.shiftKey);
    else if (event.key === " ") choose([(anchor.current = cursor), cursor]);
    else if (event.key === "a" && (event.ctrlKey || event.metaKey)) choose([0, found.length - 1]);
    else if (event.key === "Escape" && chosen) choose(null);
    else return;
    event.preventDefault();
  };
  const click = (i: number) => {
    if (dragged.current) return; // a drag has chosen
    move((anchor.current = i));
    choose(chosen?.[0] === i && chosen[1] === i ? null : [i, i]);
  };
  return (
    <span ref={list} class="words" role="listbox" tabIndex={0} aria-multiselectable="true" aria-label="Words of the completion" aria-activedescendant={`${id}-${cursor}`} onKeyDown={key} onPointerDown={() => (dragged.current = false)}>
      {found.map((word, i) => [
        <span key={`${i}-gap`} role="presentation" class={within(i - 1, chosen) && within(i, chosen) ? "chosen" : undefined}>{visible(gap(word))}</span>,
        <span key={i} id={`${id}-${i}`} role="option" aria-selected={within(i, chosen)} class={`word${within(i, chosen) ? " chosen" : ""}${i === cursor ? " cursor" : ""}`} onClick={() => click(i)}>
          {visible(word.text.slice(gap(word).length))}
        </span>,
      ])}
    </span>
  );
}

/** The chosen words as positions in the text; what leads the first word is not a part. */
export function spanOf(text: string, chosen: Chosen): [number, number] | null {
  const found: Word[] = words(text);
  const [first, last] = chosen ? [found[chosen[0]], found[chosen[1]]] : [];
  if (!first || !last) return null;
  return [first.start + gap(first).length, last.stop];
}

/** The words that a stretch of the text touches. */
export function chosenIn(text: string, span: [number, number]): Chosen {
  const touched = words(text).flatMap((word, i) => (word.start + gap(word).length < span[1] && word.stop > span[0] ? [i] : []));
  const [first, last] = [touched[0], touched.at(-1)];
  return first === undefined || last === undefined ? null : [first, last];
}

function gap(word: Word): string {
  return word.text.slice(0, word.text.length - word.text.trimStart().length);
}

function ordered(a: number, b: number): [number, number] {
  return a <= b ? [a, b] : [b, a];
}

function within(i: number, chosen: Chosen): boolean {
  return chosen !== null && chosen[0] <= i && i <= chosen[1];
}
