/** The page: the form, the server's health in its header, the dialog for the API key, and the list of videos. */

import { ApiError, currentKey, json, keepKey, onKeyNeeded } from "./api.js";
import { Card } from "./card.js";
import { addFields, DEFAULT_MODEL, hasOptional, PROMPT, readFields } from "./fields.js";
import { forget, keep, keptTasks, makeRoom, newTask, pause, pollDelay, submit, wake } from "./tasks.js";

const MAX_FILE = 45 * 1024; // bytes; 60 KiB in base64, which leaves 4 KiB of a request's 64 KiB for the other fields
const HEALTH_INTERVAL = 5_000; // ms, at least

const byId = (id) => document.getElementById(id);
const form = byId("form");
const button = byId("submit");
const cards = byId("cards");

// The form

addFields(byId("main"), byId("optional"));
byId("image").after(byId("image-file-row").content);
byId("model").closest(".field").hidden = true; // until the server offers a choice
byId("enhance_prompt").closest(".field").hidden = true; // until the server says that it can

/** The form as the body of POST /generate. */
async function readForm() {
  const input = { ...readFields(form), prompt: form.elements.prompt.value.trim() };
  const [file] = byId("image-file").files;
  if (file) input.image = await dataUrl(file);
  else if (chosenImage !== null) input.image = chosenImage;
  return input;
}

/** The image of a task whose settings are used again. A page cannot put a file into a file field. */
let chosenImage = null;

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.addEventListener("load", () => resolve(reader.result));
    reader.addEventListener("error", () => reject(new ApiError("image: the file can’t be read", { code: "INVALID_REQUEST" })));
    reader.readAsDataURL(file);
  });
}

function fillForm(input) {
  form.reset();
  clearImage();
  const { image, ...fields } = input;
  for (const [name, value] of Object.entries(fields)) {
    const control = form.elements[name];
    if (control?.type === "checkbox") control.checked = value;
    else if (control) control.value = value;
  }
  if (image?.startsWith("data:")) chooseImage(image);
  else if (image) form.elements.image.value = image;
  byId("more").open = hasOptional(input);
  showErrors();
  showChoices();
  form.elements.prompt.focus();
}

function useExample({ target }) {
  const example = target.closest("button");
  if (example === null) return; // between two buttons
  form.elements.prompt.value = example.textContent;
  showErrors();
  showChoices();
  form.elements.prompt.focus();
}

function showChoices() {
  const length = [...form.elements.prompt.value.trim()].length; // code points, as the server counts
  byId("count").textContent = `${length} / ${PROMPT.maxLength}`;
  byId("count").dataset.off = length > 0 && (length < PROMPT.minLength || length > PROMPT.maxLength);
  for (const output of form.querySelectorAll("output")) output.value = form.elements[output.htmlFor.value].value;
}

function showFile() {
  const [file] = byId("image-file").files;
  showErrors();
  if (file && file.size > MAX_FILE) {
    clearImage();
    const text = `${file.name} has ${Math.ceil(file.size / 1024)} KiB; at most ${MAX_FILE / 1024} fit a request`;
    showErrors(new ApiError(text, { code: "REQUEST_TOO_LARGE" }));
  } else if (file) {
    chooseImage(null);
  }
}

function chooseImage(url) {
  chosenImage = url;
  const field = form.elements.image;
  field.value = "";
  field.placeholder = url === null ? "the file below" : "the same image again";
  field.disabled = true;
  byId("image-clear").hidden = false;
}

function clearImage() {
  chosenImage = null;
  byId("image-file").value = "";
  form.elements.image.disabled = false;
  form.elements.image.placeholder = "https://…";
  byId("image-clear").hidden = true;
}

/** Show the error at its field, or above the button; without an error, clear them all. */
function showErrors(error = null, advice = "") {
  const named = fieldOf(error);
  let placed = false;
  for (const field of form.querySelectorAll("[data-field]")) {
    const here = field.dataset.field === named && !field.hidden;
    field.querySelector(".error").textContent = here ? error.message : "";
    const control = field.querySelector("textarea, select, input:enabled");
    control.setAttribute("aria-invalid", here);
    if (!here) continue;
    placed = true;
    if (byId("more").contains(field)) byId("more").open = true;
    control.focus();
  }
  byId("form-error").textContent = error && !placed ? [error.message, advice].filter(Boolean).join(". ") : "";
}

/** The field that an error is about: the server's messages begin with its name. */
function fieldOf(error) {
  if (error?.code === "REQUEST_TOO_LARGE") return "image";
  return error?.code.startsWith("INVALID_") ? error.message.match(/^\w+/)?.[0] : null;
}

