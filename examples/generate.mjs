// Generates a video with Node.js 18 or newer, without packages: node generate.mjs "A paper boat on a rainy street at night" [FILE]
// HUNYUAN_SERVER is the server's address. HUNYUAN_API_KEY is its key, if it needs one.
import { randomUUID } from 'node:crypto';
import { createWriteStream } from 'node:fs';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { setTimeout as sleep } from 'node:timers/promises';

const server = process.env.HUNYUAN_SERVER ?? 'http://localhost:8000';
const key = process.env.HUNYUAN_API_KEY;
const [prompt, file = 'video.mp4'] = process.argv.slice(2);

/** Fetches. Retries after 429, 503 and lost connections, after the seconds in Retry-After. */
async function ask(url, options = {}) {
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  for (let attempt = 1; ; attempt++) {
    const response = await fetch(url, { ...options, headers }).catch((error) => {
      if (attempt === 5) throw error;
      return null;
    });
    const retriable = response === null || response.status === 429 || response.status === 503;
    if (!retriable || attempt === 5) {
      if (response.ok) return response;
      const { error, error_code: code } = await response.json();
      throw new Error(`${error} (${code})`);
    }
    await sleep(1000 * Number(response?.headers.get('retry-after') ?? attempt));
  }
}

async function generate() {
  const submitted = await ask(`${server}/generate`, {
    method: 'POST',
    headers: { 'Content-Type': 'application/json', 'Idempotency-Key': randomUUID() }, // a retry with the same key returns the same task
    body: JSON.stringify({ prompt, duration: 5, resolution: '720p' }),
  });
  const { task_id: taskId } = await submitted.json();
  for (;;) {
    const status = await (await ask(`${server}/status/${taskId}`)).json();
    if (status.status === 'failed') throw new Error(`${status.error} (${status.error_code})`);
    if (status.status === 'completed') {
      const video = await ask(status.video_url);
      await pipeline(Readable.fromWeb(video.body), createWriteStream(file));
      console.error(`\nsaved ${file}`);
      return;
    }
    process.stderr.write(`\r${String(status.progress).padStart(3)} % ${status.stage.padEnd(16)}`);
    await sleep(1000);
  }
}

if (prompt === undefined) {
  console.error('usage: node generate.mjs PROMPT [FILE]');
  process.exitCode = 2;
} else {
  await generate().catch((error) => {
    console.error(error.message);
    process.exitCode = 1;
  });
}
