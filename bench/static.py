"""`python -m bench.static`: what the Triton kernels compile to, without a GPU.

Every launch of `bench.launches` is specialized and compiled as on the device, for four
architectures. `bench/static.json` holds the figures, so that a change shows in review; `--check`
compares with it and with the limits, `--write` brings it up to date.

- registers: of a thread. spills: bytes of stack of a thread.
- occupancy: warps that fit on an SM by registers, shared memory and threads, over those it holds.
- loads, stores: width of the widest global access of a thread, from the PTX.
- doubles, atomics: instructions in the PTX; sums by atomics would differ from run to run, maxima of
  integers do not and are left out.
- FP8 casts: instructions in the PTX, of kernels that write or read codes.
- binaries: kernels compiled over several batches and token counts.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from bench import rows
from bench.launches import CASES, Case, recorded
from fxopt.kernels import triton_tables

COMMITTED = Path(__file__).with_suffix(".json")
SIZES = ((1, 4608), (2, 77), (3, 1))  # batch, tokens; the first is the one in the table

# Per SM: warps, programs, shared memory; every program takes 1 KB of it for the system. Registers
# are 64K, given out to warps in units of 256. Source: tables "Technical Specifications per Compute
# Capability", https://docs.nvidia.com/cuda/cuda-c-programming-guide/
SMS = {
    80: (64, 32, 164 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    100: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}
REGISTERS, REGISTER_UNIT, SYSTEM_SHARED = 65536, 256, 1024

# ptxas gives up two registers to fit one more program.
SPILLS = 8
# 16 warps that load 4 times 16 bytes each have 32 KB in flight; an H100's 3.35 TB/s times a latency
# of 1 us (assumed) are 25 KB for each of its 132 SMs.
WARPS = 16
WIDTH = 128
# Kernels that store a few sums: 128-bit stores would leave threads idle.
STORE_SUMS = {
    "reduce_kernel",
    "add_up_kernel",
    "amax_kernel",
    "finish_kernel",
    "quantized producers e4m3/tensor/fp32 D=3072 rows_kernel",
    "quantized producers e4m3/tensor/fp32, two streams D=3072 rows_kernel",
    "quantized producers e4m3/tensor/fp32, measuring D=3072 rows_kernel",
}

FP8_CAST = re.compile(r"\bcvt\.rn\.(?:satfinite|f16x2)\.e[45]m")
COPY = r"\bcp\.async\.\w+\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)"  # to shared memory
ATOMIC = re.compile(r"\b(?:red|atom)\.(?!\S*\.max\.[su]\d)")

# What misses a limit. Why `passes/rules/fuse_bias.py` leaves the bias with its linear above 6,144
# features; and 40 heads padded to 64, of which a thread has 16 elements of each operand and sum.
SPILLING = {
    "norm_modulate layer residual gate scale shift x_bias D=8192 backward_kernel",
    "qk_norm_rope across heads, complex tables, x_bias D=5120 backward",
    "qk_norm_rope across heads, packing D=5120 backward",  # on sm_100 alone
}
# 8 warps for the registers of four sums, or of codes; a thread loads 10 or more times 16 bytes
# instead of 4.
SPARSE = {
    f"{op} layer residual gate scale shift x_bias D={width} backward_kernel"
    for op in ("norm_modulate", "norm_modulate_segments")
    for width in (5120, 6144, 8192)
} | {
    f"norm_modulate layer residual gate scale shift, packing D={width} backward_kernel"
    for width in (5120, 6144)
}
# Tiles that are copied ahead are in flight without warps that wait for them.
PIPELINED = {"products_kernel"}
# Half a head is 64 contiguous elements; at 8 for a thread it took 168 registers on sm_80. And one
# number per token.
NARROW = {
    *(
        f"qk_norm_rope {case} backward"
        for case in (
            *("half D=3072", "half D=5120", "half, part of a head D=3072"),
            *("half, packing D=3072", "half, measuring D=3072"),
        )
    ),
    "order_kernel",
}


class Device:
    """Stands in for Triton's CUDA driver, so that a launch is specialized as on a GPU."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(case: Case, width: int, capability: int) -> dict[str, dict[str, Any]]:
    """Binaries by launch and their hash, the one at the first of SIZES first.

    A launch has the kernel's name, with a number if the case launches it again.
    """
    run = JITFunction.run
    found: dict[str, dict[str, Any]] = {}
    num_launches: Counter[str] = Counter()

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any):
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        name = kernel.__name__
        num_launches[name] += 1
        launch = name if num_launches[name] == 1 else f"{name} {num_launches[name]}"
        found.setdefault(launch, {})[binary.hash] = binary

    triton.runtime.driver.set_active(Device(capability))
    on_device = mock.patch.object(triton_tables, "capability_of", lambda _: capability)
    with on_device, recorded(compile_only, JITFunction), torch.device("meta"):
        for batch, num_tokens in SIZES:
            num_launches.clear()
            case.run(batch, num_tokens, width)
    return found


