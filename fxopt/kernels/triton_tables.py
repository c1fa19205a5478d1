"""Launch parameters of the Triton kernels: a table for each, by features, rows and architecture.

Of a kernel's table, the first row whose conditions hold is taken: nothing is tuned in the middle of
a step. `python -m bench.tune` times others off-line and prints the row to put in front. A condition
on rows or architecture costs a binary for each row of the table that is met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Row(NamedTuple):
    """Parameters, and where they hold; bounds are inclusive, None is any.

    Args:
        parameters: by name; which, the kernel's table says.
        min_features, max_features: of a row, all heads together.
        min_rows, max_rows: of all streams or sections of the launch.
        capability: such as 90 for sm_90.
    """

    parameters: Mapping[str, int]
    min_features: int = 0
    max_features: int | None = None
    min_rows: int = 0
    max_rows: int | None = None
    capability: int | None = None

    def holds(self, num_features: int, num_rows: int, capability: int) -> bool:
        return (
            self.min_features <= num_features
            and (self.max_features is None or num_features <= self.max_features)
            and self.min_rows <= num_rows
            and (self.max_rows is None or num_rows <= self.max_rows)
            and self.capability in (None, capability)
        )


# programs: of an SM, by the registers each needs; few, as each leaves partial sums.
# Source: https://github.com/Dao-AILab/quack/blob/main/quack/rmsnorm.py (programs per SM by D).
_NORM_BACKWARD = (
    Row({"num_warps": 1, "pieces": 1, "programs": 16}, max_features=256),
    Row({"num_warps": 2, "pieces": 1, "programs": 16}, max_features=512),
    Row({"num_warps": 4, "pieces": 1, "programs": 8}, max_features=1024),
    Row({"num_warps": 8, "pieces": 1, "programs": 4}, max_features=2048),
    # Two pieces of 2,048 and 1,024 would give a thread of 8 warps 8 bytes to load, not 16.
    Row({"num_warps": 16, "pieces": 1, "programs": 2}, max_features=4096),
)

TABLES = {
    # 16 elements per thread.
    "norm_modulate forward": (
        Row({"num_warps": 1}, max_features=512),
        Row({"num_warps": 2}, max_features=1024),
        Row({"num_warps": 4}, max_features=2048),
        Row({"num_warps": 8}, max_features=4096),
        Row({"num_warps": 16}),
    ),
    # Padded to the next power of two, 5,120 would hold more than a third of its lanes for nothing.
    "norm_modulate backward": (
        *_NORM_BACKWARD,
        Row({"num_warps": 16, "pieces": 2, "programs": 1}),
    ),
    # Four sums per feature take more than the 128 registers that a thread of 16 warps can have, but
    # not the 255 of 8 warps, up to 6,144 features (`bench/static.json`).
    "norm_modulate backward of four sums": (
        *_NORM_BACKWARD,
        Row({"num_warps": 8, "pieces": 2, "programs": 1}),
    ),
    # tile: elements of a program, unless a norm across the heads needs more.
    "qk_norm_rope forward": (Row({"tile": 4096, "elements_per_thread": 16}),),
    # elements_per_thread: without a norm, and half with one: it and its sums double the registers.
    # warps: of an SM; few partial sums, enough loads in flight.
    "qk_norm_rope backward": (Row({"tile": 4096, "elements_per_thread": 16, "warps": 16}),),
    # tile: elements; 4 warps read 16 bytes of bf16 a thread, twice. columns: of a tile, at most.
    "gated_activation forward": (Row({"tile": 2048, "columns": 1024, "num_warps": 4}),),
    "gated_activation backward": (Row({"tile": 2048, "columns": 1024, "num_warps": 4}),),
    # tiles: of a program, which leaves a partial sum of 4 bytes per feature; its 128 rows move 100
    # times that. A tile of 2,048 would take 104 registers of a thread, not 56.
    "gated_activation backward with sums": (
        Row({"tile": 1024, "columns": 512, "num_warps": 4, "tiles": 64}),
    ),
}


def parameters(kernel: str, num_features: int, num_rows: int, x: Tensor) -> Mapping[str, int]:
    """What to launch a kernel with on the device of `x`."""
    capability = capability_of(x)
    rows = TABLES[kernel]
    return next(r.parameters for r in rows if r.holds(num_features, num_rows, capability))


def capability_of(x: Tensor) -> int:
    """Such as 90 for sm_90; 0 on a CPU, where kernels are interpreted."""
    if not x.is_cuda:
        return 0
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor
