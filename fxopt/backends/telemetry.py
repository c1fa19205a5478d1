"""Telemetry: what quantization does to the operands of each GEMM, sampled, by timestep.

Kernels count while they quantize (`kernels/counters.py`). The host reads what they counted in
`report`, and for demotions one sample later.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fxopt.backends import state
from fxopt.backends.compiled import CompiledBlocks
from fxopt.backends.demotion import Demotions, Hysteresis
from fxopt.backends.timesteps import bucket_labels, bucket_of
from fxopt.errors import NoTelemetry
from fxopt.kernels import counters
from fxopt.kernels.counters import FIELDS, MAGNITUDE, Slot, Slots
from fxopt.kernels.origins import leaf_of
from fxopt.telemetry_report import OperandRecord, TelemetryReport

OPERANDS = ("x", "weight", "gradient")
# By operand: the GEMMs that read its row-wise and its transposed copy.
GEMMS = (("fprop", "wgrad"), ("fprop", "dgrad"), ("dgrad", "wgrad"))
REMEDY = "use fxopt.optimize or fxopt.swap, executed eagerly"


@contextmanager
def telemetry(
    model: nn.Module,
    *,
    every: int = 100,
    buckets: Sequence[float] = (),
    demote_above: float | None = None,
    promote_below: float = 0.01,
    patience: int = 3,
    group: Any = None,
) -> Iterator[Telemetry]:
    """Count what quantization does to the operands of `model`'s GEMMs, in one batch of `every`.

        with fxopt.telemetry(model, every=100, buckets=(250, 500, 750)) as telemetry:
            for batch, timesteps in batches:
                telemetry.batch(timesteps)
                loss(model, batch, timesteps).backward()
        print(telemetry.report())

    Of each operand: largest magnitude, scales, the share of nonzero values that became zero, the
    share that saturated, and values that are not finite. The kernels that quantize count, on their
    device; a step never waits for it. Batches that are not sampled launch nothing more.

    Args:
        model: what was given to `optimize` or `swap` with a low-precision recipe.
        every: batches from one sample to the next; the first is sampled.
        buckets: ascending timesteps that part one bucket from the next, in the loop's unit. A
            batch whose timesteps lie in several is counted as "mixed": a tensor is quantized
            whole, and its counters cannot be told apart by sample.
        demote_above: a GEMM of which an operand loses more than this share of its nonzero values,
            to zero or beyond the largest, is multiplied in the model's own dtype; None for never.
            Linears that share their input are demoted together. In sampled batches, and behind
            the `with`, all GEMMs run as the recipe says.
        promote_below: one that loses less runs in low precision again.
        patience: samples in a row that either takes.
        group: process group of the ranks that decide together; None for all.

    Raises:
        NoTelemetry: the model has no quantized linear that runs eagerly, another model is being
            recorded, or an argument makes no sense.
    """
    rule = None
    if demote_above is not None:
        rule = Hysteresis(demote_above, promote_below, patience, group)
    found = Telemetry(model, every, buckets, rule)
    counters.record_to(found)
    try:
        yield found
    finally:
        counters.record_to(None)


class Telemetry:
    """The recording of one model: told of each batch by the loop, read by `report`."""

    def __init__(
        self,
        model: nn.Module,
        every: int,
        buckets: Sequence[float],
        rule: Hysteresis | None = None,
    ) -> None:
        state.require_module(model)
        least = 1 if rule is None else 2  # what is demoted runs as the recipe says in samples
        if every < least:
            raise NoTelemetry(f"every is {every}", f"give a number of batches, {least} or more")
        if any(a >= b for a, b in pairwise(buckets)):
            raise NoTelemetry(f"buckets are {tuple(buckets)}", "give ascending timesteps")
        _require_counting(model, demotes=rule is not None)
        self.model, self.every, self.buckets = model, every, tuple(buckets)
        matrices = [name for name, p in model.named_parameters() if p.dim() == 2]
        self.indices = {name: i for i, name in enumerate(matrices)}
        self.demotions = None if rule is None else Demotions(rule, len(matrices))
        self.is_sampling = False
        self.num_batches = self.num_sampled = self.num_unnamed = 0
        self.sharing: dict[int, dict[int, None]] = {}  # linears on one input, by the first
        self.parameters: dict[int, tuple[weakref.ref[Tensor], int | None]] = {}
        self.tables: dict[torch.device, _Table] = {}
        self.bucket: Tensor | None = None  # of the batch that is being sampled

    def batch(self, timesteps: Tensor | Sequence[float] | float | None = None) -> None:
        """Say that the next batch comes, before its forward.

        Args:
            timesteps: those of the batch, on any device; None without buckets.
        """
        if self.buckets and timesteps is None:
            raise NoTelemetry(
                "there are buckets and no timesteps", "give those of the batch to batch(timesteps)"
            )
        self.is_sampling = self.num_batches % self.every == 0
        self.num_batches += 1
        if self.is_sampling:
            bucket = bucket_of(timesteps, self.buckets)
            self._gather()
            if self.demotions is not None:
                self.demotions.end_sample()
            self.num_sampled += 1
            self.bucket = bucket

    def slots(self, weights: Sequence[Tensor]) -> Slots | None:
        """Where a node with these weights is to count, or None for nowhere."""
        if not self.is_sampling:
            return None
        found = [self._index(weight) for weight in weights]
        indices = [i for i in found if i is not None]
        if not indices or len(indices) < len(found):
            self.num_unnamed += 1
            return None
        self.sharing.setdefault(indices[0], {}).update(dict.fromkeys(indices))
        device = weights[0].device
        if device not in self.tables:
            self.tables[device] = _Table(len(self.indices), len(self.buckets) + 2, device)
        x, weight, gradient = self.tables[device].current.unbind(1)
        return Slots(
            Slot(*x[indices[0]]),
            [Slot(*weight[i]) for i in indices],
            [Slot(*gradient[i]) for i in indices],
        )

    def demoted(self, weights: Sequence[Tensor]) -> set[str]:
        """The GEMMs that a node with these weights is to run in the model's dtype."""
        if self.demotions is None or self.is_sampling or not self.demotions.names:
            return set()
        found = [self._index(weight) for weight in weights]
        return self.demotions.of(i for i in found if i is not None)

    def _index(self, weight: Tensor) -> int | None:
        """Which parameter a weight is, or is a cast of."""
        weight = leaf_of(weight)
        known = self.parameters.get(id(weight))
        if known is None or known[0]() is not weight:
            # Looked up when met: FSDP2 puts other tensors in place of the parameters.
            for name, parameter in self.model.named_parameters():
                index = self.indices.get(name)
                self.parameters[id(parameter)] = weakref.ref(parameter), index
            known = self.parameters.get(id(weight))
            if known is None or known[0]() is not weight:
                self.parameters[id(weight)] = weakref.ref(weight), None
                return None
        return known[1]

    def _gather(self) -> None:
        """Add what was counted since the last sample to its bucket."""
        if self.bucket is not None:
            for table in self.tables.values():
                if self.demotions is not None:
                    self.demotions.add(table.current)
                table.gather(self.bucket)

    def report(self) -> TelemetryReport:
        """All that was counted so far; waits for the device, and copies once from it."""
        self._gather()
        records = [r for table in self.tables.values() for r in self._records(table)]
        sampled = self.every, self.num_sampled, self.num_unnamed
        return TelemetryReport(*sampled, tuple(records), tuple(self._demoted()))

    def _demoted(self) -> Iterator[tuple[str, str]]:
        if self.demotions is not None:
            names = list(self.indices)
            for index, gemms in sorted(self.demotions.names.items()):
                yield from ((names[index].removesuffix(".weight"), gemm) for gemm in sorted(gemms))

    def _records(self, table: _Table) -> Iterator[OperandRecord]:
        labels, names = bucket_labels(self.buckets), list(self.indices)
        totals = table.totals.cpu()
        for bucket, index, operand, copy in (totals[..., 0] > 0).nonzero().tolist():
            linears = self.sharing[index] if operand == 0 else (index,)
            yield _record(
                tuple(names[i].removesuffix(".weight") for i in linears),
                GEMMS[operand][copy],
                OPERANDS[operand],
                labels[bucket],
                totals[bucket, index, operand, copy],
            )


