import { useCallback, useEffect, useRef, useState } from "preact/hooks";
import { AnswerView } from "./answer";
import { Guide } from "./evidence";
import { JobView } from "./jobs";
import { address, route, turn } from "./route";
import { attempt, follow, jobs, provider, readRun, readTrace, start } from "./store";
import { inCharacters, inUnits, visible } from "./text";
import type { Job, RunOverview, Trace } from "./types";
import { Check, Choice, Command, Empty, Title } from "./ui";
import { chosenIn, spanOf, Words, type Chosen } from "./words";

export function AskPage(props: { run: RunOverview }) {
  return (
    <>
      <Title>Why did the model say this?</Title>
      <p class="standfirst">Give the model a prompt, choose what you wonder about in its answer, and trace it to the training examples that made it more or less likely.</p>
      {provider.live ? <Form run={props.run} /> : <Elsewhere />}
      <History run={props.run} />
    </>
  );
}

function Elsewhere() {
  return (
    <Empty title="This file shows saved results, without a model behind it.">
      <p>To ask something new, on the machine where the run lies:</p>
      <Command line="headwater serve RUN" />
    </Empty>
  );
}

/** Columns whose values name single examples: totals by them say nothing. */
const NAMING = /^(title|name|headline|subject|id|url)$/i;

