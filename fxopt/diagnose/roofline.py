"""How fast a step could be at best: its FLOPs by dtype, and peaks that were measured here.

A result faster than that is not a result. Peaks come from a calibration on the device at hand and
never from a table of data sheets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fxopt.diagnose.devices import TorchDevice
from fxopt.diagnose.subjects import Subject

# Best of this many runs is a peak: noise only ever adds time.
NUM_RUNS = 7
SIDES = {"cpu": (256, 512, 1024), "cuda": (4096, 8192)}
# A peak that was measured for milliseconds may be passed by this factor; what is faster is INVALID.
ALLOWANCE = 1.25
# All 8-bit formats, mixed ones too, run on the same units: this one stands for them.
FP8 = "float8_e4m3fn"
# Ops without a formula in PyTorch that take their operands in the order of one that has it.
ATen = torch.ops.aten
ALIASES = {
    ATen.addmm_: ATen.addmm,
    ATen.baddbmm_: ATen.baddbmm,
    ATen._scaled_dot_product_flash_attention_for_cpu: ATen._scaled_dot_product_flash_attention,
    ATen._scaled_dot_product_flash_attention_for_cpu_backward: (
        ATen._scaled_dot_product_flash_attention_backward
    ),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one call, by dtype of the operands.

    Args:
        trained: of what a gradient passes through.
        frozen: of modules without a trained parameter whose results need no gradient: encoders.
    """

    trained: Mapping[str, int]
    frozen: Mapping[str, int]

    def seconds(self, peaks: Mapping[str, float]) -> float:
        """Least time at `peaks` (FLOP/s by dtype); dtypes without a peak count as free."""
        return sum(
            count / peaks[dtype]
            for counts in (self.trained, self.frozen)
            for dtype, count in counts.items()
            if dtype in peaks
        )


class _Counting(TorchDispatchMode):
    """Adds up FLOPs by dtype of every op that torch.utils.flop_counter has a formula for."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = ALIASES.get(func.overloadpacket, func.overloadpacket)
        formula = flop_registry.get(packet)
        if formula is not None:
            count = formula(*args, **(kwargs or {}), out_val=out)
            if count:
                self.counts[operand_dtype(args)] += count
        return out


def operand_dtype(args: tuple) -> str:
    """What an op multiplies: the narrowest of its operands, as statistics and scales are wider."""
    operands = [t.dtype for t in tree_leaves(args) if isinstance(t, Tensor)]
    if torch.uint8 in operands:  # fxopt keeps two e2m1 codes in one byte
        return "float4_e2m1fn_x2"
    numbers = [d for d in operands if d.is_floating_point or d.is_complex]
    narrowest = min(numbers or operands, key=lambda dtype: dtype.itemsize)
    is_fp8 = narrowest.is_floating_point and narrowest.itemsize == 1
    return FP8 if is_fp8 else str(narrowest).removeprefix("torch.")


def count(subject: Subject) -> Flops:
    """FLOPs of one call of the step, which must run eagerly: compiled code shows no ops."""
    counting, frozen = _Counting(), Counter[str]()
    with _frozen_apart(subject.model, counting, frozen), counting:
        subject()
    return Flops(dict(counting.counts), dict(frozen))


@contextmanager
def _frozen_apart(
    model: nn.Module | None, counting: _Counting, frozen: Counter[str]
) -> Iterator[None]:
    """Moves to `frozen` what outermost modules without trained parameters add to the count."""
    started: dict[nn.Module, Counter[str]] = {}

    def enter(module: nn.Module, _: Any) -> None:
        started[module] = counting.counts.copy()

    def leave(module: nn.Module, _: Any, result: Any) -> None:
        before = started.pop(module)
        if not any(isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(result)):
            frozen.update(counting.counts - before)
            counting.counts = before

    handles = []
    for module in [] if model is None else outermost_frozen(model):
        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def outermost_frozen(model: nn.Module) -> list[nn.Module]:
    """Modules that have parameters, none of them trained, and no such module above them."""
    parameters = list(model.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        return [model]
    return [found for child in model.children() for found in outermost_frozen(child)]


@dataclass(frozen=True)
class Peaks:
    """What this device reached in a calibration.

    Args:
        flops: FLOP/s of the best matrix product, by dtype.
        bandwidth: bytes/s of a copy that no cache holds.
    """

    flops: Mapping[str, float]
    bandwidth: float


def calibrate(device: TorchDevice, dtypes: set[str]) -> Peaks:
    """Measure the peaks of those dtypes that the device multiplies; some seconds."""
    peaks = {}
    for name in sorted(dtypes):
        dtype = getattr(torch, name)
        if dtype.itemsize > 1 or _has_fp8(device, dtype):
            rates = [_product_rate(device, dtype, side) for side in SIDES[device.device.type]]
            peaks[name] = max(rates)
    return Peaks(peaks, _bandwidth(device))


def _has_fp8(device: TorchDevice, dtype: torch.dtype) -> bool:
    """Whether the device multiplies 8-bit floats; fxopt emulates what is narrower everywhere."""
    if device.device.type != "cuda" or dtype is not torch.float8_e4m3fn:
        return False
    return torch.cuda.get_device_capability(device.device) >= (8, 9)


def _product_rate(device: TorchDevice, dtype: torch.dtype, side: int) -> float:
    a, b = torch.randn(2, side, side, device=device.device).to(dtype)
    scale = torch.ones((), device=device.device)

    def product() -> Tensor:
        if dtype.itemsize > 1:
            return a @ b
        return torch._scaled_mm(a, b.t(), scale, scale, out_dtype=torch.bfloat16)

    return 2 * side**3 / _best(device, product)


def _bandwidth(device: TorchDevice) -> float:
    source = torch.ones(4 * device.cache_bytes(), dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(device, lambda: target.copy_(source))


def _best(device: TorchDevice, function: Callable[[], object]) -> float:
    return min(device.seconds(function, 1, False) for _ in range(NUM_RUNS))


def floor_seconds(
    flops: Flops, peaks: Peaks, cold_bytes: int = 0, dtypes: Iterable[str] = ()
) -> float:
    """Least time of a step: its products at the peaks, or `cold_bytes` at the bandwidth.

    t = max(sum_dtype flops / peak, cold_bytes / bandwidth) / ALLOWANCE

    Args:
        dtypes: into which the products may have moved; then the fastest of them counts.
    """
    fastest = max((peaks.flops.get(dtype, 0.0) for dtype in dtypes), default=0.0)
    rates = {dtype: max(rate, fastest) for dtype, rate in peaks.flops.items()}
    return max(flops.seconds(rates), cold_bytes / peaks.bandwidth) / ALLOWANCE


def utilization(flops: Flops, peaks: Peaks, seconds: float) -> dict[str, float]:
    """MFU by dtype: FLOPs per second of the step over the calibrated peak of the dtype."""
    return {
        dtype: total / seconds / peaks.flops[dtype]
        for dtype, total in flops.trained.items()
        if dtype in peaks.flops
    }
