"""Generates a video with Python and requests: python generate.py "A paper boat on a rainy street at night" [FILE]

HUNYUAN_SERVER is the server's address. HUNYUAN_API_KEY is its key, if it needs one.
"""

import os
import sys
import time
import uuid
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry


def session() -> requests.Session:
    """A session that retries after 429, 503 and lost connections, after the seconds in Retry-After."""
    retry = Retry(total=6, backoff_factor=1, status_forcelist=(429, 503), allowed_methods=None, raise_on_status=False)
    made = requests.Session()
    for scheme in ("http://", "https://"):
        made.mount(scheme, HTTPAdapter(max_retries=retry))
    if key := os.environ.get("HUNYUAN_API_KEY"):
        made.headers["Authorization"] = f"Bearer {key}"
    return made


def generate(http: requests.Session, server: str, prompt: str, file: str) -> None:
    """Submits the prompt, waits for its video and saves it."""
    answer = http.post(
        f"{server}/generate",
        json={"prompt": prompt, "duration": 5, "resolution": "720p"},
        headers={"Idempotency-Key": str(uuid.uuid4())},  # a retry with the same key returns the same task
        timeout=60,
    )
    if not answer.ok:
        sys.exit(f"refused: {answer.json()['error']} ({answer.json()['error_code']})")
    task_id = answer.json()["task_id"]
    while (status := http.get(f"{server}/status/{task_id}", timeout=60).json())["status"] == "processing":
        print(f"\r{status['progress']:3} % {status['stage']:<16}", end="", file=sys.stderr, flush=True)
        time.sleep(1)
    if status["status"] == "failed":
        sys.exit(f"failed: {status['error']} ({status['error_code']})")
    with http.get(status["video_url"], stream=True, timeout=60) as video, Path(file).open("wb") as output:
        video.raise_for_status()
        for chunk in video.iter_content(1 << 16):
            output.write(chunk)
    print(f"\nsaved {file}", file=sys.stderr)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    generate(
        session(),
        os.environ.get("HUNYUAN_SERVER", "http://localhost:8000"),
        sys.argv[1],
        sys.argv[2] if len(sys.argv) > 2 else "video.mp4",
    )
