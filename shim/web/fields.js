/** The form's fields, made from the JSON schema of POST /generate's body: a new field in the schema needs no edit here. */

import schema from "./schema.js";

export const PROMPT = schema.properties.prompt;
export const DEFAULT_MODEL = schema.properties.model.default;

const SHORT = 6; // characters; longer choices are in a list
const FIELDS = Object.entries(schema.properties).map(([name, property]) => {
  const value = property.anyOf?.find(({ type }) => type !== "null"); // anyOf: the server has a default of its own
  const type = value?.type ?? property.type;
  return { ...value, ...property, name, optional: value !== undefined || type === "array", type };
});
const TYPES = Object.fromEntries(FIELDS.map(({ name, type }) => [name, type]));

/** Add every field but the prompt, which index.html has: those with a value at `main`, the optional ones in `more`. */
export function addFields(main, more) {
  for (const field of FIELDS.filter(({ name }) => name !== "prompt")) {
    (field.optional ? more : main).append(elementOf(field));
  }
}

/** The form's values as the body of POST /generate. Text that is not a number is sent as it is: the server checks it. */
export function readFields(form) {
  const filled = [...new FormData(form)].filter(([, text]) => text !== "");
  return Object.fromEntries(filled.map(([name, text]) => [name, valueOf(TYPES[name], text)]));
}

/** The text of a field for its value in a body of POST /generate. */
export function textOf(value) {
  return Array.isArray(value) ? value.map(({ name, scale }) => (scale === 1 ? name : `${name}:${scale}`)).join(", ") : value;
}

function valueOf(type, text) {
  if (type === "boolean") return text === "true";
  if (type === "array") return text.split(",").map(loraOf);
  const isNumber = (type === "integer" || type === "number") && text.trim() && !Number.isNaN(Number(text));
  return isNumber ? Number(text) : text;
}

/** The LoRA adapter that NAME or NAME:SCALE says. */
function loraOf(text) {
  const [name, scale = "1"] = text.trim().split(":");
  return { name, scale: valueOf("number", scale) };
}

/** Whether a body has a field that is in `more`. */
export function hasOptional(input) {
  return FIELDS.some(({ name, optional }) => optional && name in input);
}

function elementOf(field) {
  const { name, optional, type, minimum, maximum } = field;
  if (type === "boolean" && !optional) return checkbox(field);
  const choices = type === "boolean" ? [true, false] : field.enum;
  if (choices && !optional && choices.every((choice) => choice.length <= SHORT)) return segments(field);
  if (choices) return labelled(field, list(field, choices));
  const isNumber = type === "integer" || type === "number";
  if (isNumber && !optional) return slider(field, { min: minimum, max: maximum });
  const options = isNumber && { inputmode: type === "integer" ? "numeric" : "decimal", placeholder: "default" };
  const element = labelled(field, make("input", { ...control(field), type: "text", ...options }));
  element.classList.toggle("short", isNumber);
  return element;
}

/** The first choice is checked. The first choice and the smallest number give the quickest video. */
function segments({ name, enum: choices, ...field }) {
  const radios = choices.map((choice, index) => make(
    "label", {},
    make("input", { type: "radio", name, value: choice, ...(index === 0 && { checked: "" }) }),
    shaped(make("span", {}, choice)),
  ));
  const attributes = { class: "field", "data-field": name, "aria-describedby": described(name) };
  const group = make("div", { class: "segments" }, ...radios);
  return make("fieldset", attributes, make("legend", {}, titleOf(field)), group, ...notes({ name, ...field }));
}

/** An aspect ratio is drawn above its name. */
function shaped(span) {
  const [, width, height] = span.textContent.match(/^(\d+):(\d+)$/) ?? [];
  if (width) {
    span.className = "shape";
    const wide = Math.sqrt(width / height);
    span.style.setProperty("--w", `${1.2 * wide}rem`);
    span.style.setProperty("--h", `${1.2 / wide}rem`);
  }
  return span;
}

function checkbox(field) {
  const box = make("input", { ...control(field), type: "checkbox", value: "true" });
  const label = make("label", { for: field.name, class: "check" }, box, titleOf(field));
  return make("div", { class: "field", "data-field": field.name }, label, ...notes(field));
}

function slider(field, { min, max }) {
  const range = make("input", { ...control(field), type: "range", min, max, step: field.type === "integer" ? 1 : "any", value: min });
  const element = labelled(field, range);
  const label = element.querySelector("label");
  label.replaceWith(make("div", { class: "row" }, label.cloneNode(true), make("output", { for: field.name }, String(min))));
  return element;
}

function list(field, choices) {
  const select = make("select", control(field));
  select.append(new Option("Default", ""), ...choices.map((choice) => new Option(choice)));
  return select;
}

function labelled(field, element) {
  const label = make("label", { for: field.name }, titleOf(field));
  return make("div", { class: "field", "data-field": field.name }, label, element, ...notes(field));
}

function control({ name }) {
  return { id: name, name, "aria-describedby": described(name) };
}

function described(name) {
  return `${name}-error ${name}-hint`;
}

function notes({ name, description }) {
  return [make("p", { class: "error", id: `${name}-error` }), make("p", { class: "hint", id: `${name}-hint` }, description ?? "")];
}

function titleOf({ title }) {
  return title[0] + title.slice(1).toLowerCase();
}

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
