"""The ops on DTensors over two processes: values of one process, and what is communicated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode

from fxopt.kernels.gated_activation import gated_activation
from fxopt.kernels.linear_cross_entropy import linear_cross_entropy
from fxopt.kernels.norm_modulate import norm_modulate
from fxopt.kernels.norm_modulate_segments import norm_modulate_segments
from fxopt.kernels.qk_norm_rope import qk_norm_rope
from fxopt.kernels.quantize import Cast
from fxopt.recipes import Operand
from tests.kernels import test_connectivity
from tests.ranks import needs_gloo, spawn

WORLD_SIZE = 2
B, S, H, D, HEAD_DIM = 3, 5, 4, 32, 8  # samples and tokens that two processes share unevenly
FP32 = torch.float32
CONSTANTS = ("cos", "sin", "target", "index")
OPERAND = Operand.parse("e4m3/row/fp32")


@dataclasses.dataclass
class Call:
    """A call of an op on tensors by name, each with its placement and that of its gradient."""

    name: str
    run: Callable[[dict[str, Any]], list[Any]]
    tensors: dict[str, tuple[tuple[int, ...], Placement, Placement | None]]
    outputs: Placement
    communicates: bool = False


def norm(call: str, dim: int, norm: str = "layer", per_token: bool = False, **other: Any) -> Call:
    sharded, whole = Shard(dim), (Replicate(), Partial())
    # A row for each sample is sharded with the samples, and shared by the shards of a sequence.
    of_sample = (sharded, sharded) if dim == 0 or per_token else whole
    of_sample = ((B, S if per_token else 1, D), *of_sample)
    tensors = {
        "x": ((B, S, D), sharded, sharded),
        "residual": ((B, S, D), sharded, sharded),
        **dict.fromkeys(("gate", "scale", "shift"), of_sample),
        **dict.fromkeys(("weight", "bias", "x_bias"), ((D,), *whole)),
    }

    def run(t: dict[str, Any]) -> list[Any]:
        arguments = (t.get(n) for n in ("x", "residual", "gate", "weight", "bias"))
        modulation = (t.get("scale"), t.get("shift")) if norm != "none" else (None, None)
        constants = (norm, 1e-6, 0.0, 1.0, FP32, FP32)
        y, h, _, _ = norm_modulate(*arguments, *modulation, t.get("x_bias"), *constants)
        return [out for out in (y, h) if out.requires_grad]

    if norm == "none":
        tensors = {n: tensors[n] for n in ("x", "residual", "gate", "x_bias")}
    return Call(f"norm_modulate {norm} {call}", run, tensors | other, sharded)


def segments(call: str, dim: int, norm: str = "layer", shift_per_token: bool = False) -> Call:
    """Tables of two rows for each sample, and one for all."""
    sharded, whole = Shard(dim), (Replicate(), Partial())
    of_sample = (sharded, sharded) if dim == 0 else whole
    rows = ((B, S, D), sharded, sharded)
    tensors = {
        "x": rows,
        "residual": rows,
        "gate": ((B, 2, D), *of_sample),
        "scale": ((1, 2, D), *whole),
        "shift": rows if shift_per_token else ((B, 2, D), *of_sample),
        **dict.fromkeys(("weight", "bias", "x_bias"), ((D,), *whole)),
        "index": ((B, S), Replicate() if dim == 2 else sharded, None),
    }

    def run(t: dict[str, Any]) -> list[Any]:
        operands = (t[n] for n in tensors if n != "index")
        x, residual, gate, scale, shift, weight, bias, x_bias = operands
        constants = (shift_per_token, norm, 1e-6, 0.0, 1.0, FP32, FP32)
        affine, index = (weight, bias, scale, shift, x_bias), t["index"] > 0
        return norm_modulate_segments(x, residual, gate, *affine, index, *constants)[:2]

    return Call(f"norm_modulate_segments {call}", run, tensors, sharded)


def qk(call: str, dim: int, sections: int = 1, across_heads: bool = False, **other: Any) -> Call:
    sharded, whole = Shard(dim), (Replicate(), Partial())
    tensors, names = {}, []
    for output in ("q", "k"):
        for i in range(sections):
            name = f"{output}{i}"
            names.append(name)
            tensors[f"x {name}"] = ((B, S, H, HEAD_DIM), sharded, sharded)
            of_heads = (Shard(0), Shard(0)) if dim == 2 else whole
            tensors[f"x_bias {name}"] = ((H * HEAD_DIM,), *of_heads)
            width = H * HEAD_DIM if across_heads else HEAD_DIM
            tensors[f"weight {name}"] = ((width,), *whole)
            of_tokens = sharded if dim == 1 else Replicate()
            for table in ("cos", "sin"):
                tensors[f"{table} {name}"] = ((1, S, 1, HEAD_DIM), of_tokens, None)

    def run(t: dict[str, Any]) -> list[Any]:
        fields = [[t[f"{f} {n}"] for n in names] for f in ("x", "x_bias", "weight")]
        tables = [[t[f"{f} {n}"] for n in names] for f in ("cos", "sin")]
        none = [None] * len(names)
        settings = (
            [sections] * 2, "layer", [1e-6] * len(names), 0.0, across_heads, "interleaved",
            "channels", "all", FP32,
        )  # fmt: skip
        return qk_norm_rope(*fields, none, *tables, *settings)[:2]

    return Call(f"qk_norm_rope {call}", run, tensors | other, sharded)


def gated(call: str, dim: int, packing: str = "none", **other: Any) -> Call:
    sharded = Shard(dim)
    tensors = {"gate": ((B, S, D), sharded, sharded)}
    if packing == "none":
        tensors["up"] = tensors["gate"]

    def run(t: dict[str, Any]) -> list[Any]:
        return [gated_activation(t["gate"], t.get("up"), "silu", packing)]

    return Call(f"gated_activation {call}", run, tensors | other, sharded)


def loss(call: str, dim: int, reduction: str, **other: Any) -> Call:
    # Added up is the gradient that the test gives to the loss, as it is the loss: one number.
    # DTensor of 2.11 adds partial sums up before any op that is given `out`.
    is_added_up = torch.__version__.startswith("2.11.")
    sharded, whole = Shard(dim), (Replicate(), Replicate() if is_added_up else Partial())
    tensors = {
        "x": ((B, S, D), sharded, sharded),
        "weight": ((7, D), *whole),
        "bias": ((7,), *whole),
        "target": ((B, S), sharded, None),
    }

    def run(t: dict[str, Any]) -> list[Any]:
        target = t["target"].abs().clamp(max=3).mul(2).long()
        settings = (-100, reduction)
        return [linear_cross_entropy(t["x"], t["weight"], t["bias"], target, *settings)]

    return Call(f"linear_cross_entropy {call}", run, tensors | other, Partial(), communicates=True)


def gathered(call: Call) -> Call:
    """The same where the op cannot be sharded so: everything is replicated."""
    tensors = {
        name: (shape, place, gradient and Replicate())
        for name, (shape, place, gradient) in call.tensors.items()
    }
    return Call(call.name, call.run, tensors, Replicate(), communicates=True)


CALLS = [
    norm("batch", 0),
    norm("tokens", 1),
    norm("tokens, modulated per token", 1, "rms", per_token=True),
    norm("tokens", 1, "none"),
    # To the second process the shift has the shape of x: still its gradient is a sum.
    norm("one token", 1, **dict.fromkeys(("x", "residual"), ((B, 3, D), Shard(1), Shard(1)))),
    segments("batch", 0),
    segments("tokens", 1),
    segments("tokens, shift per token", 1, "rms", shift_per_token=True),
    qk("batch", 0),
    qk("batch, joint", 0, sections=2),
    qk("tokens", 1),
    qk("heads", 2),
    qk("tokens, across heads", 1, across_heads=True),
    gated("batch", 0),
    gated("tokens, packed", 1, "gate_up"),
    gated("features", 2),
    loss("batch", 0, "sum"),
    loss("tokens", 1, "sum"),
    # As a row-parallel linear leaves it before a sharded residual: a reduce-scatter.
    dataclasses.replace(
        norm("partial sums", 1, x=((B, S, D), Partial(), Shard(1))), communicates=True
    ),
    gathered(norm("features", 2)),
    gathered(segments("features", 2)),
    gathered(qk("tokens, joint", 1, sections=2)),
    gathered(qk("heads, across heads", 2, across_heads=True)),
    gathered(gated("features, packed", 2, "gate_up")),
    gathered(loss("mean of tokens", 1, "mean")),
]


def values(call: Call) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32)
        for name, (shape, *_) in call.tensors.items()
    }


def outputs_and_gradients(call: Call, tensors: dict[str, Any]) -> dict[str, Any]:
    leaves = {n: t.requires_grad_() for n, t in tensors.items() if n.split()[0] not in CONSTANTS}
    outs = call.run(tensors)
    # Squared outputs' gradients: a norm maps that of a plain sum to zero.
    grads = torch.autograd.grad(outs, [*leaves.values()], [2 * out.detach() for out in outs])
    found = {f"output {i}": out for i, out in enumerate(outs)}
    return found | dict(zip(leaves, grads, strict=True))


def check(call: Call, mesh: Any) -> None:
    expected = outputs_and_gradients(call, values(call))
    tensors = {n: distributed(t, mesh, call.tensors[n][1]) for n, t in values(call).items()}
    with CommDebugMode() as communication:
        found = outputs_and_gradients(call, tensors)
    counts = dict(communication.get_comm_counts())
    assert bool(counts) == call.communicates, f"{call.name}: {counts}"
    for name, t in found.items():
        assert isinstance(t, DTensor), f"{call.name}, {name}"
        if name.startswith("output"):
            assert t.placements == (call.outputs,), f"{call.name}, {name}: {t.placements}"
        else:
            assert t.placements == (call.tensors[name][2],), f"{call.name}, {name}: {t.placements}"
        # fp32 sums in another order, of up to 12 rows.
        torch.testing.assert_close(
            t.full_tensor(), expected[name], rtol=1e-4, atol=1e-4, msg=f"{call.name}, {name}"
        )


COMPOSITES = ("linears", "silu_linears", "norm_modulate_linears", "gated_activation_linear")


def check_composite(name: str, mesh: Any) -> None:
    """Composites run op by op: sums in place are gathered, values are those of one process."""
    run, shapes = test_connectivity.CALLS[name]
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}

    def gradients(tensors: dict[str, Any]) -> list[Any]:
        outs = run(tensors)
        leaves = [*tensors.values()]
        return [*outs, *torch.autograd.grad(outs, leaves, [out.detach() for out in outs])]

    expected = gradients({n: t.clone().requires_grad_() for n, t in tensors.items()})
    has_tokens = {n for n, shape in shapes.items() if len(shape) == 3 and shape[1] != 1}
    places = {n: Shard(1) if n in has_tokens else Replicate() for n in shapes}
    sharded = {n: distributed(t, mesh, places[n]).requires_grad_() for n, t in tensors.items()}
    found = [t.full_tensor() for t in gradients(sharded)]
    # fp32 sums of 6 rows in another order, of gradients up to 1,000.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def distributed(t: Tensor, mesh: Any, place: Placement) -> DTensor:
    if place.is_partial():
        return DTensor.from_local(t / WORLD_SIZE, mesh, [place])
    return distribute_tensor(t, mesh, [place])


def linear_takes_tokens(mesh: Any) -> bool:
    """Whether PyTorch's own linear runs where a composite that it is part of is to run."""
    x, weight, bias = torch.ones(2, 3, 4), torch.ones(5, 4), torch.ones(5)
    replicated = [distributed(t, mesh, Replicate()) for t in (weight, bias)]
    try:
        torch.nn.functional.linear(distributed(x, mesh, Shard(1)), *replicated)
    except RuntimeError as error:
        assert "flatten multiple dimensions" in str(error)
        return False
    return True


def worker(rank: int) -> None:
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for call in CALLS:
        check(call, mesh)
    if linear_takes_tokens(mesh):
        for name in COMPOSITES:
            check_composite(name, mesh)
    elif rank == 0:
        print("skipped: this PyTorch's linear takes no tokens of a DTensor:", *COMPOSITES)  # 2.11's
    gate = distributed(torch.ones(4, 32), mesh, Shard(0))
    with pytest.raises(NotImplementedError, match=r"_streams.*sharding strategy"):
        torch.ops.fxopt.gated_activation_streams([gate], [None], [None], "silu", "none")
    with pytest.raises(NotImplementedError, match=r"fxopt.quantize.*sharding strategy"):
        Cast(distributed(torch.ones(4, 32), mesh, Shard(0)), OPERAND, OPERAND).pair()


@needs_gloo
def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    spawn(tmp_path, WORLD_SIZE, worker)
