"""The environment variables that point RunPod's SDK at this server instead of RunPod."""

from typing import Final

#: The endpoint id of our own platform: `/v2/local/run` and so on.
ENDPOINT_ID: Final = "local"


def worker_environment(base_url: str, endpoint_id: str, worker_id: str, token: str) -> dict[str, str]:
    """The variables that the SDK's worker loop reads.

    `base_url` ends in /v2. The SDK appends `&…` to these URLs whether or not they have a query, so each has one.
    """
    base = f"{base_url}/{endpoint_id}"
    return {
        "RUNPOD_WEBHOOK_GET_JOB": f"{base}/job-take/$ID?source=hunyuan",
        "RUNPOD_WEBHOOK_POST_OUTPUT": f"{base}/job-done/$RUNPOD_POD_ID/$ID?source=hunyuan",
        "RUNPOD_WEBHOOK_POST_STREAM": f"{base}/job-stream/$RUNPOD_POD_ID/$ID?source=hunyuan",
        "RUNPOD_WEBHOOK_PING": f"{base}/ping/$RUNPOD_POD_ID?source=hunyuan",
        "RUNPOD_PING_INTERVAL": "5000",
        "RUNPOD_POD_ID": worker_id,
        "RUNPOD_AI_API_KEY": token,
        # The SDK's start-up checks query a public name server and fail where there is none.
        "RUNPOD_SKIP_AUTO_SYSTEM_CHECKS": "true",
        "RUNPOD_SKIP_GPU_CHECK": "true",
        "HUNYUAN_WORKER_REPORT_URL": f"{base}/worker-report/$RUNPOD_POD_ID",
    }
