"""What is measured: a step to call, the model whose gradients it leaves, the inputs it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path, tree_leaves

from fxopt.diagnose.errors import NotAStep
from fxopt.errors import nearest
from fxopt.user_files import load

Make = Callable[[], "Subject"]


@dataclass
class Subject:
    """One side of a comparison.

    Args:
        name: where it comes from.
        step: does forward and backward once; what it returns is compared.
        model: whose parameters' gradients are compared; None if the step has none to show.
        inputs: keyword arguments of `step`; gradients of leaves are compared as well.
    """

    name: str
    step: Callable[..., Any]
    model: nn.Module | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.step(**self.inputs)

    def parameters(self) -> dict[str, Tensor]:
        """Parameters by name; the name that `torch.compile` puts in front is dropped."""
        named = self.model.named_parameters() if self.model is not None else ()
        return {name.replace("_orig_mod.", ""): parameter for name, parameter in named}

    def leaves(self) -> dict[str, Tensor]:
        """Parameters and inputs that get a gradient, by name."""
        found = {f"gradient of {n}": p for n, p in self.parameters().items() if p.requires_grad}
        for path, leaf in tree_flatten_with_path(dict(self.inputs))[0]:
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                found["gradient of input " + ".".join(map(_key, path))] = leaf
        return found

    def state(self) -> list[Tensor]:
        """Every tensor that the step may read: parameters, buffers, inputs."""
        owned = [] if self.model is None else [*self.model.parameters(), *self.model.buffers()]
        return owned + [leaf for leaf in tree_leaves(self.inputs) if isinstance(leaf, Tensor)]


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "idx", entry)))


@contextmanager
def kept_state(*subjects: Subject) -> Iterator[None]:
    """Gives the tensors of all subjects their values back at the end."""
    kept = [(t, t.detach().clone()) for subject in subjects for t in subject.state()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.detach().copy_(value)


def refresh(subject: Subject, seed: int) -> None:
    """Give parameters and inputs other values, the same for the same seed.

    Trained tensors get noise of a tenth of their own spread; what takes no gradient (tables, masks,
    images) is scaled as a whole, because its pattern may mean something.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in subject.state():
            if not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            if tensor.requires_grad:
                spread = 0.1 * tensor.float().square().mean().sqrt().clamp_min(1e-3)
                noise = torch.randn(tensor.shape, generator=generator).to(tensor.device)
                tensor.detach().add_((spread * noise).to(tensor.dtype))
            else:
                tensor.mul_(0.5 + float(torch.rand((), generator=generator)))


def take_values(subject: Subject, other: Subject) -> None:
    """Give `subject` the values of `other`, which has the same tensors in other dtypes."""
    with torch.no_grad():
        for tensor, value in zip(subject.state(), other.state(), strict=True):
            tensor.detach().copy_(value)


def function_at(spec: str) -> Callable[..., Any]:
    """The function of "FILE.py:FUNCTION".

    Raises:
        NotAStep: if there is no such file or function, or the file cannot be run.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise NotAStep(spec, f"there is no file {path!r}")
    try:
        module = load(path)
    # Running a file of the user's may raise anything.
    except Exception as error:
        raise NotAStep(spec, f"running {path} raised {type(error).__name__}: {error}") from error
    if module is None:
        raise NotAStep(spec, f"{path!r} is not a Python file")
    function = getattr(module, name, None)
    if not callable(function):
        close = nearest(name, [n for n, value in vars(module).items() if callable(value)])
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise NotAStep(spec, f"{path} has no function {name!r}{hint}")
    return function


def from_function(spec: str, arguments: Mapping[str, Any], seed: int) -> Make:
    """Builds the subject that FUNCTION of "FILE.py:FUNCTION" describes.

    FUNCTION returns `step`, `(step, model)` or `(step, model, inputs)`. It is called with those
    swept `arguments`, and anew, from the same seed, for each subject.

    Raises:
        NotAStep: here, if FUNCTION does not take an argument; when built, if it returns none of
            the three.
    """
    function = function_at(spec)
    taken = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in taken.values())
    for name in arguments:
        if name not in taken and not takes_any:
            raise NotAStep(spec, f"it takes no argument {name!r}, which --{name} would set")

    def make() -> Subject:
        torch.manual_seed(seed)
        return as_subject(spec, function(**arguments))

    return make


def as_subject(spec: str, result: Any) -> Subject:
    """The subject that a function has returned."""
    step, model, inputs = (
        (*result, None, None)[:3] if isinstance(result, tuple) else (result, None, None)
    )
    problems = {
        f"it returned {type(result).__name__}, of which nothing can be called": callable(step),
        f"its model is a {type(model).__name__}, not a torch.nn.Module": (
            model is None or isinstance(model, nn.Module)
        ),
        f"its inputs are a {type(inputs).__name__}, not a dict": (
            inputs is None or isinstance(inputs, Mapping)
        ),
    }
    for problem, fine in problems.items():
        if not fine:
            raise NotAStep(spec, problem)
    return Subject(spec, step, model, inputs or {})