function Form(props: { run: RunOverview }) {
  const [prompt, setPrompt] = useState("");
  const [completion, setCompletion] = useState("");
  const [writing, write] = useState(false);
  const [chosen, choose] = useState<Chosen>(null);
  const [rather, setRather] = useState("");
  const [source, setSource] = useState(props.run.columns.find((c) => !NAMING.test(c)) ?? "");
  const [depth, setDepth] = useState<"quick" | "thorough">(props.run.has.index ? "quick" : "thorough");
  const [top, setTop] = useState("8");
  const [compare, setCompare] = useState(true);
  const [chat, setChat] = useState(false);
  const [completing, setCompleting] = useState<string | null>(null);
  const [tracing, setTracing] = useState<string | null>(route.value.query.job ?? null);
  const streaming = completing ? jobs.value[completing] : undefined;
  const busy = streaming !== undefined && (streaming.job.state === "running" || streaming.job.state === "queued");
  const text = busy ? streaming.text : completion;
  const pick = useCallback((next: Chosen) => choose(next), []);
  const span = spanOf(completion, chosen);

  const asked = jobs.value[route.value.query.job ?? ""]?.job.asked;
  useEffect(() => {
    const id = route.value.query.job;
    if (!id) return;
    setTracing(id);
    if (asked) restore(asked);
  }, [route.value.query.job, asked !== undefined]);
  const restore = (asked: Job["asked"]) => {
    const said = written(asked.completion);
    setPrompt(written(asked.prompt));
    setCompletion(said);
    choose(Array.isArray(asked.span) ? chosenIn(said, inUnits(said, asked.span as [number, number])) : null);
    setChat(asked.chat === true);
    setRather(written(asked.rather_than));
    if (asked.kind !== "trace") return; // a timeline has no more options
    setSource(written(asked.source));
    setTop(String(asked.top));
    setDepth(asked.thorough === true || !props.run.has.index ? "thorough" : "quick");
    setCompare(asked.compare === true);
  };

  const complete = () => attempt(async () => {
    setCompletion("");
    choose(null);
    write(false);
    setTracing(null);
    const job = await start({ kind: "complete", prompt, max_new_tokens: 24, chat });
    setCompleting(job.id);
    const end = await follow(job);
    setCompletion(end.result?.completion ?? jobs.value[job.id]?.text ?? "");
    setCompleting(null);
    if (end.state === "failed") throw new Error(end.error ?? "The model could not complete the prompt.");
  });
  const trace = () => attempt(async () => {
    const job = await start({
      kind: "trace", prompt, completion, rather_than: rather.trim() ? rather : null, span: span && inCharacters(completion, span),
      chat, source: source.trim() || null, top: Number(top), thorough: depth === "thorough", compare, where: [],
    });
    setTracing(job.id);
    turn(["ask"], { job: job.id });
  });
  const learnt = () => attempt(async () => {
    const job = await start({ kind: "timeline", prompt, completion, span: span && inCharacters(completion, span), chat, segments: 3 });
    setTracing(job.id);
    turn(["ask"], { job: job.id });
  });

  return (
    <>
      <section class="ask" aria-label="Your question">
        <label class="field">
          <span>Prompt</span>
          <textarea name="prompt" rows={3} dir="auto" value={prompt} placeholder="Amsterdam is the capital and largest city of the" onInput={(event) => setPrompt(event.currentTarget.value)}
            onKeyDown={(event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && prompt && void complete()} />
        </label>
        <div class="buttons">
          <button type="button" class="primary" disabled={!prompt || busy} onClick={() => void complete()}>{busy ? "Completing…" : "Complete"}</button>
          <button type="button" class="quiet" aria-expanded={writing} onClick={() => write(!writing)}>{writing ? "Done writing" : completion ? "Edit the completion" : "Give a completion yourself"}</button>
          <Check label="as a chat" checked={chat} onChange={setChat} />
        </div>
        {writing && (
          <label class="field">
            <span>Completion</span>
            <textarea name="completion" rows={3} dir="auto" value={completion} onInput={(event) => { setCompletion(event.currentTarget.value); choose(null); }} />
          </label>
        )}
        {busy && <JobView job={streaming.job} />}
        {text && !writing && (
          <div class="chosen-text">
            <blockquote class="asked" dir="auto">
              <span class="prompt">{visible(prompt)}</span>
              <span class="completion">{busy ? <span class="streaming">{visible(text)}</span> : <Words text={text} chosen={chosen} choose={pick} />}</span>
            </blockquote>
            {!busy && (
              <p class="soft small" role="status">
                {span
                  ? <>Asking about <b dir="auto">“{visible(completion.slice(...span))}”</b>. <button type="button" class="link" onClick={() => choose(null)}>Ask about all of it</button></>
                  : "Asking about the whole completion. To ask about a part, drag over words, or press the arrow keys with Shift."}
              </p>
            )}
          </div>
        )}
        {completion && !busy && (
          <div class="how">
            <label class="field grow">
              <span>Rather than</span>
              <input name="rather" dir="auto" value={rather} placeholder="optional: why this and not …" onInput={(event) => setRather(event.currentTarget.value)} />
            </label>
            {props.run.columns.length > 0
              ? <Choice label="Totals by" value={source} onChange={setSource} options={[...including(props.run.columns, source).map((c) => [c, c] as const), ["", "nothing"]]} />
              : <label class="field"><span>Totals by</span><input name="source" value={source} placeholder="a column, if any" onInput={(event) => setSource(event.currentTarget.value)} /></label>}
            <Choice label="Examples a side" value={top} onChange={setTop} options={including(["8", "16", "32"], top).map((n) => [n, n] as const)} />
            <fieldset class="depth">
              <legend>Look at</legend>
              <label class="check"><input type="radio" name="depth" checked={depth === "quick"} disabled={!props.run.has.index} onChange={() => setDepth("quick")} /><span>the index first{!props.run.has.index && <small class="soft"> (this run has none)</small>}</span></label>
              <label class="check"><input type="radio" name="depth" checked={depth === "thorough"} onChange={() => setDepth("thorough")} /><span>every example</span></label>
            </fieldset>
            <Check label="compare with BM25 and embeddings" checked={compare} onChange={setCompare} />
            <div class="buttons">
              <button type="button" class="primary" onClick={() => void trace()}>Trace</button>
              {props.run.has.trajectory && <button type="button" onClick={() => void learnt()}>When was it learnt?</button>}
            </div>
          </div>
        )}
      </section>
      {tracing && <Tracing key={tracing} id={tracing} />}
    </>
  );
}

/** The choices there are, and one that was made elsewhere. */
function including(choices: string[], chosen: string): string[] {
  return !chosen || choices.includes(chosen) ? choices : [...choices, chosen];
}

function written(value: unknown): string {
  return typeof value === "string" ? value : "";
}

/** A trace while it runs, and what it has found so far; then what it found. */
function Tracing(props: { id: string }) {
  const followed = jobs.value[props.id];
  const name = followed?.job.state === "done" ? followed.job.result?.trace : undefined;
  const timeline = followed?.job.result?.timeline;
  const [trace, set] = useState<Trace | null>(null);
  useEffect(() => void (timeline && attempt(async () => void (await readRun()))), [timeline]);
  useEffect(() => {
    if (name) void attempt(async () => {
      set(await readTrace(name));
      await readRun();
    });
  }, [name]);
  const section = useRef<HTMLElement>(null);
  useEffect(() => section.current?.scrollIntoView({ block: "nearest" }), []);
  if (!followed) return null;
  const answers = trace?.answers ?? followed.answers;
  return (
    <section class="tracing" aria-label="The trace" ref={section}>
      <JobView job={followed.job} />
      {timeline && <p><a class="button" href={address(["timeline", timeline])}>See when it was learnt</a></p>}
      {answers.length > 0 && (
        <>
          <h2 class="eyebrow">
            <span>{trace ? "What was found" : "Found so far"}</span>
            {trace && <a href={address(["evidence", trace.id])}>its own page</a>}
          </h2>
          <Guide />
          {answers.map((answer) => <AnswerView key={answer.query_id} answer={answer} columns={trace?.columns ?? {}} partial={!trace} />)}
        </>
      )}
    </section>
  );
}

function History(props: { run: RunOverview }) {
  const asked = props.run.traces.flatMap((trace) => trace.asked.map((a, i) => ({ ...a, id: trace.id, name: trace.name, at: i + 1 }))).reverse();
  const running = Object.values(jobs.value).map((f) => f.job).filter((job): job is Job => (job.kind === "trace" || job.kind === "timeline") && job.state !== "done");
  if (!asked.length && !running.length) return null;
  return (
    <section class="history" aria-label="Asked before">
      <h2 class="h3">Asked before</h2>
      <nav class="answers" aria-label="Asked before">
        <ol>
          {running.map((job) => (
            <li key={job.id}><a href={address(["ask"], { job: job.id })}><span class="n">{job.state}</span><span class="q" dir="auto">{job.title}</span></a></li>
          ))}
          {asked.map((a) => (
            <li key={`${a.id}-${a.at}`}>
              <a href={address(["evidence", a.id], { a: a.at })}><span class="q" dir="auto">{a.prompt}<b>{a.completion}</b></span><span class="n">{a.name}</span></a>
            </li>
          ))}
        </ol>
      </nav>
    </section>
  );
}