class _Table:
    """Counters on one device: [linear, operand, copy, field], of this sample and by bucket."""

    def __init__(self, num_linears: int, num_buckets: int, device: torch.device) -> None:
        shape = num_linears, len(OPERANDS), 2, len(FIELDS)
        with torch.inference_mode(False):  # the first to quantize may be an evaluation
            self.current = torch.zeros(shape, dtype=torch.int64, device=device)
            self.totals = torch.zeros((num_buckets, *shape), dtype=torch.int64, device=device)

    def gather(self, bucket: Tensor) -> None:
        device = self.totals.device
        here = torch.arange(len(self.totals), device=device) == bucket.to(device, non_blocking=True)
        counters.merge(self.totals, self.current * here.view(-1, 1, 1, 1, 1))
        self.current.zero_()


def _record(
    linears: tuple[str, ...], gemm: str, operand: str, timesteps: str, line: Tensor
) -> OperandRecord:
    found = dict(zip(FIELDS, line.tolist(), strict=True))
    nonzero = found["nonzero"]
    scales = MAGNITUDE - found["least_scale"], found["largest_scale"]
    least, largest = (_magnitude(bits) if nonzero else None for bits in scales)
    return OperandRecord(
        linears,
        gemm,
        operand,
        timesteps,
        found["samples"],
        nonzero,
        _magnitude(found["amax"]),
        least,
        largest,
        found["underflowed"] / max(nonzero, 1),
        found["saturated"] / max(nonzero, 1),
        found["nonfinite"],
    )


def _magnitude(bits: int) -> float | None:
    """The fp32 number of these bits, None if it is not finite."""
    value = torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
    return value if math.isfinite(value) else None


def _require_counting(model: nn.Module, demotes: bool) -> None:
    name, opened = type(model).__name__, state.doors(model)
    if counters.is_recording():
        raise NoTelemetry("another one is on", "leave its `with` first")
    if state.is_compiled(model) or any(isinstance(door, CompiledBlocks) for door in opened):
        raise NoTelemetry(f"{name} goes through torch.compile, whose graphs do not count", REMEDY)
    if not any(door.settings.recipe.quantizes for door in opened):
        remedy = 'call fxopt.optimize(model, recipe="fp8") first, and pass the same object'
        raise NoTelemetry(f"no door has quantized {name}", remedy)
    if demotes and any(door.settings.recipe.all_gather != "model" for door in opened):
        what = "what demote_above demotes reads weights, of which all_gather='fp8' gathers codes"
        raise NoTelemetry(what, "leave one of them out")
