/** The dialog for the API key. */

import { currentKey, keepKey, onKeyNeeded } from "./api.js";
import { wake } from "./tasks.js";

const byId = (id) => document.getElementById(id);
const dialog = byId("key-dialog");

/** Ask the user for a key; true if there is a new one. */
function askForKey(wrong) {
  return new Promise((resolve) => {
    byId("key-offer").hidden = false;
    byId("key-error").textContent = wrong ? "The server does not accept this key" : "";
    byId("key-forget").hidden = currentKey() === null;
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      resolve(dialog.returnValue === "given");
      byId("key").value = "";
    }, { once: true });
    dialog.showModal();
  });
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[\x21-\x7e]+$/.test(key)) { // what a header can contain
    byId("key-error").textContent = "A key has only letters, digits and punctuation, and no spaces";
    return;
  }
  keepKey(key, byId("key-remember").checked);
  dialog.close("given");
  wake();
});
byId("key-forget").addEventListener("click", () => {
  keepKey(null);
  dialog.close();
});
byId("key-cancel").addEventListener("click", () => dialog.close());
byId("key-button").addEventListener("click", () => askForKey(false));

byId("key-offer").hidden = currentKey() === null;
onKeyNeeded(askForKey);
