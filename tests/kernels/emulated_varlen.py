"""PyTorch's variable-length flash attention on CPU tensors, for as long as a test lasts.

It has kernels for CUDA alone. Two loops over the samples become the CPU kernels of the ATen ops
below torch.nn.attention.varlen, so that all the code above them is what a GPU runs. What those
kernels leave unwritten is NaN here.

H heads of queries, K of keys and values, S and T tokens of one sample, d channels of a head;
M queries, N rows of keys in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Sample = tuple[slice, slice]


class Kernels:
    """The two kernels.

    calls: "forward" and "backward", as they ran.
    dtypes: of their queries. windows: that they were told.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.dtypes: set[torch.dtype] = set()
        self.windows: set[tuple[int | None, int | None]] = set()

    @torch.autocast("cpu", enabled=False)
    def forward(
        self,
        *tensors: Any,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
        **absent: Any,
    ) -> tuple[Tensor, ...]:
        q_MHd, k_NKd, v_NKd, *lengths, dropout_p, is_causal, is_debug = tensors
        assert dropout_p == 0 and not is_debug and not any(absent.values())
        window = window_size_left, window_size_right
        assert is_causal == (window == (-1, 0))
        self.calls.append("forward")
        self.windows.add(window)
        self.dtypes.add(q_MHd.dtype)
        out_MHd = torch.full_like(q_MHd, torch.nan)
        lse_HM = q_MHd.new_full(q_MHd.shape[1::-1], torch.nan, dtype=torch.float32)
        for queries, keys in samples(q_MHd, k_NKd, v_NKd, *lengths):
            score_HST, v_HTd = scores(q_MHd[queries], k_NKd[keys], scale, window), v_NKd[keys]
            lse_HS = score_HST.logsumexp(-1)
            p_HST = (score_HST - lse_HS[..., None]).exp()
            # Both products take operands of the inputs' dtype and sum in a wider one.
            out_HSd = rounded(p_HST, q_MHd) @ heads(v_HTd, q_MHd.shape[1])
            out_MHd[queries] = out_HSd.transpose(0, 1).to(out_MHd)
            lse_HM[:, queries] = torch.where(lse_HS.isneginf(), torch.inf, lse_HS).float()
        empty = torch.empty(0)
        return out_MHd, lse_HM, empty, empty, empty

    def backward(
        self,
        *tensors: Any,
        scale: float | None = None,
        window_size_left: int | None = None,
        window_size_right: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_MHd, q_MHd, k_NKd, v_NKd, out_MHd, _, *lengths, dropout_p, is_causal, _, _ = tensors
        window = window_size_left, window_size_right
        assert dropout_p == 0 and is_causal == (window == (-1, 0)) and window in self.windows
        self.calls.append("backward")
        dq, dk, dv = (torch.full_like(x, torch.nan) for x in (q_MHd, k_NKd, v_NKd))
        for queries, keys in samples(q_MHd, k_NKd, v_NKd, *lengths):
            q_SHd, k_TKd = q_MHd[queries], k_NKd[keys]
            num_heads = q_SHd.shape[1]
            p_HST = scores(q_SHd, k_TKd, scale, window).softmax(-1)
            grad_HSd = heads(grad_MHd[queries], num_heads)
            sum_HS1 = (grad_HSd * heads(out_MHd[queries], num_heads)).sum(-1, keepdim=True)
            dp_HST = grad_HSd @ heads(v_NKd[keys], num_heads).mT
            ds_HST = rounded(p_HST * (dp_HST - sum_HS1), q_MHd) * scaling(q_MHd, scale)
            dq[queries] = (ds_HST @ heads(k_TKd, num_heads)).transpose(0, 1).to(dq)
            dk[keys] = shared(ds_HST.mT @ heads(q_SHd, num_heads), k_TKd)
            dv[keys] = shared(rounded(p_HST, q_MHd).mT @ grad_HSd, k_TKd)
        return dq, dk, dv


def samples(
    q: Tensor, k: Tensor, v: Tensor, of_q: Tensor, of_k: Tensor, max_q: int, max_k: int
) -> Iterator[Sample]:
    """The rows of each sample, as the kernel finds them; it needs no row past the last one."""
    for t in (q, k, v):
        assert t.dim() == 3 and t.stride(-1) == 1
    assert of_q.dtype == of_k.dtype == torch.int32 and of_q.shape == of_k.shape
    bounds = of_q.tolist(), of_k.tolist()
    assert bounds[0][-1] == len(q) and bounds[1][-1] <= len(k) == len(v)
    for start_q, end_q, start_k, end_k in zip(
        bounds[0][:-1], bounds[0][1:], bounds[1][:-1], bounds[1][1:], strict=True
    ):
        assert 0 <= end_q - start_q <= max_q and 0 <= end_k - start_k <= max_k
        yield slice(start_q, end_q), slice(start_k, end_k)


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounded(x: Tensor, like: Tensor) -> Tensor:
    return wide(x.to(like.dtype))


def heads(x_TKd: Tensor, num_heads: int) -> Tensor:
    """[H, T, d], where heads of queries share those of keys."""
    x_KTd = wide(x_TKd).transpose(0, 1)
    return x_KTd.repeat_interleave(num_heads // len(x_KTd), 0)


def shared(grad_HTd: Tensor, x_TKd: Tensor) -> Tensor:
    grad_KTd = grad_HTd.unflatten(0, (x_TKd.shape[1], -1)).sum(1)
    return grad_KTd.transpose(0, 1).to(x_TKd)


def scaling(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def scores(q_SHd: Tensor, k_TKd: Tensor, scale: float | None, window: Any) -> Tensor:
    num_heads = q_SHd.shape[1]
    score_HST = heads(q_SHd, num_heads) @ heads(k_TKd, num_heads).mT * scaling(q_SHd, scale)
    # The last query is level with the last key.
    num_queries, num_keys = score_HST.shape[1:]
    own_S1 = torch.arange(num_queries)[:, None] + num_keys - num_queries
    before_ST = own_S1 - torch.arange(num_keys)
    left, right = (num_queries + num_keys if n < 0 else n for n in window)
    return score_HST.masked_fill((before_ST > left) | (before_ST < -right), -torch.inf)


@contextmanager
def on_cpu() -> Iterator[Kernels]:
    """Give PyTorch the two kernels."""
    kernels, library = Kernels(), torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", kernels.forward, "CPU")
    library.impl("_flash_attention_backward", kernels.backward, "CPU")
    try:
        yield kernels
    finally:
        library._destroy()
