/** Tasks: the browser keeps them, sends each with an Idempotency-Key, and follows their status by stream or by polls. */

import { ApiError, json, streamed } from "./api.js";

const PREFIX = "hunyuan.task.";
const KEPT = 30;
const MAX_STREAMS = 2; // of this page; a browser opens six connections to a server, for all of its pages
const POLL = { shown: 1_000, hidden: 10_000, failing: 30_000 }; // ms

/** A new task for a body of POST /generate. Its id is the Idempotency-Key, so that a task sent twice is one task. */
export function newTask(input) {
  return { id: uniqueId(), created: Date.now(), input, taskId: null, estimate: null, status: null };
}

/** Browsers have crypto.randomUUID over https and on localhost only. */
function uniqueId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether the task has completed or failed. `status` is the last response of GET /status. */
export function hasEnded(task) {
  return task.status !== null && task.status.status !== "processing";
}

/** The tasks that this browser keeps, newest first. */
export function keptTasks() {
  return Object.keys(localStorage)
    .filter((name) => name.startsWith(PREFIX))
    .map((name) => JSON.parse(localStorage.getItem(name)))
    .sort((one, other) => other.created - one.created);
}

/** Keep the task over reloads. Each task has its own entry, so that two tabs do not overwrite each other's. */
export function keep(task) {
  try {
    localStorage.setItem(PREFIX + task.id, JSON.stringify(task));
  } catch (error) {
    console.warn("The browser's storage is full, the task will be lost on a reload:", error);
  }
}

export function forget(task) {
  localStorage.removeItem(PREFIX + task.id);
}

/** Forget the oldest ended tasks, so that one more fits. */
export function makeRoom() {
  keptTasks().slice(KEPT - 1).filter(hasEnded).forEach(forget);
}

/** Send the task to the server. Throws ApiError; if its `isLost`, the server may have accepted the task. */
export async function submit(task, options) {
  const accepted = await json("generate", {
    ...options,
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": task.id },
    body: JSON.stringify(task.input),
  });
  task.taskId = accepted.task_id;
  task.estimate = accepted.estimated_time;
}

let streams = 0;
let canStream = true;

/**
 * The task's status at each change. Ends without an error when the task has ended, when the page is hidden, or when there
 * is no stream: too many, or a proxy that holds it back. Poll then.
 */
export async function* changes(task) {
  if (!canStream || document.hidden || streams >= MAX_STREAMS) return;
  const stop = new AbortController();
  const onHidden = () => { if (document.hidden) stop.abort("hidden"); };
  let begun = false;
  document.addEventListener("visibilitychange", onHidden);
  streams += 1;
  try {
    for await (const status of streamed(`tasks/${encodeURIComponent(task.taskId)}/events`, stop)) {
      begun = true;
      yield status;
    }
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (!begun && (stop.signal.reason === "silence" || !error.isTemporary)) canStream = false;
  } finally {
    streams -= 1;
    document.removeEventListener("visibilitychange", onHidden);
  }
}

/** End every `pause`, so that every task polls the server now. */
export function wake() {
  dispatchEvent(new Event("wake"));
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
addEventListener("online", wake);

/** Wait `ms`, or until `wake`. */
export function pause(ms) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      removeEventListener("wake", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    addEventListener("wake", done);
  });
}

/** ms until the next poll, after so many failures in a row. `retryAfter` is the last one's, in seconds. */
export function pollDelay(failures = 0, retryAfter = 0) {
  const usual = document.hidden ? POLL.hidden : POLL.shown;
  return failures === 0 ? usual : Math.max(Math.min(usual * 2 ** failures, POLL.failing), retryAfter * 1000);
}
