"""The attention kernel is chosen by architecture, version and a trial call. The trials here run on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from handler.video_model.attention import _FLASH, _SAGE, NATIVE, Kernel, choose_backend, first_usable, trial_error

CPU = torch.device("cpu")
FLASH_3, FLASH_2 = _FLASH
AMPERE, ADA, HOPPER, BLACKWELL, TURING = (8, 0), (8, 9), (9, 0), (10, 0), (7, 5)

Attention = Callable[..., torch.Tensor]


def exact(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    query, key, value = (part.transpose(1, 2) for part in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[Kernel, Attention], None]:
    """Lets diffusers find the kernel's package in the version that it needs, and call this in its place."""
    flags = {"sage": "_CAN_USE_SAGE_ATTN", "_flash_3": "_CAN_USE_FLASH_ATTN_3", "flash": "_CAN_USE_FLASH_ATTN"}

    def put(kernel: Kernel, attend: Attention) -> None:
        monkeypatch.setattr(attention_dispatch, flags[kernel.backend], True)
        monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName(kernel.backend), attend)
        names = {"query", "key", "value"}
        monkeypatch.setitem(_AttentionBackendRegistry._supported_arg_names, AttentionBackendName(kernel.backend), names)

    return put


@pytest.mark.parametrize(
    ("kernel", "usable", "not_usable"),
    [
        (FLASH_3, [HOPPER], [TURING, AMPERE, ADA, BLACKWELL]),
        (FLASH_2, [AMPERE, ADA, HOPPER, BLACKWELL], [TURING]),
        (_SAGE, [AMPERE, ADA, HOPPER], [TURING]),
    ],
)
def test_a_kernel_is_used_on_the_architectures_it_is_written_for(
    kernel: Kernel,
    usable: list[tuple[int, int]],
    not_usable: list[tuple[int, int]],
    install: Callable[[Kernel, Attention], None],
) -> None:
    install(kernel, exact)
    for capability in usable:
        assert kernel.problem(CPU, capability) is None
    for capability in not_usable:
        problem = kernel.problem(CPU, capability)
        assert problem is not None
        assert "compute capability {}.{}".format(*capability) in problem


@pytest.mark.parametrize("kernel", [_SAGE, *_FLASH])
def test_a_package_that_is_absent_or_too_old_is_named_with_what_is_needed(kernel: Kernel) -> None:
    """PyPI's sageattention is 1.0.6: diffusers' flag for it is false, as it is where nothing is installed."""
    problem = kernel.problem(CPU, HOPPER)
    assert problem is not None
    assert "missing package or the version is too old" in problem
    if kernel is _SAGE:
        assert "sageattention>=2.1.1" in problem


def fails(**_: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("CUDA error: no kernel image is available\nfor execution on the device")


def is_not_there(**_: torch.Tensor) -> torch.Tensor:
    nothing: Attention | None = None
    return nothing()  # type: ignore[misc] # what diffusers does where the version is too old


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (fails, "RuntimeError: CUDA error: no kernel image is available"),
        (is_not_there, "TypeError"),
        (lambda query, key, value: torch.zeros_like(value), "differs from PyTorch's attention by 1"),
        (lambda query, key, value: value * torch.nan, "differs from PyTorch's attention by nan"),
    ],
)
def test_a_kernel_that_fails_its_trial_is_passed_over(
    attend: Attention, said: str, install: Callable[[Kernel, Attention], None]
) -> None:
    install(FLASH_2, attend)
    problem = FLASH_2.problem(CPU, HOPPER)
    assert problem is not None
    assert said in problem
    assert "\n" not in problem


def test_a_kernel_in_8_bits_passes_its_trial(install: Callable[[Kernel, Attention], None]) -> None:
    """Queries and keys in 8 bits with one scale: coarser than SageAttention's scales for a few tokens each."""

    def quantised(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scales = [part.abs().max() / 127 for part in (query, key)]
        query, key = ((part / scale).round() * scale for part, scale in zip((query, key), scales, strict=True))
        return exact(query, key, value)

    install(_SAGE, quantised)
    assert _SAGE.problem(CPU, ADA) is None
    assert trial_error(_SAGE.backend, CPU) > trial_error(NATIVE, CPU) == 0.0


def test_without_a_usable_kernel_pytorchs_own_is_used_and_the_reasons_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: ADA)
    with caplog.at_level(logging.WARNING, logger="handler"):
        assert choose_backend("cuda", flash=True, sage=True) == NATIVE
        assert choose_backend("cuda", flash=False, sage=False) == "_native_efficient"
    sage, flash = (record.getMessage() for record in caplog.records)
    assert sage.startswith("HUNYUAN_ENABLE_SAGE_ATTN has no effect")
    assert "sageattention>=2.1.1" in sage
    assert flash.startswith("HUNYUAN_ENABLE_FLASH_ATTN: using PyTorch's own flash attention; _flash_3 is not written")
    assert "flash-attn>=2.6.3" in flash


def test_sageattention_that_no_setting_asked_for_is_missed_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: ADA)
    with caplog.at_level(logging.INFO, logger="handler"):
        assert choose_backend("cuda", flash=False, sage=None) == "_native_efficient"
    (missed,) = caplog.records
    assert missed.levelno == logging.INFO
    assert missed.getMessage().startswith("profile turbo without 8-bit attention")


def test_the_best_usable_kernel_is_chosen(install: Callable[[Kernel, Attention], None]) -> None:
    install(FLASH_2, exact)
    assert first_usable(_FLASH, CPU, HOPPER)[0] is FLASH_2
    install(FLASH_3, fails)
    kernel, problems = first_usable(_FLASH, CPU, HOPPER)
    assert kernel is FLASH_2
    assert len(problems) == 1
    install(FLASH_3, exact)
    assert first_usable(_FLASH, CPU, HOPPER) == (FLASH_3, [])
    assert first_usable(_FLASH, CPU, ADA)[0] is FLASH_2


def test_on_a_cpu_pytorchs_own_kernel_is_used() -> None:
    assert choose_backend("cpu", flash=True, sage=True) == NATIVE
