/** The tab "Generate": a prompt and options go to the server, tokens come back one by one. */

import { postStream } from "./api.js";
import { Column } from "./column.js";
import { byId, isSend, showAlert } from "./dom.js";
import { count, Facts } from "./facts.js";
import { clearErrors, readOptions, setDefaults, showError } from "./fields.js";
import { TokenDetails } from "./token_details.js";

const form = byId("generate-form");
const status = byId("generate-status");
const alertPlace = byId("generate-alert");
const details = new TokenDetails(byId("token-details"), () => columns);

let columns = [];
let facts = null;
/** Stops the running request; null if none runs. */
let running = null;

/** Prepares the tab for the models of the server. */
export function setUpGenerate({ models, defaults }) {
  setDefaults(form, defaults);
  columns = models.map((model) => new Column(model, details));
  byId("columns").replaceChildren(...columns.map((column) => column.element));
  facts = new Facts(byId("facts"), columns);
  byId("generate").disabled = false;
  say(models.length > 1 ? "Both sides continue the same prompt." : "The model continues the prompt.");
}

export function setUpGenerateControls() {
  if (matchMedia("(max-width: 59.99rem)").matches) byId("options").open = false;
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  byId("stop-button").addEventListener("click", stop);
  byId("tint").addEventListener("change", ({ target }) => byId("columns").classList.toggle("tinted", target.checked));
  document.addEventListener("keydown", (event) => {
    if (byId("panel-generate").hidden) return;
    if (isSend(event) && !byId("generate").disabled) {
      event.preventDefault();
      generate();
    }
    if (event.key === "Escape") {
      details.hide();
      stop();
    }
  });
}

function stop() {
  running?.abort();
}

async function generate() {
  running?.abort();
  showAlert(alertPlace, "");
  const body = readOptions(form);
  if (!body) return;
  const request = new AbortController();
  setRunning(request);
  details.hide();
  for (const column of columns) column.begin(body.prompt);
  facts.begin();
  say("Generating");
  try {
    for await (const event of postStream("/playground/generate", body, request.signal)) handle(event);
    const missing = columns.find((column) => !column.done);
    if (missing) throw new Error(`The server stopped before the text of ${missing.title} was complete.`);
    say(summary());
  } catch (error) {
    if (running !== request) return; // a new request has begun
    if (request.signal.aborted) say(`Stopped. ${summary()}`);
    else fail(error);
  } finally {
    if (running === request) {
      for (const column of columns) if (!column.done) column.finish("stopped");
      facts.update();
      setRunning(null);
    }
  }
}

function handle(event) {
  const column = columns.find(({ model }) => model.id === event.model);
  if (event.type === "token") column?.add(event);
  if (event.type === "done") column?.finish(event.finish_reason);
  if (event.type === "difference") facts.difference = event;
  if (event.type === "error") throw new Error(event.message);
  facts.update();
}

function fail(error) {
  say("");
  clearErrors(form);
  const [first] = error.message.split("\n");
  const beside = error.param && showError(form, error.param, error.message);
  if (!beside) showAlert(alertPlace, error.message, error.status === 0 ? generate : null);
  else say(`Not generated: ${first}`);
}

function summary() {
  const lengths = columns.map((column) => `${column.title}: ${count(column.tokens.length)}`).join(", ");
  return columns.length > 1 ? `${lengths}. Texts: ${facts.compare()}.` : `${lengths}.`;
}

function say(text) {
  status.textContent = text;
}

function setRunning(request) {
  running = request;
  byId("stop-button").setAttribute("aria-disabled", !request);
  form.classList.toggle("running", Boolean(request));
}
