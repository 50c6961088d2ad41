import type { ChangeSet } from "./types";

/** A change set in the form in which it lies on disk and the training loop reads it. */
export type ChangeFile = {
  name: string;
  remove: string[];
  relabel: Record<string, number>;
  keep: string[];
  weights: Record<string, number>;
};

export function changeFile(set: ChangeSet): ChangeFile {
  const file: ChangeFile = { name: set.name, remove: [], relabel: {}, keep: [], weights: {} };
  for (const change of set.changes) {
    if (change.action === "remove") file.remove.push(change.id);
    else if (change.action === "keep") file.keep.push(change.id);
    else if (change.action === "relabel") file.relabel[change.id] = Number(change.label ?? 0);
    else file.weights[change.id] = change.action === "duplicate" ? 2 : (change.weight ?? 2);
  }
  return file;
}
