import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { drawer, opened, undo } from "./store";
import { Check } from "./ui";

const KEYS: [string, string][] = [
  ["j, k", "next, previous example"],
  ["Enter, o", "open the example"],
  ["x, d, e", "remove, duplicate, keep it"],
  ["u", "undo the last mark"],
  ["/", "go to the filter"],
  ["c", "show or hide the change set"],
  ["?", "these keys"],
];
const shown = signal(false);
const enabled = signal(true);

/** Single keys for the examples of the page. They can be turned off. */
export function useKeys(): void {
  useEffect(() => {
    const key = (event: KeyboardEvent) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || opened.value || shown.value) return;
      const target = event.target as HTMLElement;
      if (target.closest("input, textarea, select, [role=listbox], [role=rowgroup]")) return;
      const card = target.closest<HTMLElement>("[data-card]");
      if (event.key === "Enter" && target === card) return press(event, card, ".open");
      if (!enabled.value) return;
      if (event.key === "j") step(event, card, 1);
      else if (event.key === "k") step(event, card, -1);
      else if (event.key === "o" && card) press(event, card, ".open");
      else if (event.key === "x" && card) press(event, card, "[data-action=remove]");
      else if (event.key === "d" && card) press(event, card, "[data-action=duplicate]");
      else if (event.key === "e" && card) press(event, card, "[data-action=keep]");
      else if (event.key === "u") undo();
      else if (event.key === "c") drawer.value = !drawer.value;
      else if (event.key === "?") shown.value = true;
      else if (event.key === "/") {
        event.preventDefault();
        document.querySelector<HTMLElement>("[data-filter]")?.focus();
      }
    };
    document.addEventListener("keydown", key);
    return () => document.removeEventListener("keydown", key);
  }, []);
}

function press(event: KeyboardEvent, card: HTMLElement | null, what: string): void {
  event.preventDefault();
  card?.querySelector<HTMLElement>(what)?.click();
}

function step(event: KeyboardEvent, card: HTMLElement | null, by: number): void {
  const cards = [...document.querySelectorAll<HTMLElement>("[data-card]")];
  const next = cards[card ? cards.indexOf(card) + by : 0];
  if (!next) return;
  event.preventDefault();
  next.focus();
  next.scrollIntoView({ block: "nearest" });
}

export function Keys() {
  return (
    <footer class="foot">
      <button type="button" class="quiet" onClick={() => (shown.value = true)} aria-haspopup="dialog">Keys</button>
      {shown.value && <KeySheet />}
    </footer>
  );
}

function KeySheet() {
  const dialog = useRef<HTMLDialogElement>(null);
  useEffect(() => dialog.current?.showModal(), []);
  const close = () => (shown.value = false);
  return (
    <dialog ref={dialog} class="sheet small-sheet" aria-labelledby="keys-title" onClose={close}>
      <div class="sheet-body">
        <div class="sheet-head"><h2 id="keys-title">Keys</h2><button type="button" class="quiet" onClick={close}>Close</button></div>
        <table class="pairs"><tbody>{KEYS.map(([keys, told]) => <tr key={keys}><th scope="row"><kbd>{keys}</kbd></th><td>{told}</td></tr>)}</tbody></table>
        <Check label="single keys are on" checked={enabled.value} onChange={(on) => (enabled.value = on)} />
      </div>
    </dialog>
  );
}
