"""What a step holds: the allocator's peak, its pool, and what is kept for backward."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxopt.diagnose.subjects import Subject


@dataclass(frozen=True)
class Memory:
    """Bytes of one call of a step.

    Args:
        peak: most bytes allocated at once, above those before the call.
        reserved: largest size of the allocator's own pool; None where it has none, as on CPUs.
        saved: what autograd keeps for backward, by storage, without the subject's own state.
    """

    peak: int
    reserved: int | None
    saved: int


def measure(subject: Subject, device: torch.device) -> Memory:
    """Two calls of the step, one for the peak and one for what is saved; gradients are dropped."""
    for leaf in subject.leaves().values():
        leaf.grad = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        subject()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        reserved: int | None = torch.cuda.max_memory_reserved(device)
    else:
        peak, reserved = peak_bytes(subject), None
    return Memory(peak, reserved, saved_bytes(subject))


def saved_bytes(subject: Subject) -> int:
    """Bytes that autograd packs in one call, each storage once, beyond the subject's state."""
    kept: dict[int, Tensor] = {}  # the reference keeps the storage's address from being reused

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        subject()
    own = {tensor.untyped_storage()._cdata for tensor in subject.state()}
    return sum(t.untyped_storage().nbytes() for c, t in kept.items() if c not in own)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most bytes that CPU allocations held at once while `function` ran, above those before it.

    From the allocator's own events, as torch.profiler records them: buffers inside of ops and of
    compiled code count too.
    """
    # Kineto otherwise writes two lines to standard error for every profile.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with torch.autograd.profiler.profile(profile_memory=True, use_cpu=True) as profiler:
        function()
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))
