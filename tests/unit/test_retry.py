"""The retry policy's log lines."""

from __future__ import annotations

import httpx
import pytest

from contract.retry import RetryPolicy


@pytest.mark.parametrize(
    ("error", "reason"), [(httpx.ReadTimeout(""), "ReadTimeout"), (httpx.ReadTimeout("no answer"), "no answer")]
)
def test_a_retry_says_why_also_after_an_error_without_a_text(
    caplog: pytest.LogCaptureFixture, error: httpx.HTTPError, reason: str
) -> None:
    def fail() -> None:
        raise error

    retrying = RetryPolicy(attempts=2).retrying(httpx.HTTPError, what="the request", sleep=lambda _: None)
    with pytest.raises(httpx.ReadTimeout):
        retrying(fail)
    (line,) = caplog.messages
    assert line.startswith("the request failed, retrying in ")
    assert line.endswith(f" s: {reason}")
