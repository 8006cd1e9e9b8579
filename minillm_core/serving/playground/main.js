/** Begins: waits for the models, then prepares both tabs. */

import { getJson } from "./api.js";
import { setUpBreak } from "./break_it.js";
import { byId, showAlert, titleOf } from "./dom.js";
import { setUpGenerate, setUpGenerateControls } from "./generate.js";
import { setUpTabs } from "./tabs.js";

const PAUSE = 1500;
/** Milliseconds between two questions whether the models are loaded. */

setUpTabs(document.querySelector('[role="tablist"]'));
setUpGenerateControls();
setUpBreak();
begin();

async function begin() {
  showAlert(byId("page-alert"), "");
  try {
    const served = await getJson("/playground/models");
    const names = served.models.map(({ framework }) => titleOf(framework)).join(" and ");
    byId("about").textContent = `${served.checkpoint} in ${names}, context of ${served.context_length} tokens`;
    setUpGenerate(served);
  } catch (error) {
    if (error.status === 503) {
      byId("about").textContent = `${error.message} Trying again.`;
      setTimeout(begin, PAUSE);
      return;
    }
    byId("about").textContent = "No model";
    showAlert(byId("page-alert"), error.message, begin);
  }
}
