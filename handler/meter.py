"""Progress of one job: what its stages report becomes one percentage, with previews, and the time of each stage."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final, Self

from contract import tracing
from contract.result import Progress, Stage
from handler.watchdog import Watch

#: Percent at which each stage begins and ends. DENOISING and UPSCALING share one span. DECODING covers the encoder,
#: which takes frames while the model decodes the next ones.
_SPANS: Final[Mapping[Stage, tuple[float, float]]] = {
    Stage.ENCODING_PROMPT: (0, 2),
    Stage.DENOISING: (2, 80),
    Stage.UPSCALING: (2, 80),
    Stage.DECODING: (80, 97),
    Stage.STORING: (97, 99),
}
#: Seconds between two reports in the same stage: while the percentage rises, and while it does not. The second kind
#: shows that the worker is alive.
_REPORT_INTERVAL: Final = 1.0
_UNCHANGED_REPORT_INTERVAL: Final = 5.0

OnProgress = Callable[[Progress], None]
log = logging.getLogger(__name__)


class Meter:
    """Turns fractions of stages into one percentage that never falls, and measures the time of each stage."""

    def __init__(self, on_progress: OnProgress, watch: Watch) -> None:
        self._on_progress = on_progress
        self._watch = watch
        self._started = time.monotonic()
        self._stage = Stage.ENCODING_PROMPT
        self._stage_started = self._started
        self._percent = 0
        self._seconds: dict[str, float] = {}
        self._reported: Progress | None = None
        self._make_preview: Callable[[], bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """The stage that failed has a span, too. STORING has its own."""
        if error is not None and self._stage is not Stage.STORING:
            tracing.record(self._stage, time.monotonic() - self._stage_started)

    def reach(self, stage: Stage, fraction: float) -> None:
        """This fraction of the stage is done."""
        self._watch.step()
        self._advance(stage, _SPANS[stage], fraction)

    def offer_preview(self, make: Callable[[], bytes]) -> None:
        """The next report has this preview, unless a newer one is offered before."""
        self._make_preview = make

    def encoded(self, fraction: float) -> None:
        """This fraction of the video is encoded."""
        self._watch.advance()
        self._advance(Stage.DECODING, _SPANS[Stage.DECODING], fraction)

    def keep_alive(self) -> None:
        """Nothing has changed. Reports the same again from time to time."""
        self._advance(self._stage, (0, 0), 0.0)

    def timings(self) -> Mapping[str, float]:
        """Seconds in each stage so far, and in `total`."""
        now = time.monotonic()
        seconds = {**self._seconds, self._stage.value: now - self._stage_started, "total": now - self._started}
        return {name: round(value, 3) for name, value in seconds.items()}

    def _advance(self, stage: Stage, span: tuple[float, float], fraction: float) -> None:
        # 1. Close the stage that ended
        now = time.monotonic()
        if stage is not self._stage:
            self._seconds[self._stage.value] = now - self._stage_started
            tracing.record(self._stage, now - self._stage_started)
            log.info("%s took %.1f s, next is %s", self._stage, now - self._stage_started, stage)
            self._stage, self._stage_started = stage, now
        # 2. Raise the percentage
        begin, end = span
        self._percent = max(self._percent, int(begin + (end - begin) * min(fraction, 1.0)))
        # 3. Report it, unless that was done a moment ago
        progress = Progress(progress=self._percent, stage=stage, elapsed_time=round(now - self._started, 3))
        if self._is_due(progress):
            self._reported, make, self._make_preview = progress, self._make_preview, None
            self._on_progress(progress.model_copy(update={"preview": make()}) if make is not None else progress)

    def _is_due(self, progress: Progress) -> bool:
        last = self._reported
        if last is None or last.stage is not progress.stage:
            return True
        interval = _UNCHANGED_REPORT_INTERVAL if last.progress == progress.progress else _REPORT_INTERVAL
        return progress.elapsed_time - last.elapsed_time >= interval
