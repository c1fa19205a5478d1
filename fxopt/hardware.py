"""Named targets for planning without the device: peaks from the vendor, each with its source.

A peak is what the data sheet states for dense operands; an achievable share of it is an assumption
and is kept apart from it, in `Achievable`. No figure here was measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

from fxopt import errors


@dataclass(frozen=True)
class Achievable:
    """Shares of the peaks that a plan assumes a good kernel reaches, forward and backward together.

    Args:
        bandwidth: of the memory bandwidth, by a memory-bound kernel. RMSNorm in QuACK reaches
            about 3 TB/s of an H100's 3.35.
            Source: https://github.com/Dao-AILab/quack
        gemm: of the dense peak, by a large matrix product; 0.78 of an H100's 989 TFLOPS is 771.
            Source: https://github.com/deepseek-ai/DeepGEMM states 1,550 of 1,979 in FP8 (H800).
        attention: of the dense BF16 peak. FlashAttention-3 states up to 740 TFLOPS forward on an
            H100; with 560 assumed for backward, weighted by FLOPs (2 to 5), that is 0.60.
            Source: https://arxiv.org/abs/2407.08608
    """

    bandwidth: float = 0.92
    gemm: float = 0.78
    attention: float = 0.60


@dataclass(frozen=True)
class Target:
    """What one device can do at best.

    Args:
        name: as given on the command line.
        capability: CUDA compute capability.
        bandwidth: memory bandwidth, bytes/s.
        bf16, fp8, fp4: dense peaks with FP32 accumulation, FLOP/s; 0 where there is no such unit.
        memory: memory size, bytes.
        source: where the peaks are published.
        achievable: the shares of them that plans assume.
    """

    name: str
    capability: tuple[int, int]
    bandwidth: float
    bf16: float
    fp8: float
    fp4: float
    memory: int
    source: str
    achievable: Achievable = Achievable()

    @property
    def device(self) -> str:
        """Device string of the target, as reports print it: "cuda:sm_90"."""
        return "cuda:sm_{}{}".format(*self.capability)


# name, capability, TB/s, then dense TFLOPS in BF16, FP8, FP4, then GB. NVIDIA's pages for Hopper
# and later print BF16 and FP8 with 2:4 sparsity, twice the figures here.
_TARGETS = (
    # A100 SXM 80 GB.
    ("a100", (8, 0), 2.039, 312, 0, 0, 80, "https://www.nvidia.com/en-us/data-center/a100/"),
    # H100 and H200 SXM.
    ("h100", (9, 0), 3.35, 989, 1979, 0, 80, "https://www.nvidia.com/en-us/data-center/h100/"),
    ("h200", (9, 0), 4.8, 989, 1979, 0, 141, "https://www.nvidia.com/en-us/data-center/h200/"),
    # An eighth of DGX B200.
    ("b200", (10, 0), 8.0, 2250, 4500, 9000, 180, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    # A 72nd of GB200 NVL72.
    ("gb200", (10, 0), 8.0, 2500, 5000, 10000, 186, "https://www.nvidia.com/en-us/data-center/gb200-nvl72/"),
    ("l40s", (8, 9), 0.864, 362, 733, 0, 48, "https://www.nvidia.com/en-us/data-center/l40s/"),
    # GeForce: the rows with FP32 accumulation, half the rate of FP16 accumulation.
    (
        "rtx-4090", (8, 9), 1.008, 165.2, 330.3, 0, 24,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
    ),
    (
        "rtx-5090", (12, 0), 1.792, 209.5, 419, 1676, 32,
        "https://images.nvidia.com/aem-dam/Solutions/geforce/blackwell/nvidia-rtx-blackwell-gpu-architecture.pdf",
    ),
)  # fmt: skip

TARGETS = {
    name: Target(
        name, capability, tbps * 1e12, bf16 * 1e12, fp8 * 1e12, fp4 * 1e12, int(gb * 1e9), source
    )
    for name, capability, tbps, bf16, fp8, fp4, gb, source in _TARGETS
}


def of_capability(capability: tuple[int, int]) -> Target | None:
    """The first target of this CUDA compute capability, to plan on a device by; None if unknown."""
    return next((t for t in TARGETS.values() if t.capability == capability), None)


def lookup(name: str) -> Target:
    """The target called `name`, in any case.

    Raises:
        errors.UnknownTarget: with the nearest names.
    """
    try:
        return TARGETS[name.lower()]
    except KeyError:
        raise errors.UnknownTarget(name, tuple(TARGETS)) from None
