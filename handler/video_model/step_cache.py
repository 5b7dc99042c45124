"""MagCache and TeaCache: steps whose blocks change the latent tokens as an earlier step did are not computed.

Both add the change that the blocks made in the last computed step, and differ in when they do. Each needs numbers that
are measured on a checkpoint; these are the published ones. LightX2V (https://github.com/ModelTC/LightX2V) has published
them at commit 4a4f5417, configs/hunyuan_video_15/cache/, and decides as here in lightx2v/models/networks/hunyuan_video/
infer/feature_caching/transformer_infer.py. diffusers has no TeaCache, and its MagCache has no ratios of its own for the
passes with the negative prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, StateManager

from handler.video_model.memory import CHUNK

_HOOK: Final = "step_cache"
#: diffusers' name for the passes with the negative prompt.
_NEGATIVE: Final = "pred_uncond"
#: Steps of a video unless `note_steps` says otherwise: those of every checkpoint that has published numbers.
_STEPS: Final = 50


class Passes(BaseState):  # type: ignore[misc] # diffusers is untyped
    """What is known of one kind of pass, with the prompt or with the negative prompt, of the current video."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets everything, for the next video."""
        self.step = 0
        self.computes = True
        self.entered: Any = None  # latent tokens before the first block, until the last one ends
        self.change: Any = None  # what the blocks added to them in the last computed step; None before it
        self.error = 0.0  # accumulated since the last computed step
        self.ratio = 1.0
        self.skipped = 0
        self.modulated: Sequence[torch.Tensor] = ()  # the first block's normed input in the step before, in chunks


@dataclass(frozen=True)
class Entry:
    """What enters the first block in a pass: its kind, the video's steps, the block and two of its inputs."""

    kind: str
    steps: int
    block: Any
    states: torch.Tensor  # (1, latent tokens, D)
    temb: torch.Tensor


class Rule(Protocol):
    """Decides which steps are computed."""

    def computes(self, passes: Passes, entry: Entry) -> bool:
        """Whether to compute step `passes.step`. Updates the rule's own numbers in `passes`.

        True as long as `passes.change` is None: there is nothing to add instead.
        """


@dataclass(frozen=True)
class MagCache:
    """Skips steps while the measured ratio of the changes' magnitudes, from step to step, stays near 1.

    `ratios` are those of a number of steps, with the prompt and with the negative prompt; another number of steps takes
    the nearest ones. At least the fraction `kept` of the steps is computed, from the first one on, and then one of each
    `longest` + 1. Source of the method: https://github.com/Zehong-Ma/MagCache.
    """

    ratios: tuple[Sequence[float], Sequence[float]]
    threshold: float = 0.24
    longest: int = 6
    kept: float = 0.2

    def computes(self, passes: Passes, entry: Entry) -> bool:
        """See `Rule`."""
        if passes.change is None or passes.step < int(entry.steps * self.kept):
            return True
        ratios = self.ratios[entry.kind == _NEGATIVE]
        passes.ratio *= ratios[round(passes.step * (len(ratios) - 1) / (entry.steps - 1))]
        passes.skipped += 1
        passes.error += abs(1 - passes.ratio)
        if passes.error < self.threshold and passes.skipped <= self.longest:
            return False
        passes.ratio, passes.skipped, passes.error = 1.0, 0, 0.0
        return True


@dataclass(frozen=True)
class TeaCache:
    """Skips steps until the input of the first block has changed enough, by a polynomial that was fitted to the output.

    `coefficients` begin with that of the highest power. The first and the last step are computed. Source of the method:
    https://arxiv.org/abs/2411.19108.
    """

    coefficients: Sequence[float]
    threshold: float = 0.15

    def computes(self, passes: Passes, entry: Entry) -> bool:
        """See `Rule`."""
        before = passes.modulated
        parts = torch.split(entry.states, CHUNK, dim=1)
        passes.modulated = [entry.block.norm1(part, emb=entry.temb)[0] for part in parts]
        if before and passes.step < entry.steps - 1:
            passes.error += float(np.polyval(self.coefficients, _relative_distance(passes.modulated, before)))
            if passes.error < self.threshold:
                return False
        passes.error = 0.0
        return True


def _relative_distance(after: Sequence[torch.Tensor], before: Sequence[torch.Tensor]) -> float:
    """The sum of the absolute differences, in units of the sum of the absolute numbers before."""
    changed = sum((new - old).abs().sum(dtype=torch.float32) for new, old in zip(after, before, strict=True))
    return float(changed / sum(old.abs().sum(dtype=torch.float32) for old in before))


