import { attempt, provider } from "./store";
import type { Job } from "./types";
import { Progress } from "./ui";

const STATES = { queued: "waiting", running: "running", done: "done", failed: "failed", cancelled: "cancelled" };

/** A job: how far it is, what its stages found and cost, and a way to stop it. */
export function JobView(props: { job: Job }) {
  const { job } = props;
  const going = job.state === "queued" || job.state === "running";
  return (
    <section class={`job ${job.state}`} aria-label={job.title}>
      <div class="job-head">
        <p><b dir="auto">{job.title}</b> <span class="state">{STATES[job.state]}{job.state === "queued" && job.position > 1 && `, ${job.position - 1} before it`}</span></p>
        {going && <button type="button" class="quiet" onClick={() => void attempt(() => provider.cancel(job.id))}>Cancel</button>}
      </div>
      <Progress job={job} />
      {going && <p class="soft small num">{job.progress?.note || (job.state === "queued" ? "Waiting for its turn." : "Starting …")}</p>}
      {job.stages.length > 0 && (
        <ol class="stages">{job.stages.map((stage) => <li key={stage.name}><b>{stage.name}</b> <span>{stage.told}</span></li>)}</ol>
      )}
      {job.error && <p class="error" role="alert">{job.error}</p>}
    </section>
  );
}
