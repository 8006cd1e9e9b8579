/** The tab "Break it": plants a fault on the server, and shows what the doctor finds. */

import { getJson, postJson } from "./api.js";
import { bar, byId, isSend, make, showAlert, titleOf, visible } from "./dom.js";
import { clearErrors, showError } from "./fields.js";
import { heatMap } from "./heat_map.js";

const form = byId("break-form");
const status = byId("break-status");
const alertPlace = byId("break-alert");
let faults = [];
let working = false;

/** Asks the server for the faults of the model, and fills the form. */
async function loadFaults() {
  showAlert(alertPlace, "");
  status.textContent = "Opening the checkpoint";
  try {
    const listed = await getJson("/playground/faults");
    faults = listed.faults;
    fill(listed.sides);
    status.textContent = "Choose a fault.";
  } catch (error) {
    status.textContent = "";
    showAlert(alertPlace, error.message, loadFaults);
  }
}

/** The faults are loaded when the tab is opened for the first time: the server opens the checkpoint for it. */
export function setUpBreak() {
  byId("panel-break").addEventListener("opened", loadFaults, { once: true });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    breakIt();
  });
  byId("fault").addEventListener("change", showForms);
  document.addEventListener("keydown", (event) => {
    if (byId("panel-break").hidden || !isSend(event)) return;
    event.preventDefault();
    breakIt();
  });
}

function fill(sides) {
  const options = faults.map(({ name }) => make("option", "", { value: name, textContent: name }));
  byId("fault").replaceChildren(...options);
  const radios = sides.map((side, i) => {
    const input = make("input", "", { type: "radio", name: "side", value: side, checked: i === sides.length - 1 });
    return make("label", "", {}, input, titleOf(side));
  });
  byId("sides").replaceChildren(...radios);
  for (const id of ["fault", "form", "break"]) byId(id).disabled = false;
  showForms();
}

function showForms() {
  const fault = faults.find(({ name }) => name === byId("fault").value);
  const forms = fault.forms ?? [fault.says];
  const options = forms.map((says, i) => make("option", "", { value: i, textContent: says }));
  byId("form").replaceChildren(...options);
}

async function breakIt() {
  if (working || byId("break").disabled) return;
  clearErrors(form);
  showAlert(alertPlace, "");
  const { fault, form: which, side, text } = form.elements;
  const body = { fault: fault.value, form: Number(which.value), side: side.value, text: text.value || null };
  setWorking(true);
  status.textContent = "Planting the fault and running the doctor";
  try {
    const result = await postJson("/playground/break", body);
    status.textContent = result.named ? `The doctor found it: ${result.fault}.` : "The doctor did not name the fault.";
    byId("break-result").replaceChildren(...show(result));
  } catch (error) {
    status.textContent = "";
    const beside = error.param && showError(form, error.param, error.message);
    if (!beside) showAlert(alertPlace, error.message, error.status === 0 ? breakIt : null);
  } finally {
    setWorking(false);
  }
}

function setWorking(is) {
  working = is;
  form.classList.toggle("running", is);
  byId("break").setAttribute("aria-disabled", is);
  byId("break-result").setAttribute("aria-busy", is);
}

function show(result) {
  const sides = { right: titleOf(result.right_side), broken: titleOf(result.side) };
  const mapTitle = make("h2", "", { textContent: "Where they differ" });
  const map = make("section", "card", {}, mapTitle, heatMap(result));
  const report = make("details", "card report", {}, make("summary", "", { textContent: "The doctor's report as text" }));
  const label = "The doctor's report";
  report.append(make("pre", "", { textContent: result.report, tabIndex: 0, role: "region", "aria-label": label }));
  return [make("div", "diagnosis", {}, map, diagnosis(result, sides)), ...texts(result, sides), report];
}

/** The verdict, and the findings as a list. */
function diagnosis(result, sides) {
  const card = make("section", "card", {}, make("h2", "", { textContent: "What the doctor says" }));
  const [equal, tolerance] = result.verdict.split(/ (?=within)/);
  const words = [make("strong", "", { textContent: equal }), make("small", "", { textContent: tolerance ?? "" })];
  card.append(make("p", `verdict ${result.equal ? "good" : "bad"}`, {}, ...words));
  const named = result.named ? `✓ The doctor names the planted fault: ${result.fault}.` : "✗ The doctor does not name the fault.";
  card.append(make("p", `named ${result.named ? "good" : "bad"}`, { textContent: named }));
  card.append(make("p", "", { textContent: `Planted in ${sides.broken}: ${result.says}.` }));
  const first = result.first_divergence;
  if (first) {
    const size = first.error === null ? "not finite" : first.error.toExponential(1);
    card.append(make("p", "", {}, "First difference: ", make("code", "", { textContent: first.stage }), ` (${size}).`));
  }
  const findings = make("ol", "findings");
  for (const finding of result.findings) {
    const name = make("code", "tag", { textContent: finding.fault });
    const says = make("p", "", {}, name, ` ${place(finding, sides)}: ${finding.says}`);
    findings.append(make("li", "", {}, says, make("p", "hint", { textContent: finding.evidence })));
  }
  card.append(result.findings.length ? findings : make("p", "", { textContent: "No findings." }));
  const who = `A is the right model in ${sides.right}. B is the broken one, ${result.why}.`;
  card.append(make("p", "hint", { textContent: who }));
  return card;
}

function place(finding, sides) {
  const subject = finding.subject === "A" ? sides.right : sides.broken;
  return `${finding.place} of ${subject}`;
}

/** What both models make of the text: loss, next token, continuation. */
function texts(result, sides) {
  const card = make("section", "card", {}, make("h2", "", { textContent: "What it does to the text" }));
  if (result.text) card.append(make("blockquote", "given", { textContent: result.text }));
  const columns = make("div", "columns");
  for (const name of ["right", "broken"]) {
    const loss = result.loss[name] === null ? "not finite" : `${result.loss[name].toFixed(3)} nats per token`;
    const title = make("h3", "", { textContent: `${name === "right" ? "Right" : "Broken"} (${sides[name]})` });
    const column = make("div", "column", {}, title, make("p", "", {}, "Loss ", make("strong", "", { textContent: loss })));
    if (result.next) {
      column.append(make("p", "caption", { textContent: "Most likely next tokens" }));
      const bars = result.next[name].map(({ text, logprob }) => bar(visible(text), logprob ?? -Infinity));
      column.append(make("ol", "bars", {}, ...bars));
    }
    if (result.sample) {
      column.append(make("p", "caption", { textContent: "Goes on with (always the most likely token)" }));
      column.append(make("blockquote", "", { textContent: result.sample[name] }));
    }
    columns.append(column);
  }
  card.append(columns);
  return [card];
}
