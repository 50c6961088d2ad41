import { lastTrace } from "./evidence";
import { go } from "./route";
import { attempt, canUndo, changes, clearMarks, drawer, nameChanges, opened, provider, run, said, start, titles, undo, unmark, wording } from "./store";
import { count, visible } from "./text";
import { Command } from "./ui";

/** The change set: what is marked, its name, and what to do with it. */
export function Drawer() {
  if (!drawer.value) return null;
  const { name, changes: list } = changes.value;
  const effective = list.filter((change) => change.action !== "keep").length;
  return (
    <aside class="drawer" id="drawer" aria-label="Change set">
      <div class="sheet-head">
        <h2>Change set</h2>
        <button type="button" class="quiet" onClick={() => (drawer.value = false)}>Close</button>
      </div>
      {list.length === 0 && (
        <p class="soft">Nothing is marked. Mark training examples with Remove, Duplicate, Weight or Keep; they are collected here, to be exported or verified.</p>
      )}
      {list.length > 0 && (
        <>
          <label class="field"><span>Name</span><input value={name} maxLength={80} onInput={(event) => nameChanges(event.currentTarget.value)} /></label>
          <ul class="changes">
            {list.map((change) => {
              const title = titles.get(change.id) ?? visible(change.id);
              return (
              <li key={change.id}>
                <button type="button" class="link" aria-haspopup="dialog" onClick={() => (opened.value = { id: change.id, number: change.number, title })} dir="auto">{title}</button>
                <span class={`tag ${change.action}`}>{wording(change)}</span>
                <button type="button" class="quiet" aria-label={`Take the mark off ${title}`} onClick={() => unmark(change.id)}>×</button>
              </li>
              );
            })}
          </ul>
        </>
      )}
      <div class="buttons">
        <button type="button" class="quiet" disabled={!canUndo.value} onClick={undo}>Undo</button>
        {list.length > 0 && <button type="button" class="quiet" onClick={clearMarks}>Take all off</button>}
      </div>
      {list.length > 0 && (
        <>
          <div class="buttons">
            <button type="button" class="primary" onClick={() => void attempt(download)}>Export</button>
            {provider.live && run.value?.has.finetuned && (
              <button type="button" disabled={effective === 0} onClick={() => void attempt(async () => {
                await start({ kind: "verify", trace: lastTrace ?? run.value?.traces.at(-1)?.id ?? null, changes: changes.value, seeds: 1 });
                go(["verify"]);
              })}>Verify</button>
            )}
          </div>
          <p class="small soft">
            {count(list.length, "example")} marked{effective < list.length && `, ${list.length - effective} of them to keep as they are`}. {run.value?.has.finetuned
              ? "Verify trains again with the change and with as many examples left out at random, and compares what was predicted with what happened. With the exported file:"
              : "A model that headwater finetune trained can be trained again with the change, and compared. With the exported file:"}
          </p>
          <Command line={`headwater verify RUN --name ${lastTrace ?? "TRACE"} --changes ${fileName()}`} />
          <Command line={`headwater finetune --changes ${fileName()} …`} />
        </>
      )}
    </aside>
  );
}

function fileName(): string {
  return `${changes.value.name.trim().replace(/[^\w.-]+/g, "-") || "changes"}.json`;
}

async function download(): Promise<void> {
  const address = URL.createObjectURL(await provider.exported(changes.value));
  const link = document.createElement("a");
  link.href = address;
  link.download = fileName();
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
  said.value = `Exported ${fileName()}.`;
}
