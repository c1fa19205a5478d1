"""Numbers of rows as kernel arguments that Triton does not specialize on.

The length of a tuple is an argument beside it: Triton 3.6 takes none of one that holds None.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Ends a tuple that holds tuples: Triton 3.6 otherwise forgets, in loops, the constants of the inner
# ones, such as a stride of 1.
LAST = tl.constexpr(0)


def unspecialized(num: int) -> int:
    """An odd number above 1: inside a tuple Triton compiles anew for a 1 and multiples of 16."""
    return 2 * num + 3


@triton.jit
def size(unspecialized: tl.tensor) -> tl.tensor:
    """Inverse of `unspecialized`, in a kernel."""
    return (unspecialized - 3) // 2
