/** What the page says: of errors, and of a video's stage, time, settings and size. */

/** What each error code means to a person, and what they can do. A test compares the codes with the server's. */
export const WORDS = {
  INVALID_PROMPT: "The prompt does not fit. Write 10 to 500 characters.",
  INVALID_DURATION: "This duration is not possible. Choose 5 to 10 seconds.",
  INVALID_RESOLUTION: "This resolution is not possible. Choose 720p or 1080p.",
  INVALID_MODEL: "This server does not have that model. Choose another one.",
  INVALID_REQUEST: "The server does not accept these settings. Change the one that is named below.",
  REQUEST_TOO_LARGE: "The request is too large. Choose a smaller picture.",
  UNAUTHORIZED: "This server needs a valid API key. Enter yours with “API key” at the top.",
  NOT_FOUND: "This page and the server do not match. Reload the page.",
  METHOD_NOT_ALLOWED: "This page and the server do not match. Reload the page.",
  TASK_NOT_FOUND: "The server no longer has this video.",
  VIDEO_NOT_READY: "This video is not ready, or it is no longer in the store.",
  NO_PREVIEW: "There is no preview of this video now.",
  NOT_RETRYABLE: "This video can’t be tried again. Make it again instead.",
  NOT_SUPPORTED: "This server can’t do that.",
  VIDEO_DELETED: "This video was deleted. You can make it again.",
  RANGE_NOT_SATISFIABLE: "The player asked for a part that the video does not have. Reload the page.",
  REQUEST_TIMEOUT: "The request took too long to arrive. Check your connection and try again.",
  IDEMPOTENCY_KEY_REUSED: "This request was sent before with other settings. Send it again.",
  HOST_NOT_ALLOWED: "The server does not answer to this name. Open the page by the server’s IP address.",
  RATE_LIMITED: "You have asked for many videos in a short time. Wait a little.",
  HEADERS_TOO_LARGE: "The browser sent too many headers. Delete this site’s cookies and try again.",
  SERVER_BUSY: "The server is very busy. Wait a little.",
  QUEUE_FULL: "Too many videos are waiting. Wait until one is done.",
  MODEL_NOT_LOADED: "The server can’t make videos yet.",
  QUEUE_UNAVAILABLE: "The server can’t reach its queue. Wait a little; your videos are safe.",
  STORAGE_UNAVAILABLE: "The store for the videos does not answer. Try again later.",
  INTERNAL_ERROR: "The server has a fault. Its operator finds the details in its log.",
  OOM_ERROR: "The GPU ran out of memory. Choose a shorter video or 720p.",
  GENERATION_FAILED: "The video could not be made. Try again, or change the prompt.",
  CANCELLED: "This video was cancelled.",
};

/** An error as a person reads it, and the server's own words as the detail; the detail is "" if there is nothing to add. */
export function inWords(message, code) {
  const words = WORDS[code];
  return words === undefined ? { text: message, detail: "" } : { text: words, detail: `${message} (${code})` };
}

/** Change the text only if it differs: a live region announces each change. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const STAGES = {
  queued: "In the queue",
  encoding_prompt: "Reading the prompt",
  denoising: "Forming the video",
  upscaling: "Adding detail",
  decoding: "Drawing the frames",
  storing: "Storing the video",
};

/** What a waiting or running task does. */
export function stageInWords(status) {
  if (status?.queue_position > 1) return `In the queue, ${status.queue_position - 1} ahead of it`;
  if (status?.queue_position === 1) return "In the queue, next to start";
  return STAGES[status?.stage] ?? "Accepted";
}

/** How long it has taken, and how long it will take if that is known. */
export function timeInWords(elapsed, estimate) {
  if (estimate === null) return clock(elapsed);
  const left = estimate - elapsed;
  return `${clock(elapsed)} · ${left > 0 ? `about ${roundly(left)} left` : `longer than the ${roundly(estimate)} expected`}`;
}

/** Seconds in words that change seldom: 45 s, 3 min. */
function roundly(seconds) {
  return seconds < 90 ? `${Math.ceil(seconds / 5) * 5} s` : `${Math.ceil(seconds / 60)} min`;
}

/** The settings of a video in one line. */
export function settingsInWords(input) {
  const { duration, resolution, aspect_ratio, model, image, ...others } = input;
  const numbers = Object.entries(others).filter(([, value]) => typeof value === "number");
  const extras = [model, ...numbers.map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`), image && "from an image"];
  return [`${duration} s`, resolution, aspect_ratio, ...extras.filter(Boolean)].join(" · ");
}

/** Seconds as 1:05. */
function clock(seconds) {
  return `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
}

export function megabytes(bytes) {
  return `${(bytes / 1e6).toFixed(1)} MB`;
}
