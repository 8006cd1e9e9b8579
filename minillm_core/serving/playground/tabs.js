/** Tabs: one of them is in the tab order, the arrow keys move between them. A panel gets the event `opened`. */

import { byId } from "./dom.js";

export function setUpTabs(list) {
  const tabs = [...list.querySelectorAll('[role="tab"]')];

  function select(chosen) {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
    byId(chosen.getAttribute("aria-controls")).dispatchEvent(new Event("opened"));
  }

  for (const tab of tabs) tab.addEventListener("click", () => select(tab));
  list.addEventListener("keydown", (event) => {
    const next = moved(event.key, tabs.indexOf(document.activeElement), tabs.length);
    if (next === null) return;
    event.preventDefault();
    tabs[next].focus();
    select(tabs[next]);
  });
}

function moved(key, index, count) {
  const places = {
    ArrowRight: (index + 1) % count,
    ArrowLeft: (index - 1 + count) % count,
    Home: 0,
    End: count - 1,
  };
  return places[key] ?? null;
}
