import assert from "node:assert/strict";
import { test } from "node:test";
import { messages, type Message } from "../src/events";

const STREAM = 'event: job\ndata: {"a":1}\n\n: still there\n\nevent: token\r\ndata: "é👍"\r\n\r\ndata: x\ndata: y\n\n';
const EXPECTED: Message[] = [{ event: "job", data: '{"a":1}' }, { event: "token", data: '"é👍"' }, { event: "message", data: "x\ny" }];

test("messages are the same however the bytes are cut", async () => {
  const bytes = new TextEncoder().encode(STREAM);
  for (const size of [1, 2, 3, 7, bytes.length]) {
    const body = new ReadableStream<Uint8Array>({
      start(controller) {
        for (let i = 0; i < bytes.length; i += size) controller.enqueue(bytes.slice(i, i + size));
        controller.close();
      },
    });
    const found: Message[] = [];
    for await (const message of messages(body)) found.push(message);
    assert.deepEqual(found, EXPECTED);
  }
});
