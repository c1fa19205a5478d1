"""The same step in double precision, as the truth that errors are measured from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fxopt.diagnose.subjects import Make, Subject


class Float64Islands(TorchFunctionMode):
    """Turns casts of activations to fp32 into casts to float64.

    Norms, RoPE and gates that a model writes in fp32 would round in the "truth" exactly as they
    round in eager, which makes eager look better than an equally accurate rewrite. Tensors that
    carry no gradient (position ids, timesteps) keep their fp32: they are the model's definition.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            func = Tensor.double if func is Tensor.float else func
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def in_float64(make: Make) -> Subject:
    """A new subject with model and inputs in double precision."""
    subject = make()
    if subject.model is not None:
        subject.model.double()

    def raised(tensor: Tensor) -> Tensor:
        dtype = torch.complex128 if tensor.is_complex() else torch.float64
        if not (tensor.is_complex() or tensor.is_floating_point()):
            return tensor
        return tensor.detach().to(dtype).requires_grad_(tensor.requires_grad)

    def step(**inputs: Any) -> Any:
        with Float64Islands():
            return subject.step(**inputs)

    inputs = tree_map_only(Tensor, raised, dict(subject.inputs))
    return Subject(subject.name, step, subject.model, inputs)
