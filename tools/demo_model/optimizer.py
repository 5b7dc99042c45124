"""The Muon optimizer for matrices and convolution kernels, which needs about half of Adam's steps.

PyTorch's own `torch.optim.Muon` computes in bfloat16, which CPUs without it emulate slowly. Source: Keller Jordan,
https://kellerjordan.github.io/posts/muon.
"""

from collections.abc import Iterable
from typing import Any, Final, cast

import torch

#: Of Newton and Schulz's iteration towards an orthogonal matrix, from the source.
_COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
_ITERATIONS: Final = 5


class Muon(torch.optim.Optimizer):
    """Steps of one length along the orthogonal matrix that is nearest to the averaged gradient.

    `rows`: a kernel with more output channels counts as several matrices of so many rows, which is less to compute.
    """

    def __init__(
        self, matrices: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, rows: int | None = None
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "rows": rows})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002 - no closure is supported
        """See `torch.optim.Optimizer.step`."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                rows = min(group["rows"] or shape[0], shape[0])
                columns = shape[1:].numel()
                averaged = torch.stack([self._averaged(matrix, group["momentum"]) for matrix in matrices])
                updates = _orthogonal(averaged.view(-1, rows, columns)).view_as(averaged)
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for matrix, update in zip(matrices, updates, strict=True):
                    matrix.add_(update, alpha=-scale)

    def _averaged(self, matrix: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        state, gradient = self.state[matrix], cast(torch.Tensor, matrix.grad)
        if not state:
            state["average"] = torch.zeros_like(matrix)
        average: torch.Tensor = state["average"].lerp_(gradient, 1 - momentum)
        return torch.lerp(gradient, average, momentum)


def _orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """(n, rows, columns): each with singular values near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: torch.Tensor = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x
