"""Where figures come from: device, driver, versions, commits, threads."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "diffusers", "transformers", "torchao")


def describe(device: torch.device) -> dict[str, Any]:
    """Everything about this machine and this checkout that a figure may depend on."""
    return {
        "device": device_name(device),
        **_gpu(device),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "torch": torch.__version__,  # with the CUDA it was built for
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "commit": commit(Path.cwd()),
        "fxopt_commit": commit(Path(__file__).parent),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with_model = Path("/proc/cpuinfo")
    if with_model.exists():
        for line in with_model.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# By the name that nvidia-smi has for it.
OF_GPU = {
    "driver": "driver_version",
    "power_limit": "power.limit",
    "largest_clock": "clocks.max.sm",
    "application_clock": "clocks.applications.graphics",
}


def _gpu(device: torch.device) -> dict[str, str | None]:
    """What decides the speed of a GPU besides its model; None on a CPU or without nvidia-smi."""
    if device.type != "cuda":
        return dict.fromkeys(OF_GPU)
    uuid = torch.cuda.get_device_properties(device).uuid

    def asked(field: str) -> str | None:  # alone, as a driver that lacks one field tells none
        query = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={field}"]
        return _output([*query, "--format=csv,noheader"], Path.cwd()) or None

    return {name: asked(field) for name, field in OF_GPU.items()}


def version(package: str) -> str | None:
    """Of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit(folder: Path) -> str | None:
    """Of the checkout that holds `folder`, with "+" if files changed; None outside of any."""
    found = _output(["git", "rev-parse", "HEAD"], folder)
    if not found:
        return None
    return found[:12] + ("+" if _output(["git", "status", "--porcelain"], folder) else "")


def _output(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
