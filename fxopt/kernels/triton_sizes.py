"""Numbers of rows as kernel arguments that Triton does not specialize on."""

from __future__ import annotations

import triton
import triton.language as tl


def unspecialized(num: int) -> int:
    """An odd number above 1: inside a tuple Triton compiles anew for a 1 and multiples of 16."""
    return 2 * num + 3


@triton.jit
def size(unspecialized: tl.tensor) -> tl.tensor:
    """Inverse of `unspecialized`, in a kernel."""
    return (unspecialized - 3) // 2
