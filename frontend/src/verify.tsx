import { useEffect } from "preact/hooks";
import { PredictedActual } from "./charts";
import { JobView } from "./jobs";
import { address, route } from "./route";
import { attempt, jobs, provider, readRun } from "./store";
import type { RunOverview, Verification, VerificationRow } from "./types";
import { Await, Command, Empty, Facts, Title, useLoad } from "./ui";

export function VerifyPage(props: { run: RunOverview }) {
  const all = Object.values(jobs.value).map((f) => f.job).filter((job) => job.kind === "verify");
  const shown = all.filter((job) => job.state !== "done");
  const finished = all.filter((job) => job.state === "done").length;
  useEffect(() => void (finished && attempt(async () => void (await readRun()))), [finished]);
  const id = route.value.path[1] ?? props.run.verifications.at(-1)?.id;
  return (
    <>
      <Title>Was the prediction right?</Title>
      <p class="standfirst">The model is trained again with the data changed, and once more with as many examples changed at random. What was predicted stands beside what happened.</p>
      {shown.map((job) => <JobView key={job.id} job={job} />)}
      {props.run.verifications.length > 1 && (
        <nav class="answers" aria-label="Verifications">
          <ol>{props.run.verifications.map((v) => <li key={v.id}><a href={address(["verify", v.id])} aria-current={v.id === id ? "true" : undefined}><span class="q">{v.title}</span></a></li>)}</ol>
        </nav>
      )}
      {id ? <One key={`${id} ${finished}`} id={id} /> : !shown.length && (
        <Empty title="Nothing has been verified in this run yet.">
          {provider.live ? <p>Mark examples under Evidence and press Verify in the change set.</p> : <Command line="headwater verify RUN --name TRACE" />}
        </Empty>
      )}
    </>
  );
}

function One(props: { id: string }) {
  const loaded = useLoad(() => provider.verification(props.id), [props.id]);
  return <Await of={loaded} lines={8}>{(found) => <Shown found={found} />}</Await>;
}

function Shown(props: { found: Verification }) {
  const { found } = props;
  const changes = [...new Set(found.rows.map((row) => row.change))];
  const limit = Math.max(...found.rows.flatMap((r) => [Math.abs(r.predicted_value), Math.abs(r.actual_value)]), 1e-12) * 1.04;
  const at = (value: number) => 50 + (50 * value) / limit;
  return (
    <article class="verification">
      <h2 class="h3">{found.title}</h2>
      <p class="stats">{found.told}</p>
      <PredictedActual rows={found.rows} />
      <table class="verified">
        <caption class="sr">Predicted and actual change of each measurement, in nats</caption>
        <thead><tr><th scope="col">measured</th><th scope="col" class="chart">◇ predicted, ● actual</th><th scope="col" class="right">predicted</th><th scope="col" class="right">actual</th><th scope="col" class="right wide">95 % over seeds</th></tr></thead>
        {changes.map((change) => <Group key={change} change={change} rows={found.rows.filter((row) => row.change === change)} at={at} />)}
      </table>
      <Facts of={found.facts} title="How it was verified" />
    </article>
  );
}

function Group(props: { change: string; rows: VerificationRow[]; at: (value: number) => number }) {
  const control = props.rows[0]?.control;
  return (
    <tbody class={control ? "control" : ""}>
      <tr><th scope="rowgroup" colSpan={5}>{props.change}{control && <span class="soft"> · the random control</span>}</th></tr>
      {props.rows.map((row, i) => (
        <tr key={i}>
          <th scope="row" dir="auto">{row.query}</th>
          <td class="chart">
            <svg height="16" aria-hidden="true" focusable="false">
              <line class="axis" x1="0" x2="100%" y1="8" y2="8" /><line class="zero" x1="50%" x2="50%" y1="0" y2="16" />
              <line class="link-line" x1={`${props.at(row.predicted_value)}%`} x2={`${props.at(row.actual_value)}%`} y1="8" y2="8" />
              <svg x={`${props.at(row.predicted_value)}%`} y="8" width="1" height="1" overflow="visible"><path class="predicted" d="M0-6L5 0 0 6-5 0z" /></svg>
              <circle class={row.control ? "dot-control" : "dot-change"} cx={`${props.at(row.actual_value)}%`} cy="8" r="4.5" />
            </svg>
          </td>
          <td class="right num">{row.predicted}</td><td class="right num">{row.actual}</td><td class="right num wide soft">{row.spread}</td>
        </tr>
      ))}
    </tbody>
  );
}
