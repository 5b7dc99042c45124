/** A task on the page: its progress while it runs, then its video or its error. */

import { ApiError, currentKey, json, request, unlessLost } from "./api.js";
import { changes, forget, hasEnded, keep, pause, pollDelay, submit } from "./tasks.js";
import { inWords, megabytes, setText, settingsInWords, stageInWords, timeInWords } from "./words.js";

/** Of tasks that the server ran and lost. It has deleted or never had the others. */
const RETRYABLE = ["GENERATION_FAILED", "OOM_ERROR", "STORAGE_UNAVAILABLE"];
const PARTS = [
  "video", "preview", "prompt", "settings", "progress", "stage", "percent", "bar", "time", "problem", "detail",
  "cancel", "download", "again", "reuse", "reseed", "copy", "remove",
];
const TALL = 1; // width to height, below which a card takes two rows
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** A video is loaded when its player comes near the visible part of the page. */
const nearby = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    nearby.unobserve(target);
    target.dispatchEvent(new Event("nearby"));
  }
}, { rootMargin: "300px" });

/**
 * Shows `task` until it is removed. `onReuse(input, part)`: the user wants to edit these settings, `part` first;
 * `onAgain(input)`: they want a video with them now; `onRemove()`: the task was removed.
 */
export class Card {
  #task;
  #parts;
  #removed = false;
  #refused = false; // a retry
  #updatedAt = 0; // by performance.now()
  #blobUrls = [];
  #previewing = false;
  #previewPath = null; // of the latest preview

