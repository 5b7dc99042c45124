"""What both trainings share: options, optimizers, averaged weights, and the checkpoint that a run goes on from."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from tools.demo_model.optimizer import Muon

log = logging.getLogger(__name__)


class Training:
    """A model with its optimizers, its averaged weights, and its `state`: seconds and steps so far.

    Goes on from `path`, if it exists. `rates` are the largest of Muon, for `matrices`, and of Adam, for `others`.
    """

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        rates: tuple[float, float],
        rows: int | None = None,
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._model, self._others, self._rates = path, model, list(others), rates
        self._optimizers: list[torch.optim.Optimizer] = [
            Muon(matrices, rates[0], rows=rows),
            torch.optim.Adam(self._others, rates[1], betas=(0.9, 0.98)),
        ]
        self.average = {name: p.detach().clone() for name, p in model.state_dict().items()}
        self.state: dict[str, float] = {"elapsed": 0.0, "step": 0}
        if path.exists():
            saved = torch.load(path, weights_only=True)
            model.load_state_dict(saved["model"])
            for optimizer, kept in zip(self._optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.average, self.state = saved["average"], saved["state"]
            log.info("continue from step %d", self.state["step"])

    def step(self, loss: torch.Tensor, share: float, keep: float) -> None:
        """One step with a `share` of the rates. The average keeps `keep` of itself, less in the first steps."""
        self._model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._others, 1.0)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
        self.state["step"] += 1
        keep = min(keep, self.state["step"] / (self.state["step"] + 10))
        with torch.no_grad():
            for name, p in self._model.state_dict().items():
                self.average[name].lerp_(p, 1 - keep)

    def save(self, elapsed: float) -> None:
        """Writes the checkpoint after so many seconds in all; a kill leaves the one before."""
        self.state["elapsed"] = elapsed
        new = self._path.with_suffix(".new")
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        kept = {"model": self._model.state_dict(), "optimizers": optimizers}
        torch.save({**kept, "average": self.average, "state": self.state}, new)
        new.replace(self._path)


def options(description: str | None, minutes: float) -> argparse.ArgumentParser:
    """Of the command line of a training, for `started`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--out", type=Path, default=Path(".cache/demo-model"))
    parser.add_argument("--threads", type=int, default=1)
    return parser


def started(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of this process, with which its threads and its log are set up."""
    found = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(found.threads)
    return found
