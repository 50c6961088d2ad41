/** A message of a stream of server-sent events. */
export type Message = { event: string; data: string };

/** Messages out of a stream of bytes, however it is cut into pieces. */
export async function* messages(body: ReadableStream<Uint8Array>): AsyncGenerator<Message> {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let left = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      left += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const blocks = left.split(/\r?\n\r?\n/);
      left = blocks.pop() ?? "";
      for (const block of blocks) {
        const message = parsed(block);
        if (message) yield message;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => undefined);
  }
}

function parsed(block: string): Message | null {
  let event = "message";
  const data: string[] = [];
  for (const line of block.split(/\r?\n/)) {
    const colon = line.indexOf(":");
    if (colon === 0) continue; // a comment, which keeps the connection awake
    const field = colon < 0 ? line : line.slice(0, colon);
    const value = colon < 0 ? "" : line.slice(colon + 1).replace(/^ /, "");
    if (field === "event") event = value;
    else if (field === "data") data.push(value);
  }
  return data.length ? { event, data: data.join("\n") } : null;
}
