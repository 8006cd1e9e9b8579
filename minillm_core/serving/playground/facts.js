/** The facts above the texts: speed, largest difference of logits, whether the texts are equal. */

import { make } from "./dom.js";

export class Facts {
  constructor(place, columns) {
    this.place = place;
    this.columns = columns;
    this.values = new Map();
    this.difference = null;
    this.differsFrom = null;
    place.replaceChildren();
    for (const column of columns) this.add(column.model.id, `${column.title}, tokens per second`);
    if (columns.length === 2) {
      this.add("logits", "Largest difference of logits");
      this.add("equal", "Texts");
    }
    this.begin();
  }

  add(name, label) {
    const value = make("dd");
    value.dataset.fact = name;
    this.values.set(name, value);
    this.place.append(make("div", "fact", {}, make("dt", "", { textContent: label }), value));
  }

  begin() {
    this.difference = this.differsFrom = null;
    for (const value of this.values.values()) value.className = "";
    this.update();
  }

  /** Shows everything as it is now, and marks the first difference. */
  update() {
    for (const { model, rate } of this.columns) this.set(model.id, rate === null ? "–" : rate.toFixed(1));
    if (this.columns.length < 2) return;
    const { difference } = this;
    this.set("logits", difference ? difference.logits.toExponential(1) : "–", difference && `over ${count(difference.tokens)}`);
    this.set("equal", this.compare());
  }

  set(name, text, note = "") {
    const value = this.values.get(name);
    value.replaceChildren(text);
    if (note) value.append(make("small", "", { textContent: note }));
  }

  /** Whether the texts are equal, in words. */
  compare() {
    const [a, b] = this.columns;
    const common = Math.min(a.tokens.length, b.tokens.length);
    if (this.differsFrom === null) {
      const at = a.tokens.findIndex((token, i) => i < common && token.id !== b.tokens[i].id);
      const ended = a.done && b.done && a.done !== "stopped" && a.tokens.length !== b.tokens.length;
      if (at >= 0 || ended) this.differ(at >= 0 ? at : common);
    }
    if (this.differsFrom !== null) return `differ from token ${this.differsFrom + 1}`;
    this.values.get("equal").className = common ? "good" : "";
    if (!common) return "–";
    return a.done && b.done ? `equal: ${count(common)}` : `equal so far: ${count(common)}`;
  }

  differ(index) {
    this.differsFrom = index;
    this.values.get("equal").className = "bad";
    for (const column of this.columns) column.mark(index);
  }
}

export const count = (n) => `${n} token${n === 1 ? "" : "s"}`;
