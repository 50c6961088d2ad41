import { useEffect, useRef, useState } from "preact/hooks";
import { AskPage } from "./ask";
import { CorpusPage } from "./corpus";
import { Drawer } from "./drawer";
import { EvidencePage } from "./evidence";
import { ExampleDialog } from "./example";
import { Keys, useKeys } from "./keys";
import { address, route } from "./route";
import { RunPage, TimelinePage } from "./runpage";
import { active, changes, connection, drawer, giveToken, provider, readChanges, readJobs, readRun, run, said, token, trouble } from "./store";
import type { RunOverview } from "./types";
import { Await, Command, Title, useLoad } from "./ui";
import { VerifyPage } from "./verify";

const PAGES: [string, string][] = [["ask", "Ask"], ["evidence", "Evidence"], ["verify", "Verify"], ["corpus", "Corpus"], ["run", "Run"]];

export function App() {
  const page = route.value.path[0] ?? (provider.live ? "ask" : "evidence");
  useKeys();
  const lost = provider.live && connection.value === "lost";
  useEffect(() => {
    if (!lost) return undefined;
    const timer = setInterval(() => void readRun().catch(() => undefined), 3000); // a request that succeeds ends it
    return () => clearInterval(timer);
  }, [lost]);
  return (
    <>
      <a class="skip" href="#main" onClick={(event) => { event.preventDefault(); document.getElementById("main")?.focus(); }}>Skip to the content</a>
      <Top page={page} />
      {lost && <p class="banner" role="alert">The server does not answer. What is here stays, and it is asked again every few seconds. Is <code>headwater serve</code> still running?</p>}
      {trouble.value && <p class="banner" role="alert">{trouble.value} <button type="button" class="link" onClick={() => (trouble.value = "")}>Dismiss</button></p>}
      <div class={`frame${drawer.value ? " with-drawer" : ""}`}>
        <main id="main" tabIndex={-1}>
          {provider.live && (!token.value || connection.value === "denied") ? <NoToken /> : <Pages page={page} />}
        </main>
        <Drawer />
      </div>
      <ExampleDialog />
      <Keys />
      <div class="sr" role="status" aria-live="polite">{said.value}</div>
    </>
  );
}

function Top(props: { page: string }) {
  const n = changes.value.changes.length;
  const working = active.value[0];
  return (
    <header class="top">
      <a class="brand" href={address([])}>
        <svg viewBox="0 0 24 24" fill="none" stroke="currentColor" stroke-width="2" stroke-linecap="round" aria-hidden="true" focusable="false"><path d="M4 3c0 5 8 5 8 11M12 3v18M20 3c0 5-8 5-8 11" /></svg>
        Headwater
      </a>
      <nav class="pages" aria-label="Pages">
        <ul>{PAGES.map(([path, name]) => <li key={path}><a href={address([path])} aria-current={props.page === path ? "page" : undefined}>{name}</a></li>)}</ul>
      </nav>
      {working && <a class="working" href={address([working.kind === "verify" ? "verify" : working.kind === "survey" ? "corpus" : "ask"], working.kind === "trace" || working.kind === "timeline" ? { job: working.id } : {})}><span class="pulse" />{working.state === "running" ? "working" : "waiting"}</a>}
      <button type="button" class="quiet changes-button" aria-expanded={drawer.value} aria-controls="drawer" onClick={() => (drawer.value = !drawer.value)}>Changes{n > 0 && <span class="count num">{n}</span>}</button>
    </header>
  );
}

function Pages(props: { page: string }) {
  const { page } = props;
  const loaded = useLoad(async () => {
    const found = await readRun();
    await readChanges();
    if (provider.live) await readJobs();
    return found;
  }, [token.value]);
  const first = useRef(true);
  useEffect(() => {
    const heading = document.querySelector<HTMLElement>("main h1");
    document.title = `${heading?.textContent ?? "Evidence"} · Headwater`;
    if (!first.current) {
      scrollTo(0, 0);
      heading?.focus({ preventScroll: true });
    }
    first.current = loaded.state !== "ready";
  }, [page, loaded.state]);
  return (
    <Await of={loaded} lines={8}>
      {(read) => <Page page={page} run={run.value ?? read} />}
    </Await>
  );
}

function Page(props: { page: string; run: RunOverview }) {
  if (props.page === "ask") return <AskPage run={props.run} />;
  if (props.page === "evidence") return <EvidencePage run={props.run} />;
  if (props.page === "verify") return <VerifyPage run={props.run} />;
  if (props.page === "corpus") return <CorpusPage run={props.run} />;
  if (props.page === "run") return <RunPage run={props.run} />;
  if (props.page === "timeline") return <TimelinePage run={props.run} />;
  return <><Title>There is no such page</Title><p><a href={address([])}>To the beginning</a></p></>;
}

function NoToken() {
  const [typed, set] = useState("");
  const submit = (event: Event) => {
    event.preventDefault();
    connection.value = "ok";
    giveToken(typed.trim().replace(/^.*token=/, ""));
  };
  return (
    <>
      <Title>This page needs its token</Title>
      <p class="standfirst">{connection.value === "denied" ? "The server does not know the token of this page; it makes a new one at every start." : "Only who started the server may ask it."} Open the address that this command printed, with all that follows the #, or paste it here.</p>
      <Command line="headwater serve RUN" />
      <form class="token" onSubmit={submit}>
        <label class="field grow"><span>Address or token</span><input value={typed} autocomplete="off" spellcheck={false} onInput={(event) => set(event.currentTarget.value)} /></label>
        <button type="submit" class="primary" disabled={!typed.trim()}>Open</button>
      </form>
    </>
  );
}
