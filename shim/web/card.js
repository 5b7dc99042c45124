/** A task on the page: its progress while it runs, then its video or its error. */

import { ApiError, currentKey, json, request, unlessLost } from "./api.js";
import { changes, forget, hasEnded, keep, pause, pollDelay, submit } from "./tasks.js";

const STAGES = {
  queued: "In the queue",
  encoding_prompt: "Reading the prompt",
  denoising: "Forming the video",
  upscaling: "Adding detail",
  decoding: "Drawing the frames",
  storing: "Storing the video",
};
const PARTS = [
  "video", "prompt", "settings", "progress", "stage", "percent", "bar", "time", "problem",
  "cancel", "download", "copy", "reuse", "remove",
];

/** A video is loaded when its player comes near the visible part of the page. */
const nearby = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    nearby.unobserve(target);
    target.dispatchEvent(new Event("nearby"));
  }
}, { rootMargin: "300px" });

/** Shows `task` until it is removed. `onReuse(input)`: the user wants its settings again; `onRemove()`: it was removed. */
export class Card {
  #task;
  #parts;
  #removed = false;
  #updatedAt = 0; // by performance.now()
  #blobUrl = null;

  constructor(task, { onReuse, onRemove }) {
    this.#task = task;
    this.element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    this.#parts = Object.fromEntries(PARTS.map((name) => [name, this.element.querySelector(`.${name}`)]));
    this.#describe();
    const { cancel, copy, remove, reuse, video } = this.#parts;
    cancel.addEventListener("click", () => this.#cancel());
    copy.addEventListener("click", () => this.#copyLink());
    reuse.addEventListener("click", () => onReuse(task.input));
    remove.addEventListener("click", () => { this.#remove(); onRemove(); });
    video.addEventListener("nearby", () => this.#loadVideo());
    video.addEventListener("error", () => this.#explainVideo());
    this.#render();
    this.#follow();
  }

  #describe() {
    const { prompt, settings, video } = this.#parts;
    const { id, input } = this.#task;
    prompt.id = `prompt-${id}`;
    prompt.textContent = input.prompt;
    settings.textContent = settingsInWords(input);
    for (const named of [this.element.firstElementChild, video]) named.setAttribute("aria-labelledby", prompt.id);
    [video.width, video.height] = input.aspect_ratio.split(":").map(Number); // the player's shape until the video is loaded
  }

  async #follow() {
    let failures = 0;
    while (!hasEnded(this.#task) && !this.#removed) {
      let retryAfter = 0;
      try {
        if (this.#task.taskId === null) await submit(this.#task, { background: true });
        await this.#watch();
        failures = 0;
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (!error.isTemporary && error.status !== 401) {
          this.#update({ status: "failed", error: error.message, error_code: error.code });
          break;
        }
        failures += 1;
        retryAfter = error.retryAfter ?? 0;
        this.#say(`${error.message}. Trying again …`);
      }
      if (!hasEnded(this.#task)) await pause(pollDelay(failures, retryAfter));
    }
  }

  /** Show each change as long as there is a stream, and then the status once. */
  async #watch() {
    const ticking = setInterval(() => this.#renderTime(), 1_000);
    try {
      for await (const status of changes(this.#task)) this.#update(status);
    } finally {
      clearInterval(ticking);
    }
    if (hasEnded(this.#task)) return;
    this.#update(await json(`status/${encodeURIComponent(this.#task.taskId)}`, { background: true }));
  }

  #update(status) {
    if (this.#removed || hasEnded(this.#task)) return;
    this.#task.status = status;
    this.#updatedAt = performance.now();
    keep(this.#task);
    this.#say("");
    this.#render();
  }

  #render() {
    const { bar, cancel, copy, download, percent, progress, remove, stage } = this.#parts;
    const { status, taskId } = this.#task;
    const ended = hasEnded(this.#task);
    const completed = status?.status === "completed";
    progress.hidden = cancel.hidden = ended;
    download.hidden = copy.hidden = !completed;
    remove.hidden = !ended;
    if (completed) {
      this.#renderVideo();
    } else if (ended) {
      this.#say(status.error_code ? `${status.error} (${status.error_code})` : status.error);
    } else {
      cancel.textContent = taskId === null ? "Give up" : "Cancel";
      setText(stage, taskId === null ? "Sending" : stageInWords(status));
      bar.value = status?.progress ?? 0;
      percent.textContent = `${bar.value} %`;
      this.#renderTime();
    }
  }

  /** A stream says nothing while nothing changes but the time. */
  #renderTime() {
    const { estimate, status } = this.#task;
    const asked = status?.elapsed_time ?? 0;
    const since = this.#updatedAt === 0 ? 0 : (performance.now() - this.#updatedAt) / 1000;
    const expected = status?.remaining_time == null ? estimate : asked + status.remaining_time;
    this.#parts.time.textContent = timeInWords(asked + since, expected);
  }

  #renderVideo() {
    const { settings, video } = this.#parts;
    settings.textContent = `${settingsInWords(this.#task.input)} · ${megabytes(this.#task.status.file_size)}`;
    video.hidden = false;
    nearby.observe(video);
  }

  #say(text) {
    setText(this.#parts.problem, text);
  }

  async #cancel() {
    const { cancel } = this.#parts;
    if (this.#task.taskId === null) { // nobody knows whether the server has it, so the page stops sending it
      this.#update({ status: "failed", error: "Given up before the server answered", error_code: "" });
      return;
    }
    cancel.disabled = true;
    try {
      this.#update(await json(`tasks/${encodeURIComponent(this.#task.taskId)}`, { method: "DELETE" }));
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.#say(error.message);
    } finally {
      cancel.disabled = false;
    }
  }

  get #videoPath() {
    return `videos/${encodeURIComponent(this.#task.taskId)}.mp4`;
  }

  /** Straight from the server. With a key, which a player can't send, the page fetches the video into a blob. */
  async #loadVideo() {
    const { download, video } = this.#parts;
    let source = this.#videoPath;
    try {
      if (currentKey() !== null) source = await this.#fetchVideo();
    } catch (error) {
      await this.#videoFailed(error);
      return;
    }
    if (this.#removed) return;
    this.#say("");
    video.src = download.href = source;
    download.download = `${this.#task.taskId}.mp4`;
  }

  async #fetchVideo() {
    this.#say("Loading the video …");
    const response = await request(this.#videoPath, { background: true, patient: true });
    this.#blobUrl = URL.createObjectURL(await unlessLost(response.blob()));
    return this.#blobUrl;
  }

  /** The player does not say why it failed, so ask the server. */
  async #explainVideo() {
    const key = currentKey();
    try {
      await request(this.#videoPath, { headers: { Range: "bytes=0-0" } });
    } catch (error) {
      await this.#videoFailed(error);
      return;
    }
    if (currentKey() !== key) await this.#loadVideo();
    else this.#say("This browser can’t play the video. You can download it.");
  }

  async #videoFailed(error) {
    if (!(error instanceof ApiError)) throw error;
    this.#say(error.message);
    if (!error.isTemporary && error.status !== 401) return;
    await pause(pollDelay(3, error.retryAfter ?? 0));
    if (!this.#removed) nearby.observe(this.#parts.video);
  }

  async #copyLink() {
    const { copy } = this.#parts;
    copy.textContent = await copied(this.#task.status.video_url) ? "Copied" : "Copying is not allowed";
    await pause(2_000);
    copy.textContent = "Copy link";
  }

  #remove() {
    this.#removed = true;
    forget(this.#task);
    this.element.remove();
    if (this.#blobUrl !== null) URL.revokeObjectURL(this.#blobUrl);
  }
}

/** Change the text only if it differs: a live region announces each change. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

function stageInWords(status) {
  if (status?.queue_position > 1) return `In the queue, ${status.queue_position - 1} ahead of it`;
  if (status?.queue_position === 1) return "In the queue, next to start";
  return STAGES[status?.stage] ?? "Accepted";
}

function timeInWords(elapsed, estimate) {
  return estimate === null ? clock(elapsed) : `${clock(elapsed)} of about ${clock(estimate)}`;
}

function settingsInWords(input) {
  const { duration, resolution, aspect_ratio, model, image, ...others } = input;
  const numbers = Object.entries(others).filter(([, value]) => typeof value === "number");
  const extras = [model, ...numbers.map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`), image && "from an image"];
  return [`${duration} s`, resolution, aspect_ratio, ...extras.filter(Boolean)].join(" · ");
}

function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Copy the text; true if that worked. Browsers have navigator.clipboard over https and on localhost only. */
async function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  const worked = document.execCommand("copy");
  area.remove();
  return worked;
}
