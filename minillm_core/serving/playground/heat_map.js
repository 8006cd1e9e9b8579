/** The heat map of a comparison: one row per layer, one column per stage, a colour and a number in every cell. */

import { make } from "./dom.js";
import { setUpRoving } from "./roving.js";

const STEPS = [
  { below: 1e-9, name: "under 1e-9" },
  { below: 1e-6, name: "under 1e-6" },
  { below: 1e-3, name: "under 1e-3" },
  { below: 1e-1, name: "under 0.1" },
  { below: Infinity, name: "0.1 and more" },
];

/** The map, its legend, and a line that says in words what the chosen cell is. */
export function heatMap(result) {
  const readout = make("p", "readout", { textContent: "Choose a cell to read its number." });
  const rows = [];
  const body = make("tbody");
  for (const layer of result.layers) {
    const alone = layer.cells.length === 1;
    const cells = layer.cells.map((cell, i) => cellOf(result, layer, cell, alone ? "" : result.stages[i]));
    if (alone) cells[0].colSpan = result.stages.length;
    rows.push(cells);
    body.append(make("tr", "", {}, make("th", "", { scope: "row", textContent: layer.name }), ...cells));
  }
  rows[0][0].tabIndex = 0;
  const names = ["layer", ...result.stages].map((name) => make("th", "", { scope: "col", textContent: name }));
  const head = make("thead", "", {}, make("tr", "", {}, ...names));
  const label = "Largest error over largest value, by layer and stage. The arrow keys move between cells.";
  const table = make("table", "heat", { role: "grid", "aria-label": label }, head, body);
  setUpRoving(table, "td", () => rows);
  const tell = ({ target }) => target.matches("td") && (readout.textContent = target.title);
  table.addEventListener("focusin", tell);
  table.addEventListener("pointerover", tell);
  return make("div", "map", {}, make("div", "scroll", {}, table), readout, legend(result.bound));
}

function cellOf(result, layer, { stage, error }, column) {
  const first = stage === result.first_divergence?.stage;
  const agrees = error !== null && error <= result.bound;
  const step = error === null ? "none" : agrees ? "agrees" : STEPS.findIndex(({ below }) => error < below);
  const size = error === null ? "not finite" : error.toExponential(1);
  const note = agrees ? ", agrees" : first ? ", the first stage that differs" : "";
  const words = [[layer.name, column].filter(Boolean).join(", "), `error ${size}${note}`];
  const text = error === null ? "NaN" : error === 0 ? "0" : error.toExponential(0);
  const cell = make("td", `heat-${step}`, { tabIndex: -1, title: `${words.join(": ")} (${stage})` });
  cell.append(first ? make("span", "first", { textContent: "▸" }) : "", text);
  if (first) cell.classList.add("is-first");
  return cell;
}

function legend(bound) {
  const entry = (step, name) => make("li", "", {}, make("span", `swatch heat-${step}`), name);
  const entries = [entry("agrees", `agrees (${bound.toExponential(0)} or less)`)];
  entries.push(...STEPS.map(({ name }, i) => entry(i, name)), entry("none", "not finite"));
  return make("ul", "legend", { "aria-label": "Colours" }, ...entries, make("li", "", { textContent: "▸ first difference" }));
}
