"""Counts what a block does in one training step, at real shapes, without running anything.

The block runs forward and backward on fake tensors while a dispatch mode sees every ATen and
`fxopt::` op that eager PyTorch would launch. Matrix products and attention are kept apart; all the
rest is glue. The two composites that a GPU runs as one kernel and a CPU takes apart (RMSNorm and
attention) are counted as one launch.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fxopt.cost import Product, Work
from fxopt.fakes import faked
from fxopt.kernels.attention_call import Arguments
from fxopt.kernels.registration import LAUNCHES, REREADS

# fxopt's own products, by kind.
PRODUCTS = {
    "scaled_matmul": "gemm",
    "scaled_attention": "attention",
    "silu_products": "gemm",
    "silu_products_backward": "gemm",
}
GEMMS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"}
# Views by another name, and questions.
VIEWS = {
    *("view", "reshape", "_unsafe_view", "_reshape_alias", "alias", "detach", "lift_fresh"),
    *("unsafe_split", "unsafe_chunk", "unsafe_split_with_sizes"),  # with versions of their own
    *("device", "layout", "prim_layout", "is_same_size", "sym_size", "_assert_tensor_metadata"),
}
SCALED = "fxopt::scaled_matmul"
SCALED_FORMATS = slice(7, 9)  # its arguments a_format and b_format
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Kernels that do not read their first argument: it is written over, or only lends its shape.
WRITES = {
    *("copy_", "zero_", "fill_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like"),
    *("new_ones", "full", "full_like", "new_full"),
}


def kind(op: torch._ops.OpOverload) -> str:
    """What an op is to the count: "gemm", "attention", "glue", "view" or "allocation"."""
    name = op._schema.name.split("::")[-1]
    if op.namespace == "fxopt":
        return PRODUCTS.get(name, "glue")
    if "scaled_dot_product" in name or "varlen_attn" in name:
        return "attention"
    if name in GEMMS:
        return "gemm"
    if op.is_view or name in VIEWS:
        return "view"
    return "allocation" if name in ALLOCATIONS else "glue"


def bits(formats: Iterable[str]) -> int:
    """Of the wider operand of a product of these formats."""
    return max(4 if f.startswith("e2m1") else 8 for f in formats)


@dataclass
class Traffic:
    """What one pass of a block does.

    Args:
        gemms, attentions: its products.
        glue: bytes read and written by everything else, by op; each operand is read once
            but for those that an op's registration says are read again.
        launches: kernels by op: one each, or what the op's registration counts.
        saved: bytes kept for backward, by storage, without the parameters.
    """

    gemms: list[Product] = field(default_factory=list)
    attentions: list[Product] = field(default_factory=list)
    glue: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    saved: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.gemms + other.gemms,
            self.attentions + other.attentions,
            self.glue + other.glue,
            self.launches + other.launches,
            self.saved + other.saved,
        )

    def work(self) -> Work:
        """The totals, for the cost model."""
        return Work(
            tuple(self.gemms),
            tuple(self.attentions),
            self.glue.total(),
            self.launches.total(),
            self.saved,
        )

    def add_attention(self, name: str, flops: int, *tensors: Tensor | None) -> None:
        """Count one attention kernel that moves `tensors`."""
        self.attentions.append(Product(flops, moved(tensors)))
        self.launches[name] += 1

    def add_glue(self, name: str, *tensors: Tensor | None) -> None:
        """Count one glue kernel that moves `tensors`."""
        self.glue[name] += moved(tensors)
        self.launches[name] += 1


def moved(tensors: Iterable[Any]) -> int:
    """Bytes that passing once over `tensors` moves; an expanded one costs only what it stores."""
    return sum(
        min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
        for t in tensors
        if isinstance(t, Tensor)
    )


class _Counting(TorchDispatchMode):
    """Adds every op that eager PyTorch launches to `traffic`."""

    def __init__(self) -> None:
        super().__init__()
        self.traffic = Traffic()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        cost, name = kind(func), func._schema.name.removeprefix("aten::")
        if cost in ("view", "allocation"):
            return out
        launches = LAUNCHES.get(name)
        self.traffic.launches[name] += 1 if launches is None else launches(*args)
        operands = args[1:] if name in WRITES else (args, kwargs)
        read = {id(t): t for t in tree_leaves(operands) if isinstance(t, Tensor)}
        num_bytes = moved(read.values()) + moved(tree_leaves(out))
        num_bytes += moved(REREADS[name](args, out)) if name in REREADS else 0
        if cost == "glue":
            self.traffic.glue[name] += num_bytes
        elif name == SCALED:
            formats = args[SCALED_FORMATS]
            packed = 2 if formats[0].startswith("e2m1") else 1
            (m, k), n = args[0].shape, args[3].shape[0]
            product = Product(2 * m * n * k * packed, num_bytes, (m, n, k * packed), bits(formats))
            self.traffic.gemms.append(product)
        elif cost == "gemm" and func.namespace != "fxopt":
            a, b = [t for t in args if isinstance(t, Tensor)][-2:]
            batch, (m, k), n = math.prod(a.shape[:-2]), a.shape[-2:], b.shape[-1]
            shape = None if a.dim() > 2 else (m, n, k)
            self.traffic.gemms.append(Product(2 * batch * m * n * k, num_bytes, shape))
        else:
            flops = flop_registry.get(func.overloadpacket, lambda *_, **__: 0)
            count = flops(*args, **(kwargs or {}), out_val=out)
            products = self.traffic.gemms if cost == "gemm" else self.traffic.attentions
            products.append(Product(count, num_bytes))
        return out


class _Attention(torch.autograd.Function):
    """Flash attention as a GPU runs it: saves q, k, v, out and one fp32 statistic per row."""

    @staticmethod
    def forward(
        ctx: Any, counting: _Counting, q: Tensor, k: Tensor, v: Tensor, mask: Any, causal: Any
    ) -> Any:
        with _uncounted():
            # Flash kernels lay the output out as [B, S, H, d].
            out = q.new_empty(*q.shape[:-3], q.shape[-2], q.shape[-3], v.shape[-1]).transpose(
                -3, -2
            )
            lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        pairs = math.prod(q.shape[:-1]) * k.shape[-2]
        ctx.flops = 2 * pairs * (q.shape[-1] + v.shape[-1]) // (2 if causal else 1)
        ctx.counting = counting
        counting.traffic.add_attention("attention", ctx.flops, q, k, v, mask, out, lse)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, mask, out, lse = ctx.saved_tensors
        with _uncounted():
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        # Five products instead of two: the scores are computed again.
        tensors = (grads[0], q, k, v, mask, out, lse, dq, dk, dv)
        ctx.counting.traffic.add_attention("attention_backward", ctx.flops * 5 // 2, *tensors)
        return None, dq, dk, dv, None, None


class _RMSNorm(torch.autograd.Function):
    """RMSNorm as a GPU runs it: one kernel each way, saves the input and one statistic per row."""

    @staticmethod
    def forward(
        ctx: Any, counting: _Counting, x: Tensor, shape: Any, weight: Tensor | None, eps: Any
    ) -> Any:
        with _uncounted():
            out = torch.empty_like(x)
            rstd = x.new_empty(x.shape[: x.dim() - len(shape)], dtype=torch.float32)
        counting.traffic.add_glue("rms_norm", x, weight, out, rstd)
        ctx.counting = counting
        ctx.save_for_backward(x, weight, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, rstd = ctx.saved_tensors
        with _uncounted():
            dx = torch.empty_like(x)
            dweight = None if weight is None else torch.empty_like(weight)
        ctx.counting.traffic.add_glue("rms_norm_backward", grads[0], x, weight, rstd, dx, dweight)
        return None, dx, None, dweight, None


class _Composites(TorchFunctionMode):
    """Sends RMSNorm and attention to their one-kernel forms, whatever the spelling."""

    def __init__(self, counting: _Counting) -> None:
        super().__init__()
        self.counting = counting

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        # An overload is called "default" and its packet by the op's name.
        name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        kwargs = kwargs or {}
        if name == "rms_norm":
            return _rms_norm(self.counting, *args, **kwargs)
        if name == "scaled_dot_product_attention":
            return _attention(self.counting, *args, **kwargs)
        return func(*args, **kwargs)


def _rms_norm(
    counting: _Counting, input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None
) -> Any:
    return _RMSNorm.apply(counting, input, normalized_shape, weight, eps)


def _attention(counting: _Counting, *args: Any, **kwargs: Any) -> Any:
    query, key, value, mask, _, is_causal, *_ = Arguments(*args, **kwargs)
    return _Attention.apply(counting, query, key, value, mask, is_causal)


@contextlib.contextmanager
def _uncounted() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def measure(
    forward: Callable[..., Any],
    block: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    counting: _Counting | None = None,
) -> tuple[Traffic, Traffic]:
    """The traffic of `forward(*args, **kwargs)` and of its backward; all tensors are fake.

    Args:
        forward: `block` or its rewritten form.
        block: owner of the parameters.
        counting: what counts, where `forward` looks at it; None for one of its own.
    """
    counting = counting or _Counting()
    kept: dict[int, Tensor] = {}  # the reference keeps the storage's address from being reused

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with _Composites(counting), counting:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = forward(*args, **kwargs)
        there, counting.traffic = counting.traffic, Traffic()
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    owned = {t.untyped_storage()._cdata for t in (*block.parameters(), *block.buffers())}
    there.saved = sum(t.untyped_storage().nbytes() for c, t in kept.items() if c not in owned)
    return there, counting.traffic


def count(
    block: nn.Module,
    args: tuple,
    kwargs: Mapping[str, Any],
    function: Callable[..., Any] | None = None,
) -> tuple[Work, Work]:
    """What one forward and one backward of `block` do, eager.

    Args:
        block: on any device, meta included; it is left as it was.
        args, kwargs: its inputs on any device; only their sizes, strides, dtypes and
            `requires_grad` are read.
        function: runs in place of `block`, on `block`'s parameters; the rewritten form.
    """
    with faked(block, args, kwargs, "meta") as (fake_args, fake_kwargs):
        forward, backward = measure(function or block, block, fake_args, fake_kwargs)
    return forward.work(), backward.work()


class ByNode(fx.Interpreter):
    """Runs a graph, and keeps the FLOPs of the products and attentions in each node's forward."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.counting = _Counting()
        self.flops: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        found = self.counting.traffic
        before = len(found.gemms), len(found.attentions)
        out = super().run_node(n)
        products = (*found.gemms[before[0] :], *found.attentions[before[1] :])
        self.flops[n] = sum(p.flops for p in products)
        return out

    def glue_bytes(self, block: nn.Module, inputs: Sequence[Any]) -> int:
        """Of a forward and a backward of the graph on fake `inputs`, `block`'s state first."""
        passes = measure(self.run, block, tuple(inputs), {}, self.counting)
        return sum(traffic.glue.total() for traffic in passes)
