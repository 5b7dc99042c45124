"""Exact attention without a mask, and the choice of its kernel.

diffusers' own processor builds a dense boolean mask of S x S in each block: 12.9 GB for five seconds at 720p. At batch
size 1 the mask only hides padded text tokens. Text that is trimmed to its valid tokens needs no mask, and kernels that
support no mask can be used.

Source of the stock processor: diffusers, models/transformers/transformer_hunyuan_video15.py.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import torch
from diffusers import HunyuanVideo15Transformer3DModel
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
    dispatch_attention_fn,
)

from handler.video_model.blocks import Attend, chunked_blocks, use_chunks
from handler.video_model.memory import CHUNK

log = logging.getLogger(__name__)

#: PyTorch's scaled_dot_product_attention, which chooses its own kernel.
NATIVE: Final = "native"


class FullAttention:
    """Each token attends to all latent and text tokens, with one of diffusers' kernels. All tokens must be valid."""

    def __init__(self, backend: str = NATIVE) -> None:
        self._backend = AttentionBackendName(backend)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        text: int,  # noqa: ARG002 - full attention treats text and latent tokens alike
    ) -> torch.Tensor:
        """See `Attend`."""
        attended: torch.Tensor = dispatch_attention_fn(query, key, value, attn_mask=None, backend=self._backend)
        return attended


def use_mask_free_attention(transformer: HunyuanVideo15Transformer3DModel, backend: str, *, chunk: int = CHUNK) -> None:
    """Trims incoming text, and makes each block attend without a mask and compute in chunks. The batch must be 1.

    The text refiner keeps its own processor: its sequence is short.
    """
    transformer.register_forward_pre_hook(_trim_text, with_kwargs=True)
    use_chunks(transformer, FullAttention(backend), chunk)


