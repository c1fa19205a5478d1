"""Triton's interpreter without what it does again and again: half of the time of kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter


@contextmanager
def quicker() -> Iterator[None]:
    """For as long as it lasts."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        _patch_language_once_a_launch(monkeypatch)
        _remember_types(monkeypatch)
        yield


def _patch_language_once_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every call of a function in a kernel."""
    patch, launch, patched = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def patch_once(fn: Any) -> Any:
        # By the file of the function: the language is what its globals hold of it.
        if id(fn.__globals__) in patched:
            return None
        patched.add(id(fn.__globals__))
        return patch(fn)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)


def _remember_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows from a type is found out once, and not for each value of it."""
    of_numpy, make_block, make_tensor = (
        interpreter._get_np_dtype,
        core.block_type.__init__,
        core.tensor.__init__,
    )
    dtypes: dict[str, Any] = {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}

    def dtype(type: Any) -> Any:
        found = dtypes.get(type.name)
        if found is None:
            found = dtypes[type.name] = of_numpy(type)
        return found

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(s.value if isinstance(s, tl.constexpr) else s for s in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = {name: vars(self)[name] for name in ("shape", "numel", "name")}
        self.__dict__.update(blocks[key], element_ty=element_ty)

    def tensor(self: Any, handle: Any, type: Any) -> None:
        found = shapes.get(type.name)
        if found is None:
            make_tensor(self, handle, type)
            shapes[type.name] = self.numel, self.shape
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = found

    monkeypatch.setattr(interpreter, "_get_np_dtype", dtype)
    monkeypatch.setattr(core.block_type, "__init__", block)
    monkeypatch.setattr(core.tensor, "__init__", tensor)