let busy = false;

async function make(event) {
  event.preventDefault();
  if (busy) return;
  setBusy("Sending …");
  showErrors();
  let waitFor = 0;
  try {
    await send(newTask(await readForm()));
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    waitFor = error.retryAfter ?? 0;
    showErrors(error, waitFor && `It can be sent again in ${waitFor} s.`);
  } finally {
    countDown(waitFor);
  }
}

/** The task is kept before it is sent: if the page is closed meanwhile, the next page sends it. */
async function send(task) {
  makeRoom();
  keep(task);
  try {
    await submit(task);
    keep(task);
  } catch (error) {
    if (!error.isLost) {
      forget(task);
      throw error;
    } // else the card sends it again with the same Idempotency-Key
  }
  addCard(task).scrollIntoView({ block: "nearest" }); // on a phone it is below the form
}

function setBusy(text) {
  busy = text !== null;
  button.setAttribute("aria-disabled", String(busy)); // `disabled` would lose the focus
  button.textContent = text ?? "Make video";
}

/** Enable the button again after so many seconds. */
async function countDown(seconds) {
  for (let left = seconds; left > 0; left -= 1) {
    setBusy(`Again in ${left} s`);
    await new Promise((resolve) => { setTimeout(resolve, 1000); });
  }
  if (seconds > 0) showErrors();
  setBusy(null);
}

form.addEventListener("submit", make);
form.addEventListener("input", showChoices);
byId("examples").addEventListener("click", useExample);
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("image-file").addEventListener("change", showFile);
byId("image-clear").addEventListener("click", () => { clearImage(); showErrors(); });

// The cards

function addCard(task) {
  const card = new Card(task, { onReuse: fillForm, onRemove: showEmpty });
  cards.prepend(card.element);
  showEmpty();
  return card.element;
}

function showEmpty() {
  byId("empty").hidden = cards.childElementCount > 0;
}

// The server's health

async function watchHealth() {
  let failures = 0;
  for (;;) {
    try {
      showHealth(await json("health", { background: true }));
      failures = 0;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      failures += 1;
      showChip("health", error.message, "bad");
      for (const chip of ["loaded-model", "gpu", "queue"]) byId(chip).hidden = true;
    }
    await pause(Math.max(pollDelay(failures), HEALTH_INTERVAL));
  }
}

function showHealth({ status, model_loaded, gpu_available, vram_free, version, model, models, workers, queue, provider, rewrites_prompts }) {
  showChip("health", ...stateInWords(status, model_loaded, workers));
  showChip("loaded-model", model && `Model: ${model}`);
  showChip("gpu", gpu_available ? `GPU, ${vram_free} free` : "No GPU");
  const busy = queue.waiting + queue.running > 0;
  showChip("queue", busy ? `${queue.waiting} waiting, ${queue.running} running` : "Queue empty");
  for (const id of ["demo", "examples"]) byId(id).hidden = model !== "demo";
  byId("version").textContent = `HunyuanVideo ${version}`;
  byId("provider").textContent = provider ? `Offered by ${provider}. ` : "";
  offerModels(models);
  byId("enhance_prompt").closest(".field").hidden = !rewrites_prompts;
  if (!rewrites_prompts) byId("enhance_prompt").checked = false;
}

function stateInWords(status, loaded, workers) {
  if (status !== "healthy") return ["Degraded", "bad"];
  if (loaded) return ["Healthy", "good"];
  if (workers.loading > 0) return ["Loading the model", "busy"];
  return workers.failed > 0 ? ["The model failed to load", "bad"] : ["No worker", "bad"];
}

function showChip(id, text, tone = "") {
  const chip = byId(id);
  chip.hidden = !text;
  chip.dataset.tone = tone;
  if (chip.textContent !== text) chip.textContent = text ?? "";
}

function offerModels(models) {
  const choice = byId("model");
  choice.closest(".field").hidden = models.length < 2;
  const profiles = models.filter((name) => name !== DEFAULT_MODEL);
  if (choice.dataset.offered === profiles.join()) return;
  choice.dataset.offered = profiles.join();
  const chosen = choice.value;
  choice.replaceChildren(
    new Option("The server’s choice", ""),
    ...profiles.map((name) => new Option(profileInWords(name), name, false, name === chosen)),
  );
}

function profileInWords(model) {
  const profile = model.replace(`${DEFAULT_MODEL}-`, "");
  return profile[0].toUpperCase() + profile.slice(1);
}

// The key

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
for (const task of keptTasks().reverse()) addCard(task);
showChoices();
watchHealth();