class _Block(ModelHook):  # type: ignore[misc] # diffusers is untyped
    """Stands around a block. The first one asks the rule, the last one ends the step."""

    _is_stateful = True

    def __init__(self, rule: Rule, kinds: StateManager, *, first: bool, last: bool) -> None:
        super().__init__()
        self.steps = _STEPS
        self._rule = rule
        self._kinds = kinds
        self._first = first
        self._last = last

    def new_forward(
        self, block: Any, states: torch.Tensor, text: torch.Tensor, temb: torch.Tensor, *arguments: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent and text tokens after the block. Of a skipped step, the first block adds the change of all of them."""
        passes: Passes = self._kinds.get_state()
        if self._first:
            entry = Entry(self._kinds.context.name, self.steps, block, states, temb)
            passes.computes = self._rule.computes(passes, entry)
            passes.entered = states
        if passes.computes:
            states, text = self.fn_ref.original_forward(states, text, temb, *arguments)
        elif self._first:
            states = states + passes.change
        if self._last:
            if passes.computes:
                passes.change = states - passes.entered
            passes.entered = None
            passes.step += 1
        return states, text

    def reset_state(self, module: torch.nn.Module) -> torch.nn.Module:
        """Called by diffusers after each video."""
        self._kinds.reset()
        return module


def cache_steps(transformer: HunyuanVideo15Transformer3DModel, rule: Rule) -> None:
    """Makes the transformer skip steps by `rule`. It needs two blocks or more. Call `note_steps` before each video."""
    blocks, kinds = list(transformer.transformer_blocks), StateManager(Passes)
    for index, block in enumerate(blocks):
        hook = _Block(rule, kinds, first=index == 0, last=index == len(blocks) - 1)
        HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, _HOOK)
    HookRegistry.check_if_exists_or_initialize(transformer).invalidate_child_registries_cache()


def note_steps(transformer: HunyuanVideo15Transformer3DModel, steps: int) -> None:
    """Tells a cache of `cache_steps`, if the transformer has one, how many steps the next video takes."""
    registry = getattr(transformer.transformer_blocks[0], "_diffusers_hook", None)
    hook = registry.get_hook(_HOOK) if registry is not None else None
    if hook is not None:
        hook.steps = steps


# fmt: off
_480P_I2V: Final = (
    (
        1.0, 1.01562, 1.00781, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99219, 0.99219, 0.99219, 0.98828, 0.98828, 0.98828, 0.98828, 0.98438, 0.98438,
        0.98047, 0.98047, 0.97656, 0.97266, 0.96484, 0.95703, 0.94922, 0.92969, 0.91016, 0.88672,
    ),
    (
        1.0, 1.02344, 1.00781, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0,
        1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 1.0, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609, 0.99609,
        0.99609, 0.99219, 0.99219, 0.99219, 0.99219, 0.98828, 0.98828, 0.98828, 0.98438, 0.98438,
        0.98047, 0.98047, 0.97656, 0.97266, 0.96484, 0.95703, 0.94922, 0.93359, 0.91016, 0.88672,
    ),
)
# fmt: on

#: By checkpoint: hy_15_i2v_480p_magcache.json, measured with shift 5, guidance and 121 frames, as we sample it.
MAGCACHE: Final[Mapping[str, Rule]] = {"480p_i2v": MagCache(_480P_I2V)}

#: By checkpoint: hy_15_{t2v,i2v}_{480p,720p}_teacache.json, fitted as we sample it, but for the shift of 720p_t2v: 5.
TEACACHE: Final[Mapping[str, Rule]] = {
    "480p_t2v": TeaCache(
        (-2.97190924e04, 2.22834983e04, -4.37418360e03, 3.39340251e02, -1.01365855e01, 1.29101768e-01)
    ),
    "480p_i2v": TeaCache((8.08528429e03, -2.44607178e03, 2.49489589e02, -9.10697865e00, 1.20261379e-01)),
    "720p_t2v": TeaCache(
        (-3.08907507e04, 1.67786188e04, -3.19178643e03, 2.60740519e02, -8.19205881e00, 1.07913775e-01)
    ),
    "720p_i2v": TeaCache((3.84300014e03, -1.39247433e03, 1.69167679e02, -7.07679232e00, 1.02419011e-01)),
}
