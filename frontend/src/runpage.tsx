import { useState } from "preact/hooks";
import { SpectrumChart, TimelineChart } from "./charts";
import { address, route } from "./route";
import { provider } from "./store";
import { count, duration, figure, signed } from "./text";
import type { Coverage, RunOverview, Timeline } from "./types";
import { Await, Command, Empty, Facts, ShareBar, Title, useLoad } from "./ui";

export function RunPage(props: { run: RunOverview }) {
  const { run } = props;
  const dearest = Math.max(...run.costs.map((c) => c.seconds ?? 0), 1e-9);
  return (
    <>
      <Title>The run</Title>
      <dl class="headlines">
        <div><dt>Model</dt><dd>{run.model}</dd></div>
        <div><dt>Corpus</dt><dd>{run.corpus}</dd></div>
        <div><dt>Training examples</dt><dd class="num">{run.n_train === null ? "–" : figure(run.n_train)}</dd></div>
        <div><dt>Task</dt><dd>{run.task}</dd></div>
        <div><dt>Index</dt><dd>{run.has.index ? "built" : "none"}</dd></div>
        <div><dt>Held-out examples</dt><dd>{run.has.heldout ? "scored, so noise is known" : "none, so noise is not known"}</dd></div>
      </dl>
      <section>
        <h2 class="h3">What it cost</h2>
        {run.costs.length ? (
          <table class="costs">
            <thead><tr><th scope="col">what</th><th scope="col" class="chart"><span class="sr">chart</span></th><th scope="col" class="right">time</th><th scope="col" class="right">passes</th><th scope="col" class="wide">told</th></tr></thead>
            <tbody>
              {run.costs.map((c, i) => (
                <tr key={i}><th scope="row">{c.name}</th><td class="chart"><ShareBar width={(100 * (c.seconds ?? 0)) / dearest} /></td><td class="right num">{c.seconds === null ? "–" : duration(c.seconds)}</td><td class="right num">{figure(c.passes)}</td><td class="wide soft">{c.told}</td></tr>
              ))}
            </tbody>
          </table>
        ) : <p class="soft">No cost was recorded.</p>}
      </section>
      <section>
        <h2 class="h3">Curvature</h2>
        <p class="soft small">Eigenvalues of the curvature of each layer, largest first. Directions below the damping count as flat.</p>
        {run.spectrum.length ? <SpectrumChart of={run.spectrum} /> : <p class="soft">This fit keeps no eigenvalues.</p>}
      </section>
      {run.coverage && <Covered of={run.coverage} />}
      <section>
        <h2 class="h3">Traces</h2>
        {run.traces.length ? (
          <ul class="plain-list">{run.traces.map((t) => <li key={t.id}><a href={address(["evidence", t.id])}>{t.name}</a><span class="soft">{count(t.asked.length, "question")}</span></li>)}</ul>
        ) : <Empty title="No trace yet."><Command line="headwater trace RUN --prompt “…”" /></Empty>}
      </section>
      <section>
        <h2 class="h3">Timelines</h2>
        {run.timelines.length ? (
          <ul class="plain-list">{run.timelines.map((t) => <li key={t.id}><a href={address(["timeline", t.id])}>{t.name}</a></li>)}</ul>
        ) : <p class="soft">{run.has.trajectory ? "None yet: headwater timeline tells when something was learnt." : "When something was learnt can be told for runs whose training was recorded."}</p>}
      </section>
      <Facts of={run.facts} title="How it was fitted" />
    </>
  );
}

function Covered(props: { of: Coverage }) {
  const [all, set] = useState(false);
  const { followed, share, rows } = props.of;
  const shown = all ? rows : rows.slice(0, 12);
  return (
    <section>
      <h2 class="h3">Coverage</h2>
      <p class="soft small">{followed}</p>
      <div class="meter-wide"><svg height="12" role="img" aria-label={`${Math.round(100 * share)} % of the parameters are followed`}><rect class="meter-rest" width="100%" height="12" rx="3" /><rect class="column" width={`${100 * share}%`} height="12" rx="3" /></svg></div>
      {rows.length > 0 && (
        <table class="coverage">
          <thead><tr><th scope="col">layer</th><th scope="col" class="wide">kind</th><th scope="col" class="right">parameters</th><th scope="col">state</th></tr></thead>
          <tbody>{shown.map((r) => <tr key={r.name}><th scope="row">{r.name}</th><td class="wide">{r.kind}</td><td class="right num">{r.parameters}</td><td>{r.state}</td></tr>)}</tbody>
        </table>
      )}
      {rows.length > shown.length && <p><button type="button" class="quiet" onClick={() => set(true)}>all {rows.length} layers</button></p>}
    </section>
  );
}

export function TimelinePage(props: { run: RunOverview }) {
  const id = route.value.path[1] ?? props.run.timelines.at(-1)?.id;
  const loaded = useLoad<Timeline | null>(async () => (id ? provider.timeline(id) : null), [id]);
  return (
    <>
      <Title>When it was learnt</Title>
      <Await of={loaded} lines={7}>
        {(found) => found ? <Shown of={found} /> : <Empty title="There is no timeline in this run."><Command line="headwater timeline RUN --prompt “…”" /></Empty>}
      </Await>
    </>
  );
}

function Shown(props: { of: Timeline }) {
  return (
    <>
      <p class="standfirst">{props.of.told}</p>
      {props.of.queries.map((q, i) => (
        <section key={i} class="timeline">
          <h2 class="h3" dir="auto">{q.text}</h2>
          <TimelineChart of={q.segments} label={`${props.of.measurement} of ${q.text} over training; the table below has the numbers`} />
          <div class="scroll" tabIndex={0} role="region" aria-label={`Stages: ${q.text}`}>
            <table>
              <thead><tr><th scope="col">stage</th><th scope="col" class="right">steps</th><th scope="col" class="right">raised</th><th scope="col" class="right">lowered</th><th scope="col" class="right">net</th><th scope="col">strongest</th></tr></thead>
              <tbody>
                {q.segments.map((s, k) => (
                  <tr key={k}><th scope="row">{s.stage}</th><td class="right num">{s.start}–{s.stop}</td><td class="right num up">{signed(s.raised)}</td><td class="right num down">{signed(s.lowered)}</td><td class="right num">{signed(s.net)}</td><td dir="auto">{s.strongest.map(([n, v]) => `${n} (${v})`).join(", ")}</td></tr>
                ))}
              </tbody>
            </table>
          </div>
        </section>
      ))}
    </>
  );
}
