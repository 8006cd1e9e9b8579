/** The options of a request: their defaults, their values, and the errors beside them. */

import { make } from "./dom.js";

const WHOLE = ["max_tokens", "top_k", "seed"];
const NUMBERS = [...WHOLE, "temperature", "top_p", "min_p", "repetition_penalty"];

export function setDefaults(form, defaults) {
  for (const [name, value] of Object.entries(defaults)) {
    if (form.elements[name]) form.elements[name].value = value;
  }
}

/** The body of a request, or null if a field has no usable number: then its error is shown. */
export function readOptions(form) {
  clearErrors(form);
  const body = { prompt: form.elements.prompt.value, stop: stopTexts(form.elements.stop.value) };
  let complete = true;
  for (const name of NUMBERS) {
    const { value } = form.elements[name];
    const number = Number(value);
    const fits = value !== "" && (WHOLE.includes(name) ? Number.isSafeInteger(number) : Number.isFinite(number));
    if (!fits) showError(form, name, WHOLE.includes(name) ? "needs a whole number" : "needs a number");
    complete &&= fits;
    body[name] = number;
  }
  return complete ? body : null;
}

function stopTexts(lines) {
  return lines.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
}

/** Shows an error beside its field and moves there. False if the form has no such field. */
export function showError(form, name, message) {
  const input = form.elements[name];
  const field = input?.closest?.(".field");
  if (!field) return false;
  const place = make("p", "error", { id: `${input.id}-error`, role: "alert", textContent: message });
  field.append(place);
  field.closest("details")?.setAttribute("open", "");
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-describedby", place.id);
  if (!form.contains(document.activeElement) || !document.activeElement.matches("[aria-invalid]")) input.focus();
  return true;
}

export function clearErrors(form) {
  for (const place of form.querySelectorAll(".error")) place.remove();
  for (const input of form.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-describedby");
  }
}
