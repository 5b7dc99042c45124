/** The list of all unfinished tasks, of this browser and of others. With API keys: of this key. */

import { ApiError, json } from "./api.js";
import { keptTasks, pause, pollDelay } from "./tasks.js";
import { setText, stageInWords, timeInWords } from "./words.js";

const INTERVAL = 5_000; // ms, at least
const SHOWN = 100; // the longest page of GET /tasks

const section = document.getElementById("unfinished");
const hint = document.getElementById("unfinished-hint");
const list = document.getElementById("unfinished-list");

/** Keep the list up to date while it is open. */
export function watchQueue() {
  let watching = false;
  section.addEventListener("toggle", async () => {
    if (watching) return;
    watching = true;
    await watch();
    watching = false;
  });
}

async function watch() {
  let failures = 0;
  while (section.open) {
    try {
      const { tasks, next_cursor: more } = await json(`tasks?status=processing&limit=${SHOWN}`, { background: true });
      show(tasks, more !== null);
      failures = 0;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      failures += 1;
      setText(hint, error.message);
      if (error.status === 501) return; // RunPod's queue has no list
    }
    await pause(Math.max(pollDelay(failures), INTERVAL));
  }
}

/** The next one to be ready is first. */
function show(tasks, more) {
  const own = new Set(keptTasks().map(({ taskId }) => taskId));
  const sorted = tasks.toReversed().sort((one, other) => (one.queue_position ?? 0) - (other.queue_position ?? 0));
  list.replaceChildren(...sorted.map((task) => row(task, own.has(task.task_id))));
  if (more) setText(hint, `The newest ${SHOWN} are shown.`);
  else setText(hint, tasks.length === 0 ? "No video is waiting or being made." : "");
}

function row(task, isOwn) {
  const item = document.createElement("li");
  const { progress, elapsed_time: elapsed, remaining_time: left, queue_position: position } = task;
  const words = [
    stageInWords(task),
    position === null && `${progress} %`,
    timeInWords(elapsed, left === null ? null : elapsed + left),
    isOwn && "yours",
  ];
  item.textContent = words.filter(Boolean).join(" · ");
  return item;
}