  constructor(task, { onReuse, onAgain, onRemove }) {
    this.#task = task;
    this.element = document.getElementById("card").content.firstElementChild.cloneNode(true);
    this.#parts = Object.fromEntries(PARTS.map((name) => [name, this.element.querySelector(`.${name}`)]));
    this.#describe();
    const { again, cancel, copy, remove, reseed, reuse, video } = this.#parts;
    cancel.addEventListener("click", () => this.#cancel());
    copy.addEventListener("click", () => copied(this.#task.status.video_url, copy));
    again.addEventListener("click", () => {
      if (this.#canRetry) this.#retry();
      else onAgain(this.#isCompleted ? withoutSeed(task.input) : task.input);
    });
    reuse.addEventListener("click", () => onReuse(task.input));
    reseed.addEventListener("click", () => onReuse({ ...task.input, seed: this.#seed }, "prompt"));
    remove.addEventListener("click", () => { this.#remove(); onRemove(); });
    video.addEventListener("nearby", () => this.#loadVideo());
    video.addEventListener("error", () => this.#explainVideo());
    video.addEventListener("pointerenter", ({ pointerType }) => { if (pointerType === "mouse") this.#startPreview(); });
    video.addEventListener("pointerleave", () => this.#endPreview());
    video.addEventListener("click", () => { this.#previewing = false; }); // the user plays it
    this.#render();
    this.#follow();
  }

  #describe() {
    const { preview, prompt, settings, video } = this.#parts;
    const { id, input } = this.#task;
    prompt.id = `prompt-${id}`;
    prompt.textContent = input.prompt;
    settings.textContent = settingsInWords(input);
    for (const named of [this.element.firstElementChild, video]) named.setAttribute("aria-labelledby", prompt.id);
    [video.width, video.height] = input.aspect_ratio.split(":").map(Number); // the player's shape until the video is loaded
    preview.style.aspectRatio = `${video.width} / ${video.height}`; // the place of the video: nothing moves when it comes
    this.element.dataset.tall = String(video.width / video.height < TALL);
  }

  get #isCompleted() {
    return this.#task.status?.status === "completed";
  }

  /** Whether the server can make the video under the same id. */
  get #canRetry() {
    return !this.#refused && this.#task.taskId !== null && RETRYABLE.includes(this.#task.status?.error_code);
  }

  /** The seed of the video; undefined if the server chose it and does not say. */
  get #seed() {
    return this.#task.status?.seed ?? this.#task.input.seed;
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
    const { again, bar, cancel, copy, download, percent, preview, progress, remove, reseed, stage } = this.#parts;
    const { status, taskId } = this.#task;
    const ended = hasEnded(this.#task);
    const completed = this.#isCompleted;
    progress.hidden = cancel.hidden = ended;
    preview.hidden = ended || (status?.stage ?? "queued") === "queued";
    download.hidden = copy.hidden = !completed;
    reseed.hidden = !completed || this.#seed === undefined;
    again.hidden = remove.hidden = !ended;
    if (completed) again.textContent = "New seed";
    else again.textContent = this.#canRetry ? "Retry" : "Try again";
    if (completed) {
      this.#renderVideo();
    } else if (ended) {
      this.#renderFailure();
    } else {
      cancel.textContent = taskId === null ? "Give up" : "Cancel";
      setText(stage, taskId === null ? "Sending" : stageInWords(status));
      bar.value = status?.progress ?? 0;
      percent.textContent = `${bar.value} %`;
      this.#showPreview(status?.preview_url);
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

  /** Show the preview at `url` if it is a new one. The one before stays until it is loaded. */
  async #showPreview(url) {
    const path = url == null ? null : `tasks/${encodeURIComponent(this.#task.taskId)}/preview.jpg${new URL(url).search}`;
    if (path === null || path === this.#previewPath) return;
    this.#previewPath = path;
    const image = this.#parts.preview.firstElementChild;
    try {
      const blob = await unlessLost((await request(path, { background: true })).blob());
      const before = image.src;
      image.onload = () => URL.revokeObjectURL(before);
      image.src = URL.createObjectURL(blob);
      image.alt = "Preview of the video as it forms";
    } catch (error) {
      if (!(error instanceof ApiError)) throw error; // the task has ended, or the next preview comes
    }
  }

  #renderVideo() {
    const { preview, settings, video } = this.#parts;
    settings.textContent = `${settingsInWords(this.#task.input)} · ${megabytes(this.#task.status.file_size)}`;
    video.hidden = false;
    if (!video.poster) video.poster = preview.firstElementChild.src; // until the poster is loaded
    nearby.observe(video);
  }

  #renderFailure() {
    const { error, error_code: code } = this.#task.status;
    const { text, detail } = inWords(error, code);
    this.#say(text);
    this.#parts.detail.textContent = detail;
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

  /** Queue the failed task again, under its id. */
  async #retry() {
    const { again, detail } = this.#parts;
    again.disabled = true;
    try {
      const status = await json(`tasks/${encodeURIComponent(this.#task.taskId)}/retry`, { method: "POST" });
      detail.textContent = "";
      this.#task.status = null;
      this.#update(status);
      this.#follow();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      this.#say(inWords(error.message, error.code).text);
      if (!error.isTemporary) {
        this.#refused = true;
        again.textContent = "Try again";
      }
    } finally {
      again.disabled = false;
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
      await this.#loadPoster();
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
    return this.#blobOf(response);
  }

  async #loadPoster() {
    const path = this.#posterPath;
    if (path === null) return;
    try {
      const poster = currentKey() === null ? path : await this.#blobOf(await request(path, { background: true }));
      this.#parts.video.poster = poster;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error; // the video plays without a poster, too
    }
  }

  /** The poster's path on this server: its URL begins as the video's does. null without a poster. */
  get #posterPath() {
    const { poster_url: poster, video_url: video } = this.#task.status;
    const base = video.slice(0, video.lastIndexOf("videos/"));
    return poster?.startsWith(base) ? poster.slice(base.length) : null;
  }

  async #blobOf(response) {
    const url = URL.createObjectURL(await unlessLost(response.blob()));
    this.#blobUrls.push(url);
    return url;
  }

  /** The video plays while the mouse is over it, unless the user plays it or wants no motion. */
  #startPreview() {
    const { video } = this.#parts;
    if (!video.paused || video.currentTime > 0 || calm.matches) return;
    this.#previewing = video.loop = true;
    video.play().catch(() => { this.#previewing = false; }); // the mouse has left, or the browser does not allow it
  }

  #endPreview() {
    const { video } = this.#parts;
    video.loop = false;
    if (!this.#previewing) return;
    this.#previewing = false;
    video.pause();
    video.currentTime = 0;
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

  #remove() {
    this.#removed = true;
    forget(this.#task);
    this.element.remove();
    for (const url of [...this.#blobUrls, this.#parts.preview.firstElementChild.src]) URL.revokeObjectURL(url);
  }
}

function withoutSeed({ seed, ...input }) {
  return input;
}

/** Copy the text, and show on the button for two seconds whether that worked. */
export async function copied(text, button) {
  const label = button.textContent;
  button.textContent = await copy(text) ? "Copied" : "Copying is not allowed";
  await pause(2_000);
  button.textContent = label;
}

/** True if the text was copied. Browsers have navigator.clipboard over https and on localhost only. */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const area = document.body.appendChild(document.createElement("textarea"));
  area.value = text;
  area.select();
  const worked = document.execCommand("copy");
  area.remove();
  return worked;
}
