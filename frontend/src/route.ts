import { signal } from "@preact/signals";

/** Where the page is: the part of the address after the hash, in pieces, and what follows its question mark. */
export type Route = { path: string[]; query: Record<string, string> };

export function parsed(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?");
  return {
    path: path.split("/").filter(Boolean).map(decoded),
    query: Object.fromEntries(new URLSearchParams(query)),
  };
}

export function address(path: string[], query: Record<string, string | number | undefined> = {}): string {
  const given = Object.entries(query).filter(([, value]) => value !== undefined && value !== "");
  const asked = new URLSearchParams(given.map(([name, value]) => [name, String(value)])).toString();
  return `#/${path.map(encodeURIComponent).join("/")}${asked ? `?${asked}` : ""}`;
}

function decoded(piece: string): string {
  try {
    return decodeURIComponent(piece);
  } catch {
    return piece;
  }
}

export const route = signal<Route>(parsed(location.hash));

export function go(path: string[], query: Record<string, string | number | undefined> = {}): void {
  location.hash = address(path, query);
}

/** Change the address without a step in the history. */
export function turn(path: string[], query: Record<string, string | number | undefined> = {}): void {
  history.replaceState(null, "", address(path, query));
  route.value = parsed(location.hash);
}

export function watchRoute(): void {
  addEventListener("hashchange", () => (route.value = parsed(location.hash)));
}
