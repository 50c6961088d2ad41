import { useEffect } from "preact/hooks";
import { AnswerView } from "./answer";
import { address, route, go } from "./route";
import { attempt, provider, readTrace, run, start } from "./store";
import type { RunOverview, Trace } from "./types";
import { Await, Bar, Choice, Command, Empty, Facts, Title, useLoad } from "./ui";

export function EvidencePage(props: { run: RunOverview }) {
  const { path, query } = route.value;
  const id = path[1] ?? props.run.traces.at(-1)?.id;
  if (!id) {
    return (
      <>
        <Title>Evidence</Title>
        <Empty title="Nothing has been traced in this run yet.">
          {provider.live ? <p><a class="button" href={address(["ask"])}>Ask a question</a></p> : <Command line="headwater trace RUN --prompt “…”" />}
        </Empty>
      </>
    );
  }
  return <OneTrace key={id} id={id} all={props.run.traces} at={Math.max(Number(query.a ?? 1) || 1, 1)} />;
}

function OneTrace(props: { id: string; all: RunOverview["traces"]; at: number }) {
  const loaded = useLoad(() => readTrace(props.id), [props.id]);
  return (
    <>
      {loaded.state !== "ready" && <Title>Where the answer came from</Title>}
      <Await of={loaded} lines={9}>{(trace) => <Shown trace={trace} all={props.all} at={Math.min(props.at, trace.answers.length)} />}</Await>
    </>
  );
}

function Shown(props: { trace: Trace; all: RunOverview["traces"]; at: number }) {
  const { trace, all, at } = props;
  const answer = trace.answers[at - 1];
  const several = trace.answers.length > 1;
  useEffect(() => void (lastTrace = trace.id), [trace.id]);
  return (
    <>
      <Title>{several ? "Where these answers came from" : "Where this answer came from"}</Title>
      {trace.headlines.length > 0 && (
        <dl class="headlines">{trace.headlines.map(([label, value]) => <div key={label}><dt>{label}</dt><dd>{value}</dd></div>)}</dl>
      )}
      <div class="toolbar">
        {all.length > 1 && <Choice label="Trace" value={trace.id} onChange={(id) => go(["evidence", id])} options={all.map((t) => [t.id, t.name] as const)} />}
        {provider.live && run.value?.has.finetuned && trace.answers.length > 0 && (
          <button type="button" class="quiet" onClick={() => void attempt(async () => {
            await start({ kind: "verify", trace: trace.id, top: 10 });
            go(["verify"]);
          })}>Verify: train again without the top 10</button>
        )}
        <button type="button" class="quiet" onClick={() => window.print()}>Print</button>
      </div>
      {several && (
        <nav class="answers" aria-label="Answers">
          <ol>
            {trace.answers.map((a, i) => (
              <li key={a.query_id}>
                <a href={address(["evidence", trace.id], { a: i + 1 })} aria-current={i + 1 === at ? "true" : undefined}>
                  <span class="n num">{i + 1}</span><span class="q" dir="auto">{a.label}<b>{a.brief}</b></span>
                </a>
              </li>
            ))}
          </ol>
        </nav>
      )}
      <Guide />
      {answer && (
        <div class="answer">
          <h2 class="eyebrow"><span>{several ? `Answer ${at} of ${trace.answers.length}` : "The answer"}</span><span class="chip">{answer.query_id}</span></h2>
          <AnswerView key={answer.query_id} answer={answer} columns={trace.columns} />
        </div>
      )}
      <Facts of={trace.facts} title="How this was found" />
    </>
  );
}

/** The id of the trace that was looked at last: what a verification asks again. */
export let lastTrace: string | null = null;

export function Guide() {
  return (
    <section class="guide" aria-label="How to read this">
      <div class="legend">
        <div><Bar at={74} span={{ x: 62, width: 25 }} band={{ x: 41, width: 18 }} /><span>score, its 95 % interval, and in grey the range of 95 % of held-out examples</span></div>
        <div>
          <span class="swatches">{[4, 3, 2, 1].map((n) => <span key={n} class={`d${n}`} />)}{[1, 2, 3, 4].map((n) => <span key={n} class={`u${n}`} />)}</span>
          <span>tokens that lowered <span class="down">(orange, dotted)</span> or raised it <span class="up">(blue, solid)</span></span>
        </div>
      </div>
      <details>
        <summary>How to read this</summary>
        <div class="prose">
          <p><b>Score.</b> The predicted change of what was measured (here usually the completion’s log-probability, in nats) if the example were added once more to the training data. +0.1 nats make the completion about 10 % more likely; −0.1 make it about 10 % less likely.</p>
          <p><b>Interval.</b> Where the score would lie, 19 times out of 20, had the random parts of the computation been drawn again. It does not include the error of the approximation itself.</p>
          <p><b>p.</b> How often examples that the model never trained on reach a score this far from zero. Among ten thousand examples ten reach p ≤ 0.001 by chance alone, so a small p counts for most in the first ranks.</p>
          <p><b>Tokens.</b> Colour shows which tokens of an example carried its score, on one scale for the whole answer; point at one to see its number. Tokens of the completion are shaded where the model found them unlikely: below 1/2, 1/10 and 1/100.</p>
          <p><b>Marks.</b> Remove, duplicate, weight and keep collect examples in a change set, which can be exported and verified by training again.</p>
          <p><b>Limits.</b> Scores follow a linear approximation around the trained model. They say what a small change of the data would do, not what the model copied, and not whether a text is true. Many examples with small scores can matter more together than the ones listed: see the totals by source.</p>
        </div>
      </details>
    </section>
  );
}
