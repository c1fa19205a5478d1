"""norm_modulate_segments_streams: what the ops give for each stream, by segment or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.kernels.native_norm_modulate import backward, forward
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears
from fxopt.kernels.norm_modulate_segments import native_backward, native_forward
from fxopt.kernels.norm_modulate_segments_linears import (
    norm_modulate_segments_linears,
    norm_modulate_segments_linears_streams,
)
from fxopt.kernels.norm_modulate_segments_streams import (
    norm_modulate_segments_streams,
    norm_modulate_segments_streams_backward,
)
from fxopt.kernels.registration import LAUNCHES
from tests.kernels.codes import draw
from tests.kernels.test_norm_modulate_quantized_linears import leaf
from tests.kernels.test_norm_modulate_streams import IMAGE, TEXT, joined, joined_backward, made

K, N = 24, 3
Calls = list[tuple[Any, ...]]


def reading(shape: tuple[int, ...]) -> tuple[Tensor, bool]:
    return torch.arange(shape[0] * shape[1]).view(shape[:2]) % N - 1, False


def streams(norm: str, num_by_segment: int) -> tuple[Calls, Calls]:
    """Calls for image and text, and one for no tokens; the first by segment, the others not."""
    empty = (*IMAGE[:4], (2, 0, K), False)
    plain, _ = made((IMAGE, TEXT, empty), norm)
    calls, back = [], []
    for i, call in enumerate(plain):
        x, residual, *operands = call[:8]
        more: tuple[Any, bool] = (None, False)
        if i < num_by_segment:
            operands[0] = draw(2, N, K, seed=i)
            if norm != "none":
                operands[3], operands[4] = draw(2, N, K, seed=i + 5), draw(N, K, seed=i + 9)
            more = reading(x.shape)
        call = (x, residual, *operands, *more, *call[8:])
        _, h, mean, rstd = alone(call)
        grad = draw(*x.shape, seed=i + 20)
        grads = None if norm == "none" else grad, grad.flip(1)
        settings = norm, *call[12:14], torch.float32, [True] * 8, norm != "none"
        calls.append(call)
        back.append((*grads, h, x, *operands, *more, mean, rstd, *settings))
    return calls, back


def alone(call: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return forward(*call[:8], *call[10:]) if call[8] is None else native_forward(*call)


def alone_backward(call: tuple[Any, ...]) -> tuple[Tensor, ...]:
    return backward(*call[:10], *call[12:]) if call[10] is None else native_backward(*call)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("num_by_segment", [1, 2])
def test_native_is_that_of_each_stream(norm: str, num_by_segment: int) -> None:
    calls, back = streams(norm, num_by_segment)
    found = norm_modulate_segments_streams(*joined(calls))
    expected = [t for call in calls for t in alone(call)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found = norm_modulate_segments_streams_backward(*joined_backward(back))
    expected = [t for call in back for t in alone_backward(call)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["layer", "rms", "none"])
@pytest.mark.parametrize("num_by_segment", [1, 2])
def test_triton_is_that_of_each_stream(norm: str, num_by_segment: int) -> None:
    plain = pytest.importorskip("fxopt.kernels.triton_norm_modulate", reason="needs Triton")
    from fxopt.kernels import triton_norm_modulate_segments as provider

    calls, back = streams(norm, num_by_segment)
    # The same kernels on the same rows; sums over rows associate otherwise, as a stream has fewer
    # programs than alone: a few ulp of fp32.
    torch.testing.assert_close(
        provider.forward_of(calls),
        [plain.forward(*c[:8], *c[10:]) if c[8] is None else provider.forward(*c) for c in calls],
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(
        provider.backward_of(back),
        [
            plain.backward(*c[:10], *c[12:]) if c[10] is None else provider.backward(*c)
            for c in back
        ],
        rtol=1e-5,
        atol=1e-5,
    )


def test_triton_launches_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    provider = pytest.importorskip(
        "fxopt.kernels.triton_norm_modulate_segments", reason="needs Triton"
    )
    calls, back = streams("layer", 1)
    launched: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(provider.kernels, name)

        def __getitem__(self, grid: Any) -> Any:
            launched.append(self.name)
            return self.kernel[grid]

    for name in ("forward_kernel", "order_kernel", "backward_kernel", "reduce_kernel"):
        monkeypatch.setattr(provider.kernels, name, Counted(name))
    provider.forward_of(calls)
    assert launched == ["forward_kernel"]
    provider.backward_of(back)
    assert sorted(launched[1:]) == ["backward_kernel", "order_kernel", "reduce_kernel"]
    count = LAUNCHES["fxopt::norm_modulate_segments_streams_backward"]
    assert count(*joined_backward(back)) == 3


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_opcheck(norm: str) -> None:
    calls, back = streams(norm, 1)
    torch.library.opcheck(norm_modulate_segments_streams, joined(calls[:2]))
    torch.library.opcheck(norm_modulate_segments_streams_backward, joined_backward(back[:2]))


class Called(TorchDispatchMode):
    """Lists the fused ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fxopt":
            self.names.append(op._schema.name.removeprefix("fxopt::"))
        return op(*args, **(kwargs or {}))


def test_one_node_gives_what_a_node_for_each_stream_does() -> None:
    D, dtypes = 32, [torch.bfloat16] * 2
    table, row = leaf(1, 2, N, D), leaf(2, 2, 1, D)
    image = [
        leaf(3, 2, 9, D),
        leaf(4, 2, 9, D),
        table,
        None,
        None,
        table,
        leaf(5, N, D),
        leaf(6, D),
    ]
    text = [leaf(7, 2, 5, D), None, None, None, None, row, None, None]
    weights, biases = [leaf(8, 48, D), leaf(9, 16, D), leaf(10, 40, D)], [leaf(11, 48), None, None]
    leaves = [t for t in (*image, *text, *weights, *biases) if t is not None]
    leaves = list(dict.fromkeys(leaves))
    index = torch.arange(18).view(2, 9) % N
    settings = "layer", 1e-6, 0.0, 1.0, *dtypes

    def together() -> list[Tensor]:
        operands = map(list, zip(image, text, strict=True))
        numbers = [1e-6] * 2, [0.0] * 2, [1.0] * 2
        pieces = [0, 0, 48, 1, 0, 16, 0, 0, 40]
        outs, hs = norm_modulate_segments_linears_streams(
            *operands, [index, None], [False, False], "layer", *numbers, *dtypes,
            weights, biases, [2, 1], pieces, [2, 1],
        )  # fmt: skip
        return [*outs, *hs]

    def apart() -> list[Tensor]:
        own = weights[:2], biases[:2], [0, 0, 48, 1, 0, 16]
        outs, h = norm_modulate_segments_linears(*image, index, False, *settings, *own)
        other = weights[2:], biases[2:], [0, 0, 40]
        more, g = norm_modulate_linears(*text, *settings, *other)
        return [*outs, *more, h, g]

    results = []
    for call in (together, apart):
        with Called() as mode:
            outs = call()
            grads = [leaf(20 + i, *out.shape).detach() for i, out in enumerate(outs)]
            results.append([*outs, *torch.autograd.grad(outs, leaves, grads)])
        if call is together:
            name = "norm_modulate_segments_streams"
            assert [n for n in mode.names if "norm" in n] == [name, f"{name}_backward"]
    assert all(map(torch.equal, *results))
