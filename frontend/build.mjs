// Bundles the page into headwater/report/static, with a digest of what it was made from and the
// licenses of what is in it.
import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = join(here, "../headwater/report/static");
const LOOK = "../headwater/report/templates/style.css.j2"; // the look of the page without scripts, shared
const LIMIT = 1024 * 1024;

const sources = [...["build.mjs", "index.html", "package.json", "package-lock.json", "tsconfig.json", LOOK], ...files("src")].sort();
const digest = createHash("sha256");
for (const name of sources) digest.update(`${name}\0`).update(readFileSync(join(here, name))).update("\0");
const made = `/* Headwater's evidence page. Sources: frontend, sha256 ${digest.digest("hex")}. */`;
const licensed = licenses(); // stands in the script too, as an exported file holds nothing else
if (licensed.includes("*/")) throw new Error("a license ends the comment it stands in");

mkdirSync(out, { recursive: true });
await build({
  absWorkingDir: here,
  entryPoints: ["src/main.tsx"],
  outfile: join(out, "app.js"),
  bundle: true,
  minify: true,
  format: "iife",
  target: ["es2022"],
  jsx: "automatic",
  jsxImportSource: "preact",
  charset: "ascii",
  legalComments: "none",
  banner: { js: `${made}\n/*\n${licensed}*/` },
  define: { "process.env.NODE_ENV": '"production"' },
});
const look = readFileSync(join(here, LOOK), "utf8") + readFileSync(join(here, "src/app.css"), "utf8");
await build({
  stdin: { contents: look, loader: "css", resolveDir: here },
  outfile: join(out, "app.css"),
  minify: true,
  target: ["chrome111", "firefox113", "safari16.4"],
  charset: "utf8",
  legalComments: "none",
  banner: { css: made },
});
copyFileSync(join(here, "index.html"), join(out, "index.html"));
writeFileSync(join(out, "LICENSES.txt"), licensed);

let total = 0;
for (const name of ["app.js", "app.css", "index.html", "LICENSES.txt"]) {
  const content = readFileSync(join(out, name), "utf8");
  if (name.startsWith("app.") && /<\/(script|style)/i.test(content)) throw new Error(`${name} cannot stand in a page: it holds an end tag`);
  total += statSync(join(out, name)).size;
  console.log(`${name} ${statSync(join(out, name)).size.toLocaleString("en-US")} bytes`);
}
if (total > LIMIT) throw new Error(`the page is larger than ${LIMIT} bytes`);

function files(folder) {
  return readdirSync(join(here, folder), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(here, join(entry.parentPath ?? entry.path, entry.name)).replaceAll("\\", "/"));
}

/** The licenses of all packages that the page may hold. */
function licenses() {
  const { packages } = JSON.parse(readFileSync(join(here, "package-lock.json"), "utf8"));
  const kept = Object.entries(packages).filter(([path, about]) => path && !about.dev);
  const parts = kept.map(([path, about]) => {
    const folder = join(here, path);
    const file = readdirSync(folder).find((name) => /^licen[cs]e/i.test(name));
    if (!file) throw new Error(`${path} has no license file`);
    const name = path.replace(/^.*node_modules\//, "");
    return `${name} ${about.version} (${about.license})\n\n${readFileSync(join(folder, file), "utf8").trim()}\n`;
  });
  return ["The evidence page holds parts of these packages.\n", ...parts].join(`\n${"=".repeat(80)}\n\n`);
}
