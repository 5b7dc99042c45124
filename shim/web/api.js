/** Requests to the server's API with the key. Every failure is an ApiError. */

const TIMEOUT = 20_000; // ms
const SILENCE = 40_000; // ms; a stream of the server is never silent for longer than 15 s
const KEY = "hunyuan.key";

/** A request that failed. `code` is the server's error_code, "" without one. */
export class ApiError extends Error {
  constructor(text, { code = "", status = 0, retryAfter = null } = {}) {
    super(text);
    this.code = code;
    this.status = status; // 0: no response
    this.retryAfter = retryAfter; // seconds
  }

  /** Whether the same request may succeed later. */
  get isTemporary() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }

  /** Whether the server may have handled the request: its own response, which has a code, did not arrive. */
  get isLost() {
    return this.status === 0 || (this.status >= 500 && this.code === "");
  }
}

/** The user's API key, or null. */
export function currentKey() {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY);
}

/** Keep the key for this tab, or for this browser; null forgets it. */
export function keepKey(key, remember) {
  sessionStorage.removeItem(KEY);
  localStorage.removeItem(KEY);
  if (key !== null) (remember ? localStorage : sessionStorage).setItem(KEY, key);
}

let ask = async () => false;
let asking = null;
let declined = false;

/** `askForKey(wrong)` asks the user for a key and resolves to whether there is one; `wrong`: the last one was invalid. */
export function onKeyNeeded(askForKey) {
  ask = askForKey;
}

function keyFromUser(wrong) {
  asking ??= ask(wrong).then((given) => {
    declined = !given;
    asking = null;
    return given;
  });
  return asking;
}

/**
 * The response, if its status is 2xx; otherwise throws ApiError. On a 401 it asks the user for a key and retries, except
 * in the `background` after the user has declined. A `patient` request has no timeout, and one with a `signal` ends with
 * it. Paths are relative to the page.
 */
export async function request(path, {
  method = "GET", body, headers = {}, background = false, patient = false, signal = null,
} = {}) {
  for (;;) {
    const key = currentKey();
    const response = await unlessLost(fetch(new URL(path, document.baseURI), {
      method,
      body,
      headers: { ...headers, ...(key !== null && { Authorization: `Bearer ${key}` }) },
      signal: patient ? signal : AbortSignal.timeout(TIMEOUT),
    }));
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || (background && declined)) throw error;
    if (key === currentKey() && !await keyFromUser(key !== null)) throw error;
  }
}

/** The decoded body of the response to such a request. */
export async function json(path, options) {
  const response = await request(path, options);
  return unlessLost(response.json());
}

/** What each event of a stream decodes to, until it ends or `stop` (an AbortController) is aborted: then ApiError, too. */
export async function* streamed(path, stop) {
  let timer = setTimeout(() => stop.abort("silence"), TIMEOUT);
  try {
    const response = await request(path, { background: true, patient: true, signal: stop.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    for (;;) {
      const { done, value } = await unlessLost(reader.read());
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => stop.abort("silence"), SILENCE);
      const events = (text + value).split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.split("\n").find((line) => line.startsWith("data: "));
        if (data) yield JSON.parse(data.slice("data: ".length));
      }
    }
  } finally {
    clearTimeout(timer);
    stop.abort();
  }
}

/** What `pending` resolves to; ApiError if the connection fails. */
export async function unlessLost(pending) {
  try {
    return await pending;
  } catch {
    throw new ApiError("The server can’t be reached"); // no network, no server, a timeout, or a connection that broke
  }
}

async function errorOf(response) {
  const answer = await response.json().catch(() => ({})); // a proxy's error may not be JSON
  return new ApiError(answer.error ?? `The server responded with ${response.status}`, {
    code: answer.error_code,
    status: response.status,
    retryAfter: Number.parseInt(response.headers.get("Retry-After"), 10) || null,
  });
}
