"""Single linears of blocks of no known family, which a recipe quantizes one by one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from fxopt.backends.swaps import quantized
from fxopt.backends.swaps.fused import fire
from fxopt.backends.swaps.swap import Arguments, Draw, Swap, Unfit
from fxopt.kernels.scaled_matmul import op_of


def forward(linear: nn.Linear, input: Tensor) -> Tensor:
    recipe = quantized.quantizes(input, linear, is_swapped=True)
    if recipe is None:
        raise Unfit(quantized.reason(linear))
    fire("quantized_linear", op_of(recipe))
    return quantized.multiply(input, [linear], recipe)[0]


def examples(linear: nn.Linear, draw: Draw) -> Iterator[Arguments]:
    for leading in ((draw.B, draw.S), (draw.B,), (draw.B, draw.S, draw.T)):
        yield {"input": draw.normal(*leading, linear.in_features)}


SWAP = Swap("linear", forward, examples)
