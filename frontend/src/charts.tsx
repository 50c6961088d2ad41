import { scaleLinear, scaleLog } from "d3-scale";
import { line } from "d3-shape";
import { useState } from "preact/hooks";
import { figure } from "./text";
import type { Bins, Segment, Spectrum, VerificationRow } from "./types";
import { useWidth } from "./ui";

const LEFT = 48, RIGHT = 12, TOP = 10, BOTTOM = 30;

type Axis = { at: number; label: string };

/** Axes of a chart, with room for what is drawn in it. */
function Frame(props: {
  width: number; height: number; label: string; x: Axis[]; y: Axis[]; xTitle: string; yTitle: string; children: preact.ComponentChildren;
}) {
  const { width, height } = props;
  return (
    <svg class="chart-svg" viewBox={`0 0 ${width} ${height}`} width={width} height={height} role="img" aria-label={props.label}>
      {props.y.map((t) => <g key={t.at}><line class="grid" x1={LEFT} x2={width - RIGHT} y1={t.at} y2={t.at} /><text class="tick" x={LEFT - 8} y={t.at} dy=".32em" text-anchor="end">{t.label}</text></g>)}
      {props.x.map((t) => <text key={t.at} class="tick" x={t.at} y={height - BOTTOM + 15} text-anchor="middle">{t.label}</text>)}
      <line class="base" x1={LEFT} x2={width - RIGHT} y1={height - BOTTOM} y2={height - BOTTOM} />
      <text class="axis-title" x={width - RIGHT} y={height - 1} text-anchor="end">{props.xTitle}</text>
      <text class="axis-title" x={0} y={TOP - 1}>{props.yTitle}</text>
      {props.children}
    </svg>
  );
}

export function Histogram(props: { bins: Bins; title: string; unit: string; marked?: number[] }) {
  const [ref, width] = useWidth<HTMLDivElement>(480);
  const { edges, counts } = props.bins;
  const height = 170;
  const ends = [edges[0] ?? 0, edges.at(-1) ?? 1], range = [LEFT, width - RIGHT];
  const logarithmic = ratio(edges, 0) > 1.001 && Math.abs(ratio(edges, 0) - ratio(edges, edges.length - 2)) < 0.01 * ratio(edges, 0);
  const x = logarithmic ? scaleLog(ends, range) : scaleLinear(ends, range);
  const ticks = spread(logarithmic ? [...x.ticks(), ...ends] : x.ticks(Math.max(3, width / 110)), x, logarithmic ? 44 : 0);
  const y = scaleLinear([0, Math.max(...counts, 1)], [height - BOTTOM, TOP + 8]).nice(3);
  const total = counts.reduce((a, b) => a + b, 0);
  return (
    <figure class="figure" ref={ref}>
      <figcaption>{props.title}{props.bins.told && <span class="soft"> {props.bins.told}</span>}</figcaption>
      <Frame width={width} height={height} xTitle={props.unit} yTitle="examples"
        label={`${props.title}: histogram of ${total} examples from ${figure(edges[0])} to ${figure(edges.at(-1))} ${props.unit}`}
        x={ticks.map((t) => ({ at: x(t), label: figure(t, 2) }))} y={y.ticks(3).filter(Number.isInteger).map((t) => ({ at: y(t), label: figure(t) }))}>
        {counts.map((n, i) => {
          const [from, to] = [x(edges[i] ?? 0), x(edges[i + 1] ?? 0)];
          return n > 0 && <rect key={i} class="column" x={from + 0.5} width={Math.max(to - from - 1, 0.75)} y={y(n)} height={y(0) - y(n)}><title>{`${figure(n)} examples from ${figure(edges[i])} to ${figure(edges[i + 1])}`}</title></rect>;
        })}
      </Frame>
    </figure>
  );
}

function ratio(edges: number[], at: number): number {
  const [low, high] = [edges[at] ?? 0, edges[at + 1] ?? 0];
  return low > 0 ? high / low : 0;
}

