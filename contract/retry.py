"""The retry policy that every retry of this project uses, built on tenacity.

It is part of the contract because the deadlines of both sides must fit: a worker retries delivering its result for
longer than the server waits for its database.
"""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tenacity import AsyncRetrying, RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_before_delay
from tenacity.stop import stop_any

log = logging.getLogger(__name__)

#: Which errors are retried: a class, several classes, or a predicate.
Retryable = type[Exception] | tuple[type[Exception], ...] | Callable[[BaseException], bool]


def _nothing(_: BaseException) -> float:
    return 0.0


@dataclass(frozen=True)
class RetryPolicy:
    """When to retry and when to give up. Times in seconds.

    The wait after the n-th failure is `first * 2**(n-1)`, at most `longest`, shortened at random by up to a half so
    that many clients of a restarted server do not return at the same moment. The last error is raised when the next
    attempt would start later than `total` after the first one, or after `attempts` attempts.

        for attempt in RetryPolicy(total=60).retrying(OSError, what="upload"):
            with attempt:
                upload()
    """

    first: float = 1.0
    longest: float = 30.0
    total: float = float("inf")
    attempts: int = 1_000_000

    def wait_after(self, failures: int) -> float:
        """The wait after that many failures in a row."""
        exponential = self.first * 2.0 ** min(failures - 1, 64)
        return min(exponential, self.longest) * random.uniform(0.5, 1.0)  # nosec B311 # jitter

    def retrying(
        self,
        on: Retryable,
        *,
        what: str,
        sleep: Callable[[float], None] = time.sleep,
        at_least: Callable[[BaseException], float] = _nothing,
    ) -> Retrying:
        """tenacity's `Retrying` for blocking code. Each retry logs a warning that begins with `what`.

        `sleep` does the waiting; what it raises ends the retries. `at_least` as in `async_retrying`.
        """
        return Retrying(sleep=sleep, **self._options(on, what, at_least))

    def async_retrying(
        self, on: Retryable, *, what: str, at_least: Callable[[BaseException], float] = _nothing
    ) -> AsyncRetrying:
        """The same for coroutines. `at_least` returns the shortest wait after an error, for example its Retry-After."""
        return AsyncRetrying(**self._options(on, what, at_least))

    def _options(self, on: Retryable, what: str, at_least: Callable[[BaseException], float]) -> dict[str, Any]:
        def wait(state: RetryCallState) -> float:
            return max(self.wait_after(state.attempt_number), min(at_least(_error(state)), self.longest))

        def warn(state: RetryCallState) -> None:
            error = _error(state)
            why = str(error) or type(error).__name__  # some of httpx's errors have no text
            log.warning("%s failed, retrying in %.1f s: %s", what, state.upcoming_sleep, why)

        return {
            "retry": retry_if_exception((lambda exc: isinstance(exc, on)) if isinstance(on, type | tuple) else on),
            "wait": wait,
            "stop": stop_any(stop_before_delay(self.total), stop_after_attempt(self.attempts)),
            "before_sleep": warn,
            "reraise": True,
        }


def _error(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome is not None else None
    assert error is not None  # noqa: S101 - only failures are retried
    return error
