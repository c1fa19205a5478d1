"""How the ops run on DTensors: sharded rows stay where they are.

A rule follows the first tensor that is sharded over a dim that the op works along row by row: the
other tensors with rows are sharded alike, operands that all rows share are replicated, and their
gradients are partial sums. Where nothing is sharded so, everything is replicated, as DTensor does
for its own norms. Ops without a rule (quantization, whose scales cross rows) refuse DTensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Arguments = dict[str, Any]  # by the name in the op's schema; tensors are `Meta`


@dataclass(frozen=True)
class Meta:
    """A DTensor argument: its global shape and how it lies on the mesh."""

    spec: Any

    @property
    def shape(self) -> torch.Size:
        return self.spec.tensor_meta.shape


@dataclass(frozen=True)
class Rule:
    """Which dims an op can be sharded over, and what lies along them.

    Args:
        decide: names of the arguments whose placement decides, in order; tensors or lists.
        dims: of the first of them, those that the op can be sharded over.
        inputs: placements of the tensor arguments for such a dim, in the order of the arguments.
        outputs: for such a dim, placements of outputs of the shapes given.
    """

    decide: tuple[str, ...]
    dims: Callable[[Arguments], Sequence[int]]
    inputs: Callable[[Arguments, int], list[Any]]
    outputs: Callable[[Arguments, int, list[torch.Size]], list[Any]]


def rows(
    *names: str,
    operands: Sequence[str] = (),
    tables: Callable[[Arguments], Sequence[str]] = lambda a: (),
    outputs: Sequence[str | None],
    is_elementwise: Callable[[Arguments], bool] = lambda a: False,
) -> Rule:
    """Rule of an op over `[..., D]` that works along every dim but the last.

    Args:
        names: the arguments that decide.
        operands: arguments that broadcast to the rows; all others have rows of their own.
        tables: those of them whose rows the argument `index` picks, which broadcasts to the rows
            without their last dim.
        outputs: for each output the operand whose gradient it is; None for one that has rows.
        is_elementwise: whether the last dim can be sharded too.
    """

    def rank(a: Arguments) -> int:
        return max(len(a[name].shape) for name in names if isinstance(a.get(name), Meta))

    def broadcast(a: Arguments, name: str, shape: torch.Size) -> torch.Size:
        """The shape as it broadcasts to the rows."""
        if name in tables(a) and len(shape) > 1:
            return torch.Size([*shape[:-2], 1, shape[-1]])
        return torch.Size([*shape, 1]) if name == "index" else shape

    def inputs(a: Arguments, dim: int) -> list[Any]:
        given = [(name, t) for name, t in a.items() if isinstance(t, Meta)]
        return [
            operand(broadcast(a, name, t.shape), dim, rank(a))
            if name in operands or name == "index"
            else row(t.shape, dim)
            for name, t in given
        ]

    def placed(a: Arguments, dim: int, shapes: list[torch.Size]) -> list[Any]:
        return [
            row(shape, dim) if name is None else gradient(broadcast(a, name, shape), dim, rank(a))
            for name, shape in zip(outputs, shapes, strict=True)
        ]

    def dims(a: Arguments) -> Sequence[int]:
        return range(rank(a) if is_elementwise(a) else rank(a) - 1)

    return Rule(names, dims, inputs, placed)


BATCH, TOKENS, HEADS = range(3)


def sections(outputs: Callable[[Arguments, int, list[torch.Size]], list[Any]]) -> Rule:
    """Rule of an op on sections [B, S, H, d], as `qk_norm_rope` takes them.

    Tokens can be sharded where no output joins sections: a process would join its own tokens only.
    Nor where only the first or the last are rotated.
    The statistics of all sections are one vector, of which each process has its own; only the
    backward reads it, and the sections decide there as in the forward.
    """
    from torch.distributed.tensor import Replicate, Shard

    def dims(a: Arguments) -> Sequence[int]:
        found = [BATCH]
        if all(count == 1 for count in a["joined"]) and a["rotated"] == "all":
            found.append(TOKENS)
        if not a["across_heads"]:
            found.append(HEADS)
        return found

    def place(name: str, t: Meta, dim: int) -> Any:
        if name == "x_bias":  # [H*d]
            return Shard(0) if dim == HEADS else Replicate()
        if name in ("mean", "rstd"):
            return row(t.shape, 0)
        return row(t.shape, dim) if name in ("x", "grads") else operand(t.shape, dim, 4)

    def inputs(a: Arguments, dim: int) -> list[Any]:
        return [place(name, t, dim) for name, t in each(a)]

    return Rule(("x",), dims, inputs, outputs)


def each(a: Arguments) -> Iterator[tuple[str, Meta]]:
    """The tensor arguments with the names of theirs or of their lists, in order."""
    for name, argument in a.items():
        for t in argument if isinstance(argument, list) else [argument]:
            if isinstance(t, Meta):
                yield name, t


def of_sections(a: Arguments, dim: int, shapes: list[torch.Size]) -> list[Any]:
    """Outputs of `qk_norm_rope`: one for each entry of `joined`, then mean and rstd."""
    return [row(shape, 0 if len(shape) == 1 else dim) for shape in shapes]


def of_section_gradients(a: Arguments, dim: int, shapes: list[torch.Size]) -> list[Any]:
    """Outputs of its backward: gradients of x, x_bias, weight and bias, field by field."""
    num_sections = len(a["x"])
    found = [row(shape, dim) for shape in shapes[:num_sections]]
    for i, shape in enumerate(shapes[num_sections:]):
        is_x_bias = i < num_sections
        found.append(row(shape, 0) if is_x_bias and dim == HEADS else gradient(shape, dim, 4))
    return found


def is_absent(shape: torch.Size) -> bool:
    """Whether this is what an op returns for an output that was not asked for."""
    return shape == (0,)


def row(shape: torch.Size, dim: int) -> Any:
    from torch.distributed.tensor import Replicate, Shard

    return Replicate() if is_absent(shape) else Shard(dim)


def operand(shape: torch.Size, dim: int, rank: int) -> Any:
    """Sharded with the rows where it differs along `dim` of `rank`, else the same for all."""
    from torch.distributed.tensor import Replicate, Shard

    own = dim - (rank - len(shape))
    return Shard(own) if own >= 0 and shape[own] != 1 else Replicate()


def gradient(shape: torch.Size, dim: int, rank: int) -> Any:
    """That of an operand: where all rows share it, each process has a part of the sum."""
    from torch.distributed.tensor import Partial, Replicate

    if is_absent(shape):
        return Replicate()
    place = operand(shape, dim, rank)
    return Partial() if place == Replicate() else place


def register(op: torch._ops.OpOverload, rule: Rule) -> None:
    """Have DTensor run `op` by `rule`, where this PyTorch has DTensor."""
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    # Every argument that is no tensor counts: a placement may depend on it.
    info = RuntimeSchemaInfo(static_argnum=0, needs_pytree=True)
    propagator = DTensor._op_dispatcher.sharding_propagator
    propagator.register_op_strategy(op, lambda schema: _strategy(rule, schema), info)


def _strategy(rule: Rule, schema: Any) -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.distributed.tensor._op_schema import OpSpec, OpStrategy

    names = [argument.name for argument in schema.op._schema.arguments]
    given = [_metas(argument) for argument in schema.args_schema]
    a = dict(zip(names, given, strict=False))
    tensors = [t for t in tree_leaves(given) if isinstance(t, Meta)]
    # Not from the schema, which in 2.11 asks its first argument alone: it may be None.
    mesh = tensors[0].spec.mesh
    shapes = _output_shapes(schema.op, given)
    of_inputs, of_outputs = [], []
    for mesh_dim in range(mesh.ndim):
        dim = _dim(rule, a, mesh_dim)
        if dim is None:
            of_inputs.append([Replicate()] * len(tensors))
            of_outputs.append([Replicate()] * len(shapes))
        else:
            of_inputs.append(rule.inputs(a, dim))
            of_outputs.append(rule.outputs(a, dim, shapes))
    inputs = [
        DTensorSpec(mesh, places, t.spec.tensor_meta)
        for t, places in zip(tensors, zip(*of_inputs, strict=True), strict=True)
    ]
    outputs = tuple(DTensorSpec(mesh, places) for places in zip(*of_outputs, strict=True))
    is_single = len(schema.op._schema.returns) == 1 and not schema.return_type_list_tensor_like()
    return OpStrategy([OpSpec(outputs[0] if is_single else outputs, inputs)])


def _metas(argument: Any) -> Any:
    """The argument with `Meta` for its tensors, which come as strategies, in lists or not."""
    from torch.distributed.tensor._op_schema import OpStrategy, TupleStrategy

    if isinstance(argument, TupleStrategy):
        return [_metas(child) for child in argument.children]
    if isinstance(argument, (list, tuple)):
        return [_metas(item) for item in argument]
    if isinstance(argument, OpStrategy):
        return Meta(argument.strategies[0].output_spec)
    return argument


def _dim(rule: Rule, a: Arguments, mesh_dim: int) -> int | None:
    """The dim that the op is sharded over along a dim of the mesh; None to replicate."""
    dims = rule.dims(a)
    for t in tree_leaves([a.get(name) for name in rule.decide]):
        place = t.spec.placements[mesh_dim] if isinstance(t, Meta) else None
        if place is not None and place.is_shard() and place.dim in dims:
            return place.dim
    return None


def _output_shapes(op: torch._ops.OpOverload, given: list[Any]) -> list[torch.Size]:
    def on_meta(t: Any) -> Any:
        if not isinstance(t, Meta):
            return t
        return torch.empty(t.shape, dtype=t.spec.tensor_meta.dtype, device="meta")

    found = op(*tree_map(on_meta, given))
    return [t.shape for t in ([found] if isinstance(found, Tensor) else found)]