/** The ticks that have room, those first in the list before others: round ones, then the ends. */
function spread(ticks: number[], x: (value: number) => number, room: number): number[] {
  const kept: number[] = [];
  const rounder = (t: number) => Number(t.toExponential().split("e")[0]);
  const order = room ? [...ticks].sort((a, b) => rank(rounder(a)) - rank(rounder(b))) : ticks;
  for (const t of order) if (kept.every((k) => Math.abs(x(k) - x(t)) >= room)) kept.push(t);
  return kept;
}

function rank(mantissa: number): number {
  return mantissa === 1 ? 0 : mantissa === 5 || mantissa === 2 ? 1 : Number.isInteger(mantissa) ? 2 : 3;
}

/** Eigenvalues of every layer, largest first; the chosen layer stands out. */
export function SpectrumChart(props: { of: Spectrum[] }) {
  const [ref, width] = useWidth<HTMLDivElement>(640);
  const kinds = [...new Set(props.of.map((s) => s.kind))];
  const [chosen, choose] = useState("");
  const height = 280;
  const values = props.of.flatMap((s) => s.points.map((p) => p[1]));
  const x = scaleLinear([0, 1], [LEFT, width - RIGHT]);
  const y = scaleLinear([Math.min(...values), Math.max(...values)], [height - BOTTOM, TOP + 8]).nice(5);
  const path = line<[number, number]>().x((p) => x(p[0])).y((p) => y(p[1]));
  const picked = props.of.find((s) => s.layer === chosen);
  return (
    <div ref={ref}>
      <label class="field narrow">
        <span>Layer</span>
        <select value={chosen} onChange={(event) => choose(event.currentTarget.value)}>
          <option value="">all {props.of.length}</option>
          {props.of.map((s) => <option key={s.layer} value={s.layer}>{s.layer}</option>)}
        </select>
      </label>
      <figure class="figure">
        <Frame width={width} height={height} xTitle="rank, as a share of all directions" yTitle="eigenvalue"
          label={`Curvature spectrum of ${props.of.length} layers, eigenvalue by rank, from 10 to the ${figure(Math.max(...values))} down to 10 to the ${figure(Math.min(...values))}`}
          x={[0, 0.25, 0.5, 0.75, 1].map((t) => ({ at: x(t), label: `${100 * t} %` }))} y={y.ticks(5).map((t) => ({ at: y(t), label: Number.isInteger(t) ? `10${superscript(t)}` : "" }))}>
          {props.of.map((s) => (
            <path key={s.layer} d={path(s.points) ?? undefined} class={`spectrum${props.of.length > 12 ? "" : " few"} k${kinds.indexOf(s.kind) % 6}${picked && picked !== s ? " faint" : ""}${picked === s ? " picked" : ""}`}
              onClick={() => choose(s.layer)}><title>{`${s.layer}: ${s.told}`}</title></path>
          ))}
        </Frame>
        {kinds.length > 1 && <figcaption class="key">{kinds.slice(0, 6).map((kind, i) => <span key={kind}><i class={`k${i}`} />{kind}</span>)}</figcaption>}
      </figure>
      {picked && <p class="small soft">{picked.layer}: {picked.told}</p>}
    </div>
  );
}