def figures(binary: Any, capability: int) -> dict[str, float]:
    ptx = binary.asm["ptx"]
    registers, spills = resources(binary.asm["cubin"])
    num_warps, shared = binary.metadata.num_warps, binary.metadata.shared
    found = {
        "registers": registers,
        "spills [B]": spills,
        "shared [B]": shared,
        "occupancy [%]": occupancy(registers, num_warps, shared, capability),
        "loads [bit]": widest(ptx, "ld"),
        "stores [bit]": widest(ptx, "st"),
        "doubles": len(re.findall(r"\.f64\b", ptx)),
        "atomics": len(ATOMIC.findall(ptx)),
    }
    if "*u8" in str(binary.src.signature):
        found["FP8 casts"] = len(re.findall(FP8_CAST, ptx))
    return found


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread; all that a Triton kernel has on a stack is spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def occupancy(registers: int, num_warps: int, shared: int, capability: int) -> float:
    max_warps, max_programs, max_shared = SMS[capability]
    of_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    num_programs = min(
        max_programs,
        max_warps // num_warps,
        REGISTERS // of_warp // num_warps,
        max_shared // (shared + SYSTEM_SHARED),
    )
    return round(100 * num_programs * num_warps / max_warps, 1)


def widest(ptx: str, access: str) -> int:
    """Bits of the widest global load ("ld") or store ("st") of a thread; 0 without one."""
    pattern = rf"\b{access}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfsu](\d+)\s"
    found = [int(n or 1) * int(bits) for n, bits in re.findall(pattern, ptx)]
    copies = re.findall(COPY, ptx) if access == "ld" else []
    return max((*found, *(8 * int(size, 16) for size in copies)), default=0)


def table(case: Case, width: int, capability: int) -> Iterator[rows.Row]:
    """All figures of a case and their limits."""
    max_warps = SMS[capability][0]
    for kernel, binaries in compiled(case, width, capability).items():
        name = f"{case.name} D={width} {kernel}"
        at_most: dict[str, float] = {"doubles": 0, "atomics": 0}
        at_least: dict[str, float] = {"FP8 casts": 1}
        if name not in SPARSE and kernel not in PIPELINED:
            at_least["occupancy [%]"] = round(100 * WARPS / max_warps, 1)
        if name not in SPILLING:
            at_most["spills [B]"] = SPILLS
        if not {kernel, name} & NARROW:
            at_least["loads [bit]"] = WIDTH
            if not {kernel, name} & STORE_SUMS:
                at_least["stores [bit]"] = WIDTH
        found = figures(next(iter(binaries.values())), capability)
        for metric, value in (found | {"binaries": len(binaries)}).items():
            limits = at_most.get(metric), at_least.get(metric)
            yield rows.Row(f"{name} sm_{capability}", metric, value, *limits)


def nested(measured: list[rows.Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in measured:
        found.setdefault(row.case, {})[row.metric] = row.value
    return found


def differences(measured: list[rows.Row], is_complete: bool) -> list[str]:
    """What is not as in `bench/static.json`; of rows not measured only if all were to be."""
    committed, found = json.loads(COMMITTED.read_text()), nested(measured)
    lines = [
        f"{case}, {metric}: {value:g}, committed {committed.get(case, {}).get(metric)}"
        for case, values in found.items()
        for metric, value in values.items()
        if committed.get(case, {}).get(metric) != value
    ]
    gone = [case for case in committed if case not in found] if is_complete else []
    return lines + [f"{case}: committed, but no longer there" for case in gone]


def write(measured: list[rows.Row]) -> None:
    """One line for each kernel and architecture."""
    lines = [f"{json.dumps(c)}: {json.dumps(values)}" for c, values in nested(measured).items()]
    COMMITTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.static", description=__doc__)
    rows.add_arguments(parser)
    parser.add_argument("--only", default="", metavar="NAME", help="cases that contain NAME")
    parser.add_argument(
        "--capability", type=int, nargs="+", choices=[*SMS], default=[*SMS], help="default: all"
    )
    parser.add_argument("--write", action="store_true", help=f"bring {COMMITTED.name} up to date")
    args = parser.parse_args(argv)
    measured = [
        row
        for case in CASES
        for width in case.widths
        if args.only in f"{case.name} D={width}"
        for capability in args.capability
        if capability in case.capabilities
        for row in table(case, width, capability)
    ]
    if not measured:
        parser.error(f"no case contains {args.only!r}; there are {[c.name for c in CASES]}")
    is_complete = not args.only and len(args.capability) == len(SMS)
    if args.write:
        if not is_complete:
            parser.error("--write takes all cases and architectures")
        write(measured)
    code = rows.publish(args, measured)
    if not args.check:
        return code
    found = differences(measured, is_complete)
    for row in measured:
        if row.holds is False:
            print(f"{row.case}, {row.metric}: {row.value:g}, limit {row.target}", file=sys.stderr)
    print("\n".join(found), file=sys.stderr)
    return int(bool(code or found))


if __name__ == "__main__":
    sys.exit(main())
