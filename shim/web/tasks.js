/** Tasks: kept in the browser, sent under a key of their own, asked about at a decent pace. */

import { json } from "./api.js";

const PREFIX = "hunyuan.task.";
const KEPT = 30;
const POLL = { shown: 1_000, hidden: 10_000, failing: 30_000 }; // ms

/** A new task for that body of POST /generate. Its id is the Idempotency-Key, too: sent twice it is still one task. */
export function newTask(input) {
  return { id: uniqueId(), created: Date.now(), input, taskId: null, estimate: null, status: null };
}

/** crypto.randomUUID is there over https and on localhost only. */
function uniqueId() {
  if (crypto.randomUUID) return crypto.randomUUID();
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether nothing more will come of it. `status` is the last answer of GET /status. */
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

/** Keep the task as it is now over reloads, each under a name of its own: other tabs keep theirs. */
export function keep(task) {
  try {
    localStorage.setItem(PREFIX + task.id, JSON.stringify(task));
  } catch (error) {
    console.warn("This browser has no room to keep the task over a reload:", error);
  }
}

/** Keep it no more. */
export function forget(task) {
  localStorage.removeItem(PREFIX + task.id);
}

/** Forget the oldest that have ended, so that one more can be kept. */
export function makeRoom() {
  keptTasks().slice(KEPT - 1).filter(hasEnded).forEach(forget);
}

/** Have the server accept the task. Throws ApiError; where no answer came, it may have been accepted all the same. */
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

/** End every `pause`: there is reason to ask the server now. */
export function wake() {
  dispatchEvent(new Event("wake"));
}

document.addEventListener("visibilitychange", () => { if (!document.hidden) wake(); });
addEventListener("online", wake);

/** Wait so many ms, or until `wake`. */
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

/** ms until the next question, after so many failures in a row; the last of them may have said `retryAfter`, seconds. */
export function pollDelay(failures = 0, retryAfter = 0) {
  const usual = document.hidden ? POLL.hidden : POLL.shown;
  return failures === 0 ? usual : Math.max(Math.min(usual * 2 ** failures, POLL.failing), retryAfter * 1000);
}
