/** A stretch of text that can be selected: its letters and the white space before them. */
export type Word = { text: string; start: number; stop: number };

const NAMES: Record<number, string> = { 0: "NUL", 7: "BEL", 8: "BS", 27: "ESC", 127: "DEL", 0x202e: "RLO", 0x202d: "LRO", 0xfeff: "BOM" };

/** Text with characters that steer or cannot be seen shown as placeholders, for text typed or streamed here. */
export function visible(text: string): string {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g, (found) => {
    const code = found.charCodeAt(0);
    return `⟨${NAMES[code] ?? `U+${code.toString(16).toUpperCase().padStart(4, "0")}`}⟩`;
  });
}

/** The words of a text, by the rules of its script, each with the white space and marks that lead it. */
export function words(text: string): Word[] {
  const found: Word[] = [];
  const cut = new Intl.Segmenter(undefined, { granularity: "word" });
  let start = 0;
  for (const { segment, index } of cut.segment(text)) {
    if (/^\s+$/.test(segment)) continue; // belongs to the word it leads
    const stop = index + segment.length;
    found.push({ text: text.slice(start, stop), start, stop });
    start = stop;
  }
  const last = found.at(-1);
  if (last && start < text.length) {
    last.text += text.slice(start);
    last.stop = text.length;
  }
  return found;
}

/** Positions counted in UTF-16 units as positions counted in characters, which is how the server counts. */
export function inCharacters(text: string, units: [number, number]): [number, number] {
  return [[...text.slice(0, units[0])].length, [...text.slice(0, units[1])].length];
}

/** The reverse of `inCharacters`. */
export function inUnits(text: string, characters: [number, number]): [number, number] {
  const all = [...text];
  return [all.slice(0, characters[0]).join("").length, all.slice(0, characters[1]).join("").length];
}

/** A number with a true minus sign, in few digits. */
export function figure(value: number | null | undefined, digits = 3): string {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en-US").replace("-", "−");
  const size = Math.abs(value);
  const shown = size !== 0 && (size >= 1e6 || size < 1e-4) ? value.toExponential(digits - 1) : Number(value.toPrecision(digits)).toString();
  return shown.replace("-", "−");
}

/** Decimals that give a number three significant digits. */
export function decimals(size: number): number {
  return size > 0 ? Math.min(Math.max(2 - Math.floor(Math.log10(size)), 0), 8) : 2;
}

/** A number with a set number of decimals, so that a column lines up. */
export function fixed(value: number | null | undefined, digits: number): string {
  return value === null || value === undefined || !Number.isFinite(value) ? "–" : value.toFixed(digits).replace("-", "−");
}

export function signed(value: number | null | undefined, digits = 3): string {
  return value !== null && value !== undefined && value > 0 ? `+${figure(value, digits)}` : figure(value, digits);
}

export function count(n: number, one: string, many = `${one}s`): string {
  return `${n.toLocaleString("en-US")} ${n === 1 ? one : many}`;
}

export function duration(seconds: number): string {
  if (seconds < 60) return `${figure(seconds, 2)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}
