import { useEffect, useRef, useState } from "preact/hooks";
import { mark, marks, run } from "./store";
import type { Action } from "./types";

const NAMES: [Action, string, string][] = [
  ["remove", "Remove", "leave it out of training"],
  ["duplicate", "Duplicate", "train on it twice"],
  ["keep", "Keep", "looked at, stays as it is"],
];

/** What can be done with an example. A pressed button is a mark in the change set. */
export function Marks(props: { of: { id: string; number: number | null; title: string } }) {
  const marked = marks.value.get(props.of.id);
  const [asking, ask] = useState<"upweight" | "relabel" | null>(null);
  const [value, set] = useState("2");
  const field = useRef<HTMLInputElement>(null);
  useEffect(() => field.current?.select(), [asking]);
  const labelled = run.value?.task.toLowerCase().includes("classif") ?? false;
  const submit = (event: Event) => {
    event.preventDefault();
    const number = Number(value);
    if (asking === "upweight" && number > 0) mark(props.of, "upweight", { weight: number });
    if (asking === "relabel" && Number.isInteger(number)) mark(props.of, "relabel", { label: String(number) });
    ask(null);
  };
  return (
    <div class="marks" role="group" aria-label={`Mark ${props.of.title}`}>
      {NAMES.map(([action, name, told]) => (
        <button key={action} type="button" class="mark-button" data-action={action} title={told} aria-pressed={marked?.action === action}
          onClick={() => mark(props.of, action)}>{name}</button>
      ))}
      <button type="button" class="mark-button" data-action="upweight" title="let it count more, or less" aria-pressed={marked?.action === "upweight"}
        aria-expanded={asking === "upweight"} onClick={() => (marked?.action === "upweight" ? mark(props.of, "upweight", { weight: marked.weight ?? 2 }) : ask(asking ? null : "upweight"))}>
        {marked?.action === "upweight" ? `Weight ${marked.weight}` : "Weight…"}
      </button>
      {labelled && (
        <button type="button" class="mark-button" data-action="relabel" title="give it another label" aria-pressed={marked?.action === "relabel"}
          aria-expanded={asking === "relabel"} onClick={() => ask(asking ? null : "relabel")}>
          {marked?.action === "relabel" ? `Label ${marked.label}` : "Relabel…"}
        </button>
      )}
      {asking && (
        <form class="inline" onSubmit={submit}>
          <label>
            <span class="sr">{asking === "upweight" ? "Counts so many times" : "New label, a number"}</span>
            <input type="number" min={asking === "upweight" ? "0.1" : "0"} max={asking === "upweight" ? 100 : undefined} step={asking === "upweight" ? "0.1" : "1"} value={value} required ref={field}
              onInput={(event) => set(event.currentTarget.value)} />
          </label>
          <button type="submit">Set</button>
        </form>
      )}
    </div>
  );
}
