"""The demo's two pictures: loss curves and generated digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor


def draw_losses(path: Path, losses: Mapping[str, Sequence[float]], bound: float) -> None:
    """Losses by run, and below them how far each is from the first run's."""
    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(9, 7), layout="constrained")
    first, *others = losses
    expected = torch.tensor(losses[first])
    steps = range(1, len(expected) + 1)
    for width, (name, values) in zip(_widths(len(losses)), losses.items(), strict=True):
        above.plot(steps, values, label=name, linewidth=width)
    above.set(ylabel="flow-matching loss", yscale="log", title="The curves lie on one another")
    above.legend()
    for index, name in enumerate(others, start=1):
        gaps = (torch.tensor(losses[name]) - expected).abs() / expected
        below.plot(steps, gaps.clamp_min(1e-9), label=name, color=f"C{index}", linewidth=1)
    below.axhline(bound, color="black", linestyle="--", linewidth=1, label="bound")
    below.set(xlabel="step", ylabel=f"distance from {first}, relative", yscale="log")
    below.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _widths(num_curves: int) -> list[float]:
    """Wide below, narrow above: curves that coincide stay visible."""
    return [1 + 1.5 * (num_curves - 1 - index) for index in range(num_curves)]


def draw_samples(path: Path, rows: Mapping[str, Tensor]) -> None:
    """One row of images [10, SIDE, SIDE] per name."""
    num_columns = len(next(iter(rows.values())))
    figure, grid = plt.subplots(
        len(rows), num_columns, figsize=(num_columns, 1.1 * len(rows)), layout="constrained"
    )
    for (name, images), axes in zip(rows.items(), grid, strict=True):
        for axis, image in zip(axes, images, strict=True):
            axis.imshow(image.clamp(-1, 1), cmap="gray", vmin=-1, vmax=1)
            axis.set(xticks=[], yticks=[])
        axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(path, dpi=100)
    plt.close(figure)
