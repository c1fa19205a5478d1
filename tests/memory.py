"""The most memory that a process of its own has taken."""

from pathlib import Path


def peak() -> int:
    """Bytes of this process since its program began.

    `ru_maxrss` is no measure of it: a child begins with what its parent had when it was started,
    here with all that the tests before have loaded.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    (kilobytes,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return 1024 * int(kilobytes)
