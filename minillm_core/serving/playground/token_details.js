/** The small panel with the details of a token: probability, id, alternatives. */

import { bar, make, percent, visible } from "./dom.js";

const GRACE = 250;
/** Milliseconds in which the pointer can move from a token to the panel. */

export class TokenDetails {
  constructor(place, columns) {
    this.place = place;
    this.columns = columns;
    this.token = null;
    this.timer = null;
    place.addEventListener("pointerenter", () => clearTimeout(this.timer));
    place.addEventListener("pointerleave", () => this.hideSoon());
    document.addEventListener("pointerover", ({ target }) => {
      if (this.token && !target.closest?.(".token, .details")) this.hideSoon();
    });
    document.addEventListener("scroll", () => this.token && this.move(), { passive: true });
  }

  show(column, index) {
    clearTimeout(this.timer);
    const token = column.at(index);
    if (!token || token === this.token) return;
    this.hide();
    this.token = token;
    token.classList.add("current");
    token.setAttribute("aria-describedby", this.place.id);
    const twin = this.columns().find((other) => other !== column);
    twin?.at(index)?.classList.add("current");
    this.place.replaceChildren(...contents(column, index, twin));
    this.place.hidden = false;
    this.move();
  }

  hide() {
    clearTimeout(this.timer);
    this.place.hidden = true;
    this.token?.removeAttribute("aria-describedby");
    this.token = null;
    for (const token of document.querySelectorAll(".token.current")) token.classList.remove("current");
  }

  hideSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => {
      if (this.token !== document.activeElement) this.hide();
    }, GRACE);
  }

  /** Below the token, or above it where there is no room. */
  move() {
    const [first] = this.token.getClientRects();
    if (!first) return;
    const { offsetWidth: width, offsetHeight: height } = this.place;
    const room = document.documentElement.clientWidth - width - 8;
    const below = first.bottom + 6;
    const top = below + height < innerHeight ? below : Math.max(8, first.top - height - 6);
    this.place.style.left = `${Math.max(8, Math.min(first.left, room))}px`;
    this.place.style.top = `${top}px`;
  }
}

function contents(column, index, twin) {
  const token = column.tokens[index];
  const facts = make("dl");
  const add = (name, value) => facts.append(make("dt", "", { textContent: name }), make("dd", "", { textContent: value }));
  add("probability", percent(token.logprob));
  const other = twin?.tokens[index];
  if (other) add(`in ${twin.title}`, other.id === token.id ? percent(other.logprob) : visible(other.text));
  add("token id", token.id);
  add("position", `${index + 1} of ${column.tokens.length}`);
  const chosen = ({ id }) => (id === token.id ? "chosen" : "");
  const bars = token.alternatives.map((form) => bar(visible(form.text), form.logprob, chosen(form)));
  if (!token.alternatives.some(chosen)) bars.push(bar(visible(token.text), token.logprob, "chosen"));
  return [
    make("p", "which", {}, make("code", "", { textContent: visible(token.text) }), ` in ${column.title}`),
    facts,
    make("p", "caption", { textContent: "Most likely tokens here" }),
    make("ol", "bars", {}, ...bars),
  ];
}
