"""`python -m bench.registration`: what a call of an op costs, as fxopt registers it and as
`torch.library.custom_op` does: microseconds, forward and forward + backward of a copy of 8 floats.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fxopt.kernels.registration import below_autograd, register


def clone(x: Tensor) -> Tensor:
    return x.clone()


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return below_autograd(copy, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return copy_backward(grad)


copy = register("copy(Tensor x) -> Tensor", native=clone, fake=torch.empty_like, function=Copy)
copy_backward = register(
    "copy_backward(Tensor grad) -> Tensor", native=clone, fake=torch.empty_like
)
custom = torch.library.custom_op("fxopt_bench::copy", clone, mutates_args=())
custom_backward = torch.library.custom_op("fxopt_bench::copy_backward", clone, mutates_args=())


def microseconds(run: Callable[[], Any]) -> float:
    return round(min(timeit.repeat(run, number=100, repeat=200)) * 1e4, 1)


def main() -> None:
    for op in (custom, custom_backward):
        op.register_fake(torch.empty_like)
    custom.register_autograd(lambda ctx, grad: custom_backward(grad))
    x, grad = torch.randn(8, requires_grad=True), torch.ones(8)

    def both(op: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(op(x), x, grad)

    for name, op in (("fxopt", copy), ("custom_op", custom)):
        print(name, microseconds(partial(op, x)), microseconds(partial(both, op)))


if __name__ == "__main__":
    main()