class WindowAttention:
    """Latent tokens attend to the frames near their own and to all text, text tokens to everything. Approximate.

    Calls `attend` for each frame with the keys of its window, so that any kernel works without a mask. Time grows with
    the number of frames, not with its square. Windows at the ends are as wide as the others.
    """

    def __init__(self, attend: Attend, radius: int) -> None:
        self._attend = attend
        self._radius = radius
        self._frames = 1

    def note_frames(self, _: torch.nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A pre-forward hook of the transformer that notes the number of latent frames."""
        self._frames = named["hidden_states"].shape[2]

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, text: int) -> torch.Tensor:
        """See `Attend`."""
        width = 2 * self._radius + 1
        if width >= self._frames:
            return self._attend(query, key, value, text=text)
        latent = query.shape[1] - text
        size = latent // self._frames
        attended = torch.empty_like(query)
        for frame in range(self._frames):
            first = min(max(frame - self._radius, 0), self._frames - width)
            window = slice(first * size, (first + width) * size)
            visible = [torch.cat([whole[:, window], whole[:, latent:]], dim=1) for whole in (key, value)]
            own = slice(frame * size, (frame + 1) * size)
            attended[:, own] = self._attend(query[:, own], *visible, text=text)
        attended[:, latent:] = self._attend(query[:, latent:], key, value, text=text)
        return attended


def use_window_attention(transformer: HunyuanVideo15Transformer3DModel, radius: int) -> None:
    """Makes latent tokens attend to `radius` frames before and after theirs. Call after `use_mask_free_attention`."""
    blocks = list(chunked_blocks(transformer))
    window = WindowAttention(blocks[0].attend, radius)
    transformer.register_forward_pre_hook(window.note_frames, with_kwargs=True)
    for block in blocks:
        block.attend = window


def _trim_text(
    _: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Cuts both texts and their masks to the valid tokens. Tokenizers pad on the right, so these are a prefix."""
    trimmed = dict(named)
    for suffix in ("", "_2"):
        states, mask = f"encoder_hidden_states{suffix}", f"encoder_attention_mask{suffix}"
        length = int(named[mask].sum())
        trimmed[states], trimmed[mask] = named[states][:, :length], named[mask][:, :length]
    return arguments, trimmed


@dataclass(frozen=True)
class Kernel:
    """An attention kernel of a package: diffusers' name for it, and the GPU architectures that it is written for.

    `majors` are the major numbers of their compute capabilities: 8 for Ampere and Ada, 9 for Hopper, 10 and 12 for
    Blackwell.
    """

    backend: str
    majors: range

    def problem(self, device: torch.device, capability: tuple[int, int]) -> str | None:
        """Why the kernel cannot be used; None if it can. Calls it once.

        `capability` is the GPU's compute capability: (9, 0) for an H100.
        """
        # 1. The GPU's architecture.
        major, minor = capability
        if major not in self.majors:
            return f"{self.backend} is not written for GPUs of compute capability {major}.{minor}"
        # 2. The package and its version.
        try:
            _check_attention_backend_requirements(AttentionBackendName(self.backend))
        except RuntimeError as exc:
            return str(exc)
        # 3. A call: a package may be built for other GPUs or for another version of PyTorch.
        try:
            error = trial_error(self.backend, device)
        except Exception as exc:  # noqa: BLE001 - a kernel may raise anything; the caller logs it
            return f"a trial call of {self.backend} failed: {type(exc).__name__}: {exc}".partition("\n")[0]
        if not error <= _TRIAL_ERROR:  # nan is no number at most this
            return f"a trial call of {self.backend} differs from PyTorch's attention by {error:.2g}"
        return None


#: SageAttention 2: 8 bits, from Ampere on. PyPI has only version 1, which diffusers does not call. The trial call finds
#: the GPUs that a build leaves out. Source: https://github.com/thu-ml/SageAttention (README).
_SAGE: Final = Kernel("sage", range(8, 13))
#: In order of preference. FlashAttention 3 is written for Hopper, and FlashAttention 2 runs from Ampere on. Source:
#: https://github.com/Dao-AILab/flash-attention (README).
_FLASH: Final = (
    Kernel("_flash_3", range(9, 10)),
    Kernel("flash", range(8, 13)),
)
#: Tokens, heads and head size of the trial call.
_TRIAL: Final = (512, 2, 128)
#: The largest relative difference (L2) of a trial that counts as right. On these inputs an 8-bit kernel is expected to
#: differ by a few percent, and one that reads wrong memory by about one.
_TRIAL_ERROR: Final = 0.2


def choose_backend(device: str, *, flash: bool, sage: bool | None) -> str:
    """The kernel for these settings on this device, in diffusers' names. Logs a warning if a setting cannot be met.

    `sage` None is no setting: sageattention if it works. Source:
    https://huggingface.co/docs/diffusers/optimization/attention_backends
    """
    if device != "cuda":
        if sage:
            log.warning(
                "HUNYUAN_ENABLE_SAGE_ATTN has no effect: sageattention needs a CUDA GPU; using PyTorch's attention"
            )
        return NATIVE
    gpu, capability = torch.device(device), torch.cuda.get_device_capability()
    if sage is not False:
        kernel, problems = first_usable([_SAGE], gpu, capability)
        if kernel is not None:
            return kernel.backend
        if sage:
            log.warning("HUNYUAN_ENABLE_SAGE_ATTN has no effect, set it to false or act on the reason: %s", *problems)
        else:
            log.info("profile turbo without 8-bit attention: %s", *problems)
    if not flash:
        return "_native_efficient"
    kernel, problems = first_usable(_FLASH, gpu, capability)
    if kernel is not None:
        return kernel.backend
    log.warning("HUNYUAN_ENABLE_FLASH_ATTN: using PyTorch's own flash attention; %s", "; ".join(problems))
    return NATIVE


def is_eight_bit(backend: str) -> bool:
    """Whether a kernel that `choose_backend` returned computes in 8 bits."""
    return backend == _SAGE.backend


def first_usable(
    kernels: Iterable[Kernel], device: torch.device, capability: tuple[int, int]
) -> tuple[Kernel | None, list[str]]:
    """The first kernel without a problem, and the problems of those before it."""
    problems: list[str] = []
    for kernel in kernels:
        problem = kernel.problem(device, capability)
        if problem is None:
            return kernel, problems
        problems.append(problem)
    return None, problems


@torch.no_grad()
def trial_error(backend: str, device: torch.device) -> float:
    """The relative difference (L2) between a kernel and PyTorch's attention on a few random tokens in bfloat16.

    Raises:
        Exception: what the kernel raises.
    """
    tokens, heads, head_size = _TRIAL
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 1, tokens, heads, head_size, generator=generator).to(device, torch.bfloat16)
    # Sharper than random attention, whose result is close to zero.
    found, expected = (FullAttention(name)(2 * query, key, value, text=0).float() for name in (backend, NATIVE))
    return float((found - expected).norm() / expected.norm())
