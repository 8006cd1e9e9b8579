/** Many elements, one stop in the tab order: the arrow keys move between them. */

/**
 * @param place the element around them
 * @param selector which elements
 * @param rows gives the elements row by row, if up and down move between rows
 */
export function setUpRoving(place, selector, rows = null) {
  place.addEventListener("keydown", (event) => {
    const all = [...place.querySelectorAll(selector)];
    const index = all.indexOf(document.activeElement);
    if (index < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    const target = rows ? inRows(rows(), document.activeElement, event.key) : inLine(all, index, event.key);
    if (!target) return;
    event.preventDefault();
    moveTo(place, target);
  });
  place.addEventListener("focusin", ({ target }) => {
    if (target.matches(selector)) makeStop(place, target);
  });
}

function moveTo(place, target) {
  makeStop(place, target);
  target.focus();
}

function makeStop(place, target) {
  for (const stop of place.querySelectorAll('[tabindex="0"]')) stop.tabIndex = -1;
  target.tabIndex = 0;
}

function inLine(all, index, key) {
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  if (key === "Home") return all[0];
  if (key === "End") return all.at(-1);
  return key in steps ? all[index + steps[key]] : null;
}

function inRows(rows, current, key) {
  const row = rows.findIndex((cells) => cells.includes(current));
  const column = rows[row].indexOf(current);
  const near = (cells) => cells?.[Math.min(column, cells.length - 1)];
  return {
    ArrowRight: rows[row][column + 1],
    ArrowLeft: rows[row][column - 1],
    ArrowDown: near(rows[row + 1]),
    ArrowUp: row > 0 ? near(rows[row - 1]) : null,
    Home: rows[row][0],
    End: rows[row].at(-1),
  }[key];
}
