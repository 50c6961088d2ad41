import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import type { Job, Pair, Piece, Share, Span } from "./types";

// Loading.

export type Loaded<T> = { state: "loading" } | { state: "ready"; value: T } | { state: "failed"; error: string; retry: () => void };

/** Load a value, again when what it depends on changes. */
export function useLoad<T>(get: (signal: AbortSignal) => Promise<T>, depends: unknown[]): Loaded<T> {
  const [loaded, set] = useState<Loaded<T>>({ state: "loading" });
  const [attempt, retry] = useState(0);
  useEffect(() => {
    const stop = new AbortController();
    set({ state: "loading" });
    get(stop.signal).then(
      (value) => !stop.signal.aborted && set({ state: "ready", value }),
      (error: unknown) =>
        !stop.signal.aborted &&
        set({ state: "failed", error: error instanceof Error ? error.message : String(error), retry: () => retry((n) => n + 1) }),
    );
    return () => stop.abort();
  }, [...depends, attempt]);
  return loaded;
}

export function Await<T>(props: { of: Loaded<T>; lines?: number; children: (value: T) => ComponentChildren }) {
  if (props.of.state === "loading") return <Skeleton lines={props.lines ?? 5} />;
  if (props.of.state === "failed") return <Failed error={props.of.error} retry={props.of.retry} />;
  return <>{props.children(props.of.value)}</>;
}

export function Skeleton(props: { lines: number }) {
  return (
    <div class="skeleton" role="status" aria-label="Loading">
      {Array.from({ length: props.lines }, (_, i) => <span key={i} class={`s${i % 4}`} />)}
    </div>
  );
}

export function Failed(props: { error: string; retry?: () => void }) {
  return (
    <div class="notice failed" role="alert">
      <p>{props.error}</p>
      {props.retry && <button type="button" onClick={props.retry}>Try again</button>}
    </div>
  );
}

export function Empty(props: { title: string; children?: ComponentChildren }) {
  return (
    <div class="notice empty">
      <p class="lead">{props.title}</p>
      {props.children}
    </div>
  );
}

/** A command to type, with a button that copies it. */
export function Command(props: { line: string }) {
  const [copied, set] = useState(false);
  const copy = () => void navigator.clipboard?.writeText(props.line).then(() => set(true), () => undefined);
  return (
    <p class="command">
      <code>{props.line}</code>
      <button type="button" class="quiet" onClick={copy} aria-label={`Copy the command ${props.line}`}>{copied ? "copied" : "copy"}</button>
    </p>
  );
}

// Text.

/** Tokens with heat. They are text nodes, whatever they hold. */
export function Pieces(props: { of: Piece[] }) {
  return <>{props.of.map((p, i) => (p.heat ? <mark key={i} class={p.heat} title={p.title}>{p.text}</mark> : p.text))}</>;
}

export function Pairs(props: { of: Pair[]; label?: string }) {
  if (!props.of.length) return null;
  return (
    <table class="pairs" aria-label={props.label}>
      <tbody>
        {props.of.map(([name, value]) => <tr key={name}><th scope="row">{name}</th><td dir="auto">{value}</td></tr>)}
      </tbody>
    </table>
  );
}

export function Facts(props: { of: Pair[]; title: string }) {
  if (!props.of.length) return null;
  return (
    <section class="facts-block">
      <h2 class="h3">{props.title}</h2>
      <dl class="facts">
        {props.of.map(([name, value]) => [<dt key={`${name}-t`}>{name}</dt>, <dd key={`${name}-d`}>{value}</dd>])}
      </dl>
    </section>
  );
}

export function Title(props: { children: ComponentChildren }) {
  return <h1 tabIndex={-1}>{props.children}</h1>;
}

// Charts in a line.

export function Bar(props: { at: number | null; span: Span | null; band: Span | null }) {
  return (
    <svg class="bar" height="14" aria-hidden="true" focusable="false">
      <line class="axis" x1="0" x2="100%" y1="7" y2="7" />
      {props.band && <rect class="band" x={`${props.band.x}%`} width={`${props.band.width}%`} y="0" height="14" rx="2" />}
      <line class="zero" x1="50%" x2="50%" y1="0" y2="14" />
      {props.span && <line class="whisker" x1={`${props.span.x}%`} x2={`${props.span.x + props.span.width}%`} y1="7" y2="7" />}
      {props.at !== null && <circle class="point" cx={`${props.at}%`} cy="7" r="5.5" />}
    </svg>
  );
}

export function Shares(props: { of: Share[]; title: string; told: string }) {
  const [all, set] = useState(false);
  const shown = all ? props.of : props.of.slice(0, 8);
  return (
    <section class="layers">
      <h3>{props.title}</h3>
      <p>{props.told}</p>
      <table>
        <tbody>
          {shown.map((row) => (
            <tr key={row.name}>
              <th scope="row">{row.name}</th>
              <td class="chart"><ShareBar width={row.width} /></td>
              <td class="right num">{row.share}</td>
            </tr>
          ))}
        </tbody>
      </table>
      {props.of.length > shown.length && <button type="button" class="quiet" onClick={() => set(true)}>all {props.of.length}</button>}
    </section>
  );
}

export function ShareBar(props: { width: number }) {
  return (
    <svg height="16" aria-hidden="true" focusable="false">
      <rect class="share" x="0" width={`${Math.max(props.width, 0)}%`} y="3" height="10" rx="2" />
    </svg>
  );
}

export function Progress(props: { job: Job }) {
  const { progress, state } = props.job;
  if (state !== "running" && state !== "queued") return null;
  const known = progress && progress.total > 0;
  return known
    ? <progress max={progress.total} value={progress.done} aria-label={progress.note || props.job.title} />
    : <progress aria-label={props.job.title} />;
}

/** The width of an element, followed as it changes. */
export function useWidth<E extends Element>(fallback: number): [preactRef<E>, number] {
  const ref = useRef<E>(null);
  const [width, set] = useState(fallback);
  useEffect(() => {
    if (!ref.current) return undefined;
    const seen = new ResizeObserver(([entry]) => entry && entry.contentRect.width > 0 && set(Math.round(entry.contentRect.width)));
    seen.observe(ref.current);
    return () => seen.disconnect();
  }, []);
  return [ref, width];
}
type preactRef<E> = { current: E | null };

export function Choice<T extends string>(props: {
  label: string;
  value: T;
  options: readonly (readonly [T, string])[];
  onChange: (value: T) => void;
}) {
  return (
    <label class="field">
      <span>{props.label}</span>
      <select value={props.value} onChange={(event) => props.onChange(event.currentTarget.value as T)}>
        {props.options.map(([value, name]) => <option key={value} value={value}>{name}</option>)}
      </select>
    </label>
  );
}

export function Check(props: { label: string; checked: boolean; onChange: (checked: boolean) => void; note?: string }) {
  return (
    <label class="check">
      <input type="checkbox" checked={props.checked} onChange={(event) => props.onChange(event.currentTarget.checked)} />
      <span>{props.label}{props.note && <small class="soft"> {props.note}</small>}</span>
    </label>
  );
}
