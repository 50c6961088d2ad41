import assert from "node:assert/strict";
import { test } from "node:test";
import { changeFile } from "../src/changefile";
import { arranged } from "../src/embedded";
import type { CorpusRow } from "../src/types";

const row = (number: number, more: Partial<CorpusRow> = {}): CorpusRow => ({
  number, id: `e${number}`, title: `title ${number}`, excerpt: "", source: null, length: null, loss: null, self_influence: null, outlier: null, cluster: null, n_copies: 1, ...more,
});
const QUERY = { offset: 0, limit: 200, sort: "number", descending: false, source: "", search: "" } as const;

test("a change set is exported as the training loop reads it", () => {
  const file = changeFile({
    name: "less of it",
    changes: [
      { id: "a", number: 0, action: "remove" },
      { id: "b", number: 1, action: "duplicate" },
      { id: "c", number: 2, action: "upweight", weight: 0.5 },
      { id: "d", number: null, action: "keep" },
      { id: "e", number: 4, action: "relabel", label: "3" },
    ],
  });
  assert.deepEqual(file, { name: "less of it", remove: ["a"], relabel: { e: 3 }, keep: ["d"], weights: { b: 2, c: 0.5 } });
});

test("rows are sorted either way, and rows without the value come last both times", () => {
  const rows = [row(0), row(1, { loss: 2 }), row(2, { loss: 1 }), row(3, { loss: 2 })];
  const order = (descending: boolean) => arranged(rows, { ...QUERY, sort: "loss", descending }).map((r) => r.number);
  assert.deepEqual(order(false), [2, 1, 3, 0]);
  assert.deepEqual(order(true), [1, 3, 2, 0]);
});

test("rows are found by source and by text, without regard to case", () => {
  const rows = [row(0, { source: "x", title: "Amsterdam" }), row(1, { source: "y", excerpt: "near AMSTERDAM" }), row(2, { source: "x" })];
  assert.deepEqual(arranged(rows, { ...QUERY, search: "amsterdam" }).map((r) => r.number), [0, 1]);
  assert.deepEqual(arranged(rows, { ...QUERY, search: "amsterdam", source: "y" }).map((r) => r.number), [1]);
});
