/** Builds elements. Text is always set as text, never as HTML: it may come from a model. */

/** An element with a class, properties and children (elements or text). */
export function make(tag, className = "", properties = {}, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role" || name === "for") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Whether a key sends the form: Ctrl+Enter, or Cmd+Enter on a Mac. */
export const isSend = (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey);

/** Shows a message as an error, or hides the place if there is none. `retry` adds a button. */
export function showAlert(place, message, retry = null) {
  place.hidden = !message;
  place.replaceChildren();
  if (!message) return;
  place.append(make("p", "", { textContent: message }));
  if (retry) place.append(make("button", "", { type: "button", textContent: "Try again", onclick: retry }));
}

/** A probability in percent. */
export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share >= 10) return `${share.toFixed(1)} %`;
  return share >= 0.01 ? `${share.toPrecision(2)} %` : `${share.toExponential(0)} %`;
}

/** A text in which white space can be seen. */
export function visible(text) {
  if (text === "") return "(part of a character)";
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

/** A row with a name, a bar as long as the probability, and the probability. */
export function bar(name, logprob, className = "") {
  const track = make("span", "track", { "aria-hidden": "true" }, make("span", "fill"));
  track.firstChild.style.setProperty("--share", Math.exp(logprob));
  const label = make("span", "label", { textContent: name });
  return make("li", `bar ${className}`, {}, label, track, make("span", "value", { textContent: percent(logprob) }));
}

/** The name of a framework as its makers write it. */
export const titleOf = (framework) => ({ jax: "JAX", torch: "PyTorch" })[framework] ?? framework;
