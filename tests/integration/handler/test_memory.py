"""The worker's memory while it renders the longest and largest video."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.s3_servers import juicefs

#: Runs in its own process, because a peak cannot be reset. Samples the resident memory of the worker and its children.
#: One step is enough: each step needs the same memory.
SCRIPT = """
import json, threading, psutil
from handler.settings import WorkerSettings
from handler.video_model.loader import load_model
from handler.worker import Job, Worker
from storage.bucket import Bucket
from storage.settings import BucketSettings

worker = Worker(load_model(WorkerSettings(model_path="demo")), Bucket(BucketSettings()), version="1")
me = psutil.Process()
loaded, done, peak = me.memory_info().rss, threading.Event(), 0

def watch():
    global peak
    while not done.wait(0.05):
        family = [me, *me.children(recursive=True)]
        peak = max(peak, sum(process.memory_info().rss for process in family if process.is_running()))

thread = threading.Thread(target=watch)
thread.start()
job_input = {"prompt": "A paper boat", "duration": 10, "resolution": "1080p", "num_inference_steps": 1}
result = worker.run(Job("task-1", job_input), lambda _: None, threading.Event())
done.set()
thread.join()
print(json.dumps({"loaded": loaded, "peak": peak, "frames": result.num_frames}))
"""


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_render_of_1080p_and_ten_seconds_grows_by_less_than_1_5_gb(tmp_path: Path) -> None:
    with juicefs(tmp_path) as bucket:
        environment = {
            "BUCKET_ENDPOINT_URL": str(bucket.endpoint_url),
            "BUCKET_ACCESS_KEY_ID": bucket.access_key_id,
            "BUCKET_SECRET_ACCESS_KEY": bucket.secret_access_key.get_secret_value(),
            "BUCKET_NAME": bucket.name,
        }
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
        )
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    assert seen["frames"] == 241
    growth = (seen["peak"] - seen["loaded"]) / 1e9
    assert growth < 1.5, f"grew by {growth:.2f} GB, ffmpeg included"
