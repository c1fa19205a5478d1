"""What the demo trains: a FLUX-architecture model that learns digits by flow matching.

Shapes: B images, S image tokens of 2x2 pixels, C pixels per token, T text tokens, E text features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.diagnose import memory
from fxopt.diagnose.subjects import Subject

SIDE, PATCH = 8, 2  # pixels
NUM_CLASSES = 10
T, E = 6, 32
HEAD_DIM = 32
LEARNING_RATE = 4e-3


@dataclass(frozen=True)
class Scale:
    """How large the model and its training are; 2.3 million parameters by default."""

    num_steps: int = 400
    batch: int = 32
    num_double: int = 2
    num_single: int = 4
    num_heads: int = 4


class Batch(NamedTuple):
    """Images with the noise and the times at which to learn them."""

    images_BSC: Tensor
    labels_B: Tensor
    noise_BSC: Tensor
    time_B: Tensor

    def reversed(self) -> Batch:
        """The same samples, last first: another order of every sum over them."""
        return Batch(*(tensor.flip(0) for tensor in self))


def build_model(scale: Scale, seed: int) -> nn.Module:
    """Diffusers' own FLUX, small, with seeded weights."""
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            in_channels=PATCH * PATCH,
            num_layers=scale.num_double,
            num_single_layers=scale.num_single,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=scale.num_heads,
            joint_attention_dim=E,
            pooled_projection_dim=NUM_CLASSES,
            axes_dims_rope=(8, 12, 12),
        )
    return cast(nn.Module, model)


def load_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1797 digits in [-1, 1] as tokens [N, S, C], and their labels [N]."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return pack(torch.tensor(digits.images).float() / 8 - 1), torch.tensor(digits.target).long()


def pack(images: Tensor) -> Tensor:
    """[N, SIDE, SIDE] -> [N, S, C]"""
    rows = SIDE // PATCH
    return (
        images.reshape(-1, rows, PATCH, rows, PATCH).transpose(2, 3).reshape(-1, rows**2, PATCH**2)
    )


def unpack(tokens: Tensor) -> Tensor:
    """[N, S, C] -> [N, SIDE, SIDE]"""
    rows = SIDE // PATCH
    return tokens.reshape(-1, rows, rows, PATCH, PATCH).transpose(2, 3).reshape(-1, SIDE, SIDE)


def batches(scale: Scale, seed: int) -> Iterator[Batch]:
    """The training data in its order, the same for one seed."""
    images, labels = load_images()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(scale.num_steps):
        chosen_B = torch.randint(len(images), (scale.batch,), generator=generator)
        images_BSC = images[chosen_B]
        noise_BSC = torch.randn(images_BSC.shape, generator=generator)
        time_B = torch.rand(scale.batch, generator=generator)
        yield Batch(images_BSC, labels[chosen_B], noise_BSC, time_B)


def velocity(model: nn.Module, x_BSC: Tensor, time_B: Tensor, labels_B: Tensor) -> Tensor:
    """The model's estimate of dx/dtime [B, S, C], conditioned on the class.

    Fixed random features of the class stand in for a frozen text encoder's.
    """
    text = torch.randn(NUM_CLASSES, T, E, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(SIDE // PATCH)
    return model(
        hidden_states=x_BSC,
        encoder_hidden_states=text[labels_B],
        pooled_projections=F.one_hot(labels_B, NUM_CLASSES).float(),
        timestep=time_B,
        img_ids=torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, rows).float(),
        txt_ids=torch.zeros(T, 3),
        return_dict=False,
    )[0]


def flow_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean squared error of the velocity at x = (1 - time) * image + time * noise."""
    time_B11 = batch.time_B[:, None, None]
    x_BSC = (1 - time_B11) * batch.images_BSC + time_B11 * batch.noise_BSC
    v_BSC = velocity(model, x_BSC, batch.time_B, batch.labels_B)
    return F.mse_loss(v_BSC, batch.noise_BSC - batch.images_BSC)


@torch.no_grad()
def sample(model: nn.Module, seed: int, num_steps: int = 25) -> Tensor:
    """One image of each class [10, SIDE, SIDE], by Euler steps from noise at time 1 to time 0."""
    labels_B = torch.arange(NUM_CLASSES)
    generator = torch.Generator().manual_seed(seed)
    x_BSC = torch.randn(NUM_CLASSES, (SIDE // PATCH) ** 2, PATCH**2, generator=generator)
    for step in range(num_steps):
        time_B = torch.full((NUM_CLASSES,), 1 - step / num_steps)
        x_BSC = x_BSC - velocity(model, x_BSC, time_B, labels_B) / num_steps
    return unpack(x_BSC)


@dataclass
class Run:
    """One copy of the model in training.

    Args:
        name: what the tables call it.
        model: what the optimizer holds.
        door: gives the module to call in place of `model`; None for `model` itself.
        backwards: feed every batch last sample first.
        first_gradients: of the first step, which all runs take from the same weights.
    """

    name: str
    model: nn.Module
    door: Callable[[nn.Module], nn.Module] | None
    scale: Scale
    backwards: bool = False
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_gradients: dict[str, Tensor | None] = field(default_factory=dict)

    def open(self) -> None:
        """Open the door."""
        start = time.perf_counter()
        self.forward = self.door(self.model) if self.door else self.model
        self.opening_seconds = time.perf_counter() - start
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LEARNING_RATE, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, LEARNING_RATE, self.scale.num_steps + 1, cycle_momentum=False
        )

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        start = time.perf_counter()
        loss = self.gradients(batch)
        if not self.losses:
            self.first_gradients = self.copied_gradients()
        self.optimizer.step()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.losses.append(loss.item())

    def gradients(self, batch: Batch) -> Tensor:
        """Forward and backward; the loss."""
        self.optimizer.zero_grad()
        loss = flow_loss(self.forward, batch.reversed() if self.backwards else batch)
        loss.backward()
        return loss.detach()

    def copied_gradients(self) -> dict[str, Tensor | None]:
        """Gradients of all parameters by name."""
        return {
            f"gradient of {name}": None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in self.model.named_parameters()
        }

    def memory(self, batch: Batch) -> memory.Memory:
        """Of one forward and backward: activations, gradients and temporaries."""
        subject = Subject(self.name, lambda: self.gradients(batch), self.model)
        return memory.measure(subject, torch.device("cpu"))

    @property
    def setup_seconds(self) -> float:
        """From opening the door to the end of the first step."""
        return self.opening_seconds + self.seconds[0]
