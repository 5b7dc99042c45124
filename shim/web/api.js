/** The server's API: requests with the key, and every failure as one kind of error. */

const ANSWER_WITHIN = 20_000; // ms
const KEY = "hunyuan.key";

/** Why a request came to nothing. `code` is the server's error_code, "" where it gave none. */
export class ApiError extends Error {
  constructor(text, { code = "", status = 0, retryAfter = null } = {}) {
    super(text);
    this.code = code;
    this.status = status; // 0: no answer came
    this.retryAfter = retryAfter; // seconds
  }

  /** Whether the same request may do later. */
  get passes() {
    return this.status === 0 || this.status === 408 || this.status === 429 || this.status >= 500;
  }

  /** Whether it may have been done all the same: the server's own answer, which has a code, did not come through. */
  get isLost() {
    return this.status === 0 || (this.status >= 500 && this.code === "");
  }
}

/** The API key that was given, or null. */
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

/** `askForKey(wrong)` has the user give a key and says whether there is one; `wrong`: the last one was refused. */
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
 * The response, if it is a good one; else throws ApiError. Where a key is needed the user is asked for it; a request
 * in the `background` does not ask again who has declined. Paths are relative to the page.
 */
export async function request(path, { method = "GET", body, headers = {}, background = false, patient = false } = {}) {
  for (;;) {
    const key = currentKey();
    const response = await unlessLost(fetch(new URL(path, document.baseURI), {
      method,
      body,
      headers: { ...headers, ...(key !== null && { Authorization: `Bearer ${key}` }) },
      signal: patient ? null : AbortSignal.timeout(ANSWER_WITHIN),
    }));
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401 || (background && declined)) throw error;
    if (key === currentKey() && !await keyFromUser(key !== null)) throw error;
  }
}

/** The decoded answer to such a request. */
export async function json(path, options) {
  const response = await request(path, options);
  return unlessLost(response.json());
}

/** What it resolves to; ApiError where the connection fails it. */
export async function unlessLost(pending) {
  try {
    return await pending;
  } catch {
    throw new ApiError("The server can’t be reached"); // no network, no server, too slow, or broken off
  }
}

async function errorOf(response) {
  const answer = await response.json().catch(() => ({})); // a proxy's own words, say
  return new ApiError(answer.error ?? `The server answered ${response.status}`, {
    code: answer.error_code,
    status: response.status,
    retryAfter: Number.parseInt(response.headers.get("Retry-After"), 10) || null,
  });
}
