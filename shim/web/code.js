/** A request as a program in other languages: sends it, waits for the video, and saves it. */

const WRITERS = { curl, python, node };

/** `language`: curl, python or node. `input`: the body of POST /generate. `needsKey`: the server needs an API key. */
export function codeFor(language, input, { server, needsKey }) {
  return WRITERS[language](input, server, needsKey);
}

function curl(input, server, needsKey) {
  const key = needsKey ? ' \\\n  -H "Authorization: Bearer $HUNYUAN_API_KEY"' : "";
  return `curl ${server}/generate${key} \\
  -H 'Content-Type: application/json' \\
  -d ${quoted(JSON.stringify(input))}

# With the task_id of the answer:
curl ${server}/status/TASK_ID${key}
curl -O ${server}/videos/TASK_ID.mp4${key}
`;
}

/** For a POSIX shell. */
function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

function python(input, server, needsKey) {
  const fields = Object.entries(input).map(([name, value]) => `    ${JSON.stringify(name)}: ${pythonValue(value)},\n`);
  return `${needsKey ? "import os\n" : ""}import time
import requests

server = ${JSON.stringify(server)}
session = requests.Session()
${needsKey ? 'session.headers["Authorization"] = f"Bearer {os.environ[\'HUNYUAN_API_KEY\']}"\n' : ""}body = {
${fields.join("")}}
response = session.post(f"{server}/generate", json=body)
response.raise_for_status()
task_id = response.json()["task_id"]

while (status := session.get(f"{server}/status/{task_id}").json())["status"] == "processing":
    print(status["progress"], "%", status["stage"])
    time.sleep(2)
if status["status"] == "failed":
    raise SystemExit(status["error"])

with open("video.mp4", "wb") as file:
    file.write(session.get(f"{server}/videos/{task_id}.mp4").content)
`;
}

/** A JSON text is a Python literal, except for true and false. */
function pythonValue(value) {
  if (typeof value === "boolean") return value ? "True" : "False";
  return JSON.stringify(value);
}

function node(input, server, needsKey) {
  const key = needsKey ? "{ Authorization: `Bearer ${process.env.HUNYUAN_API_KEY}` }" : "{}";
  return `// Node.js 18 or newer: save it as video.mjs
import { writeFile } from "node:fs/promises";
import { setTimeout } from "node:timers/promises";

const server = ${JSON.stringify(server)};
const headers = ${key};

async function ask(path, options = {}) {
  const response = await fetch(server + path, { ...options, headers: { ...headers, ...options.headers } });
  if (!response.ok) throw new Error(await response.text());
  return response;
}

const body = ${JSON.stringify(input, null, 2)};
const accepted = await ask("/generate", {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
});
const { task_id: taskId } = await accepted.json();

let status;
do {
  await setTimeout(2000);
  status = await (await ask(\`/status/\${taskId}\`)).json();
  console.log(status.status, status.progress ?? "");
} while (status.status === "processing");
if (status.status === "failed") throw new Error(status.error);

const video = await ask(\`/videos/\${taskId}.mp4\`);
await writeFile("video.mp4", Buffer.from(await video.arrayBuffer()));
`;
}