function superscript(n: number): string {
  return String(n).replace(/./g, (c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[Number(c)] ?? "⁻");
}

/** Predicted against actual changes; on the line, the prediction was right. */
export function PredictedActual(props: { rows: VerificationRow[] }) {
  const [ref, width] = useWidth<HTMLDivElement>(520);
  const side = Math.min(width, 560);
  const height = Math.round(side * 0.72);
  const reach = (values: number[]): [number, number] => {
    const [low, high] = [Math.min(0, ...values), Math.max(0, ...values)];
    const room = 0.06 * (high - low || 1);
    return [low - room, high + room];
  };
  const x = scaleLinear(reach(props.rows.map((r) => r.predicted_value)), [LEFT, side - RIGHT]);
  const y = scaleLinear(reach(props.rows.map((r) => r.actual_value)), [height - BOTTOM, TOP + 8]);
  const from = Math.max(x.domain()[0] ?? 0, y.domain()[0] ?? 0);
  const to = Math.min(x.domain()[1] ?? 0, y.domain()[1] ?? 0);
  return (
    <div ref={ref} class="square">
      <figure class="figure">
        <Frame width={side} height={height} xTitle="predicted change, nats" yTitle="actual change, nats"
          label={`Predicted against actual change of ${props.rows.length} measurements; the table below has the numbers`}
          x={x.ticks(5).map((t) => ({ at: x(t), label: figure(t) }))} y={y.ticks(5).map((t) => ({ at: y(t), label: figure(t) }))}>
          <line class="zero" x1={x(0)} x2={x(0)} y1={TOP + 8} y2={height - BOTTOM} />
          <line class="zero" x1={LEFT} x2={side - RIGHT} y1={y(0)} y2={y(0)} />
          {to > from && <line class="diagonal" x1={x(from)} y1={y(from)} x2={x(to)} y2={y(to)} />}
          {props.rows.map((r, i) => (
            <circle key={i} class={r.control ? "dot-control" : "dot-change"} cx={x(r.predicted_value)} cy={y(r.actual_value)} r={r.control ? 4.5 : 5.5}>
              <title>{`${r.change}, ${r.query}: predicted ${r.predicted}, actual ${r.actual}`}</title>
            </circle>
          ))}
        </Frame>
        <figcaption class="key"><span><i class="dot-change" />the change</span><span><i class="dot-control" />as many at random</span><span><i class="diagonal" />predicted = actual</span></figcaption>
      </figure>
    </div>
  );
}

/** One measurement over training: what each stretch of it raised and lowered. */
export function TimelineChart(props: { of: Segment[]; label: string }) {
  const [ref, width] = useWidth<HTMLDivElement>(720);
  const height = 220;
  const limit = Math.max(...props.of.flatMap((s) => [s.raised, -s.lowered, Math.abs(s.net)]), 1e-12);
  const x = scaleLinear([props.of[0]?.start ?? 0, props.of.at(-1)?.stop ?? 1], [LEFT, width - RIGHT]);
  const y = scaleLinear([-limit, limit], [height - BOTTOM, TOP + 8]).nice(4);
  return (
    <figure class="figure" ref={ref}>
      <Frame width={width} height={height} xTitle="training step" yTitle="nats" label={props.label}
        x={[...new Set(props.of.flatMap((s) => [s.start, s.stop]))].map((t) => ({ at: x(t), label: figure(t) }))} y={y.ticks(4).map((t) => ({ at: y(t), label: figure(t) }))}>
        {props.of.map((s, i) => {
          const middle = (x(s.start) + x(s.stop)) / 2;
          const half = Math.max(Math.min(0.3 * (x(s.stop) - x(s.start)), 60), 0.5);
          const [from, to] = [middle - half, middle + half];
          return (
            <g key={i}>
              {i > 0 && <line class="grid" x1={x(s.start)} x2={x(s.start)} y1={TOP + 8} y2={height - BOTTOM} />}
              <rect class="r-up" x={from} width={Math.max(to - from, 1)} y={y(s.raised)} height={Math.max(y(0) - y(s.raised), 0)} />
              <rect class="r-down" x={from} width={Math.max(to - from, 1)} y={y(0)} height={Math.max(y(s.lowered) - y(0), 0)} />
              <path class="net" transform={`translate(${middle} ${y(s.net)})`} d="M0-7L6 0 0 7-6 0z" />
              <title>{`${s.stage}, steps ${s.start} to ${s.stop}: net ${figure(s.net)}, raised ${figure(s.raised)}, lowered ${figure(s.lowered)} nats`}</title>
            </g>
          );
        })}
        <line class="zero" x1={LEFT} x2={width - RIGHT} y1={y(0)} y2={y(0)} />
      </Frame>
    </figure>
  );
}
