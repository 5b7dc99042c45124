/** The page: the form, and the list of videos. */

import "./key.js";
import { ApiError, currentKey } from "./api.js";
import { Card, copied } from "./card.js";
import { codeFor } from "./code.js";
import { addFields, hasOptional, PROMPT, readFields, textOf } from "./fields.js";
import { watchHealth } from "./health.js";
import { hintFor } from "./hints.js";
import { upload } from "./image.js";
import { watchQueue } from "./queue.js";
import { forget, keep, keptTasks, makeRoom, newTask, submit } from "./tasks.js";
import { inWords } from "./words.js";

const DRAFT = "hunyuan.draft";
const MAX_KEPT = 10_000; // characters of a field that a draft keeps

const byId = (id) => document.getElementById(id);
const form = byId("form");
const button = byId("submit");
const cards = byId("cards");

// The form

addFields(byId("main"), byId("optional"));
byId("image").after(byId("image-file-row").content);
byId("model").closest(".field").hidden = true; // until the server offers a choice
for (const id of ["enhance_prompt", "loras"]) byId(id).closest(".field").hidden = true; // until the server says that it can

/** The form as the body of POST /generate. Waits for the upload of the image. */
async function readForm() {
  const failure = await uploading;
  if (failure !== null) throw failure;
  return currentInput();
}

function currentInput() {
  const prompt = form.elements.prompt.value.trim();
  return { ...readFields(form), prompt, ...(chosenImage !== null && { image: chosenImage }) };
}

/** The image of the file field, or of a task whose settings are used again; null: the text field has the image. */
let chosenImage = null;
/** The upload of the file: resolves to its ApiError, or to null. */
let uploading = Promise.resolve(null);

/** Fill the form with a body of POST /generate. */
function setForm(input) {
  form.reset();
  clearImage();
  const { image, ...fields } = input;
  for (const [name, value] of Object.entries(fields)) {
    const control = form.elements[name];
    if (control?.type === "checkbox") control.checked = value;
    else if (control) control.value = textOf(value);
  }
  if (/^(data|upload):/.test(image)) chooseImage(image, "the same image again");
  else if (image) form.elements.image.value = image;
  byId("more").open = hasOptional(input);
  showErrors();
  showChoices();
}

function useAgain(input, part) {
  setForm(input);
  keepDraft();
  form.elements.prompt.focus();
  if (part === "prompt") form.elements.prompt.select(); // what the user types replaces it
}

/** The form survives a reload, but not the tab: sessionStorage. */
function keepDraft() {
  const fields = Object.entries(currentInput()).filter(([, value]) => String(value).length <= MAX_KEPT);
  sessionStorage.setItem(DRAFT, JSON.stringify(Object.fromEntries(fields)));
}

function useExample({ target }) {
  const example = target.closest("button");
  if (example === null) return; // between two buttons
  form.elements.prompt.value = example.textContent;
  showErrors();
  change();
  form.elements.prompt.focus();
}

/** The user changed the form. */
function change() {
  showChoices();
  keepDraft();
}

let isDemo = false;

function showChoices() {
  const prompt = form.elements.prompt.value.trim();
  const length = [...prompt].length; // code points, as the server counts
  byId("prompt-hint").textContent = hintFor(prompt, isDemo);
  byId("prompt-tips").hidden = length > 0;
  byId("count").textContent = `${length} / ${PROMPT.maxLength}`;
  byId("count").dataset.off = length > 0 && (length < PROMPT.minLength || length > PROMPT.maxLength);
  for (const output of form.querySelectorAll("output")) output.value = form.elements[output.htmlFor.value].value;
  if (byId("code").open) showCode();
}

function chooseFile() {
  const [file] = byId("image-file").files;
  showErrors();
  if (file) uploading = store(file);
}

/** Upload the file, and use it unless the user has chosen another one meanwhile. Resolves as `uploading` does. */
async function store(file) {
  const isChosen = () => byId("image-file").files[0] === file;
  chooseImage(null, "Uploading …");
  try {
    const image = await upload(file);
    if (isChosen()) chooseImage(image, file.name);
    return null;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (isChosen()) {
      clearImage();
      showErrors(error);
    }
    return error;
  }
}

/** `words` say in the text field which image it is. */
function chooseImage(image, words) {
  chosenImage = image;
  const field = form.elements.image;
  field.value = "";
  field.placeholder = words;
  field.disabled = true;
  byId("image-clear").hidden = false;
  change();
}

function clearImage() {
  chosenImage = null;
  byId("image-file").value = "";
  form.elements.image.disabled = false;
  form.elements.image.placeholder = "https://…";
  byId("image-clear").hidden = true;
  uploading = Promise.resolve(null);
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
  byId("form-error").textContent = error && !placed ? sentences(error, advice) : "";
}

function sentences({ message, code }, advice) {
  const { text, detail } = inWords(message, code);
  return [text, detail && `${detail}.`, advice].filter(Boolean).join(" ");
}

/** The field that an error is about: the server's messages begin with its name. */
function fieldOf(error) {
  return error?.code.startsWith("INVALID_") ? error.message.match(/^\w+/)?.[0] : null;
}

let busy = false;

/** Make a video with the body that `read` returns, unless a request is being sent. */
async function make(read) {
  if (busy) return;
  setBusy("Sending …");
  showErrors();
  let waitFor = 0;
  try {
    await send(newTask(await read()));
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

form.addEventListener("submit", (event) => { event.preventDefault(); make(readForm); });
form.addEventListener("input", change);
for (const id of ["examples", "ideas"]) byId(id).addEventListener("click", useExample);
form.elements.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
byId("image-file").addEventListener("change", chooseFile);
byId("image-clear").addEventListener("click", () => { clearImage(); showErrors(); change(); });

// The request as code

let language = "curl";

function showCode() {
  const server = document.baseURI.replace(/[?#].*$/, "").replace(/\/+$/, "");
  byId("code-text").textContent = codeFor(language, currentInput(), { server, needsKey: currentKey() !== null });
  for (const choice of byId("code").querySelectorAll("[data-language]")) {
    choice.setAttribute("aria-pressed", String(choice.dataset.language === language));
  }
}

byId("code").addEventListener("toggle", showChoices);
byId("code").addEventListener("click", ({ target }) => {
  if (!target.dataset.language) return;
  ({ language } = target.dataset);
  showCode();
});
byId("code-copy").addEventListener("click", ({ target }) => copied(byId("code-text").textContent, target));

// The cards

function addCard(task) {
  const card = new Card(task, { onReuse: useAgain, onAgain: (input) => make(() => input), onRemove: showEmpty });
  cards.prepend(card.element);
  showEmpty();
  return card.element;
}

function showEmpty() {
  byId("empty").hidden = cards.childElementCount > 0;
}

for (const task of keptTasks().reverse()) addCard(task);
setForm(JSON.parse(sessionStorage.getItem(DRAFT) ?? "{}"));
watchQueue();
watchHealth(({ model }) => {
  isDemo = model === "demo";
  showChoices();
});
