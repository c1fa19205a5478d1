"""The most memory that this process held at once: on a CPU, where PyTorch's allocator counts none.

Linux keeps it and forgets it on request. `getrusage` is no measure of a child: it begins with the
largest that its parent had when it was started.

Source: https://www.kernel.org/doc/html/latest/filesystems/proc.html
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
PEAK = "VmHWM:"


def forget() -> str:
    """Begin anew with what is held now; why that cannot be, or ""."""
    try:
        CLEAR.write_text("5")
    except OSError as error:
        return (
            f"memory is the most that the process ever held, as {CLEAR} cannot be written "
            f"({error.strerror}): growth below that does not show"
        )
    return ""


def largest() -> int:
    """Bytes, the most since `forget`, or since the process began."""
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith(PEAK):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
