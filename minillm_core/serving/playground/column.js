/** One model's text: every token is an element that shows its details. */

import { make, titleOf, visible } from "./dom.js";
import { setUpRoving } from "./roving.js";

const DOUBTS = [0.7, 1.6, 3, 5];
/** In nats: a token that is this unlikely gets the next colour. */

export class Column {
  constructor(model, details) {
    this.model = model;
    this.title = titleOf(model.framework);
    this.tokens = [];
    this.rate = null;
    this.done = null;
    this.prompt = make("span", "prompt");
    this.text = make("div", "text", { role: "group", "aria-label": `Text of ${this.title}` }, this.prompt);
    this.end = make("p", "end");
    const heading = make("h2", "", { id: `title-${model.id}`, textContent: this.title });
    const device = make("span", "device", { textContent: model.device ?? "" });
    heading.append(device);
    this.element = make("section", "column", { "aria-labelledby": heading.id }, heading, this.text, this.end);
    this.element.dataset.framework = model.framework;
    setUpRoving(this.text, ".token");
    const show = ({ target }) => target.matches(".token") && details.show(this, Number(target.dataset.index));
    this.text.addEventListener("pointerover", show);
    this.text.addEventListener("focusin", show);
    this.text.addEventListener("click", ({ target }) => target.matches(".token") && target.focus());
    this.text.addEventListener("focusout", () => details.hide());
  }

  /** Forgets the old text. */
  begin(prompt) {
    this.tokens = [];
    this.rate = this.done = null;
    this.prompt.textContent = prompt;
    this.text.replaceChildren(this.prompt);
    this.end.textContent = "";
    this.element.classList.add("writing");
  }

  /** Adds the token of an event. */
  add(event) {
    const doubt = DOUBTS.filter((bound) => -event.logprob > bound).length;
    const properties = { role: "button", tabIndex: this.tokens.length ? -1 : 0, textContent: event.text };
    const token = make("span", `token d${doubt}`, properties);
    token.dataset.index = this.tokens.length;
    if (!event.text.trim()) {
      token.setAttribute("aria-label", event.text === "" ? "part of a character" : `white space ${visible(event.text)}`);
      token.dataset.mark = event.text === "" ? "·" : event.text.replaceAll(/[^\n]/g, "").replaceAll("\n", "↵");
    }
    this.tokens.push(event);
    this.rate = event.tokens_per_second;
    this.text.append(token);
  }

  /** The model has ended: "stop" or "length". */
  finish(reason) {
    this.done = reason;
    this.element.classList.remove("writing");
    if (reason === "stop") this.end.textContent = "The text is at its end.";
    if (reason === "length") this.end.textContent = "As many tokens as allowed.";
    if (reason === "stopped") this.end.textContent = "Stopped.";
  }

  /** The element of a token. */
  at(index) {
    return this.text.children[index + 1] ?? null;
  }

  /** Marks the first token that differs. */
  mark(index) {
    const token = this.at(index);
    token?.classList.add("differs");
    token?.setAttribute("aria-label", `${visible(this.tokens[index].text)}, the first token that differs`);
  }
}
