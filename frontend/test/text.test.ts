import assert from "node:assert/strict";
import { test } from "node:test";
import { decimals, figure, fixed, inCharacters, inUnits, signed, visible, words } from "../src/text";

test("words put together are the text, whatever the script", () => {
  for (const text of [" It is the  largest city.", "阿姆斯特丹是荷兰的首都。", "\n\n a\u00a0b ", "עִבְרִית ok", "👩‍👩‍👧 family", ""]) {
    const found = words(text);
    assert.equal(found.map((w) => w.text).join(""), text);
    for (const w of found) assert.equal(text.slice(w.start, w.stop), w.text);
  }
  assert.ok(words("阿姆斯特丹是荷兰的首都。").length > 2);
});

test("only white space has no words", () => assert.deepEqual(words("  \n"), []));

test("positions are counted in characters, of which an emoji is one", () => {
  assert.deepEqual(inCharacters("a👍b", [3, 4]), [2, 3]);
  assert.deepEqual(inCharacters("abc", [1, 2]), [1, 2]);
  assert.deepEqual(inUnits("a👍b", [2, 3]), [3, 4]);
});

test("characters that steer are shown by name", () => {
  assert.equal(visible("a\u202eb\u0000c\u0085\n"), "a⟨RLO⟩b⟨NUL⟩c⟨U+0085⟩\n");
});

test("numbers have true minus signs and few digits", () => {
  assert.equal(figure(-0.123456), "−0.123");
  assert.equal(figure(100000), "100,000");
  assert.equal(figure(null), "–");
  assert.equal(figure(Number.NaN), "–");
  assert.equal(signed(0.5), "+0.5");
  assert.equal(fixed(-2, 2), "−2.00");
  assert.equal(decimals(12.5), 1);
});
