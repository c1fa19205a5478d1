"""What a Triton kernel moves: the bytes of its loads and stores, counted in the interpreter.

The tensors of a launch say what it has to move: each byte that is stored in an input or output
once. Masked elements move nothing. Every load and store counts, with one exception: an operand of
at most a quarter of the largest one's bytes (a weight, a row per sample, rotary tables, statistics,
partial results) is read by many programs at about the same time and stays in the caches, so each of
its bytes counts once however often it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, interpreter_builder

from bench.launches import recorded

SHARED = 0.25


@dataclass(frozen=True)
class Operand:
    """Bytes of one allocation in one launch.

    Args:
        required: that the launch's tensors hold.
        accessed: of all loads and stores.
        distinct: of those, counting no address twice.
    """

    required: int
    accessed: int
    distinct: int


@dataclass(frozen=True)
class Launch:
    kernel: str
    operands: list[Operand]

    @property
    def streamed(self) -> list[Operand]:
        """The operands that are too large to be shared."""
        shared = SHARED * max(o.required for o in self.operands)
        return [o for o in self.operands if o.required > shared]

    @property
    def moved(self) -> int:
        """Bytes that memory sees."""
        streamed = self.streamed
        return sum(o.accessed if o in streamed else o.distinct for o in self.operands)

    @property
    def required(self) -> int:
        """Bytes of the operands that the kernel touches at all."""
        return sum(o.required for o in self.operands if o.accessed)

    @property
    def worst(self) -> float:
        """Bytes moved over bytes required, of the launch or of one streamed operand: what one does
        without does not make up for what another costs."""
        ratios = [o.accessed / o.required for o in self.streamed]
        return max(self.moved / self.required, *ratios)


def launches(run: Callable[[], Any]) -> list[Launch]:
    """All launches of `run()`, in order."""
    interpret = InterpretedFunction.run
    found: list[Launch] = []

    def count(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        accesses: list[tuple[np.ndarray, int]] = []
        tensors = list(flat([*args, *options.values()]))
        with counting(accesses):
            interpret(kernel, *args, grid=grid, warmup=warmup, **options)
        found.append(Launch(kernel.__name__, operands(tensors, accesses)))

    with recorded(count, InterpretedFunction):
        run()
    return found


def counting(accesses: list[tuple[np.ndarray, int]]) -> Any:
    """Have the interpreter append the addresses and the element size of every access."""
    load, store = interpreter_builder.create_masked_load, interpreter_builder.create_masked_store

    def note(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        # A condition that is a scalar leaves a mask of integers.
        accesses.append((pointers.data[mask.data.astype(bool)], size))

    def noted_load(pointers: Any, mask: Any, *args: Any) -> Any:
        note(pointers, mask)
        return load(pointers, mask, *args)

    def noted_store(pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        note(pointers, mask)
        return store(pointers, value, mask, *args)

    # Half of the time went into checks of integers, which tests of values make for all kernels.
    options = replace(interpreter_builder.options, sanitize_overflow=False)
    return mock.patch.multiple(
        interpreter_builder,
        create_masked_load=noted_load,
        create_masked_store=noted_store,
        options=options,
    )


def flat(arguments: Any) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from flat(argument)


def operands(tensors: list[Tensor], accesses: list[tuple[np.ndarray, int]]) -> list[Operand]:
    """What was accessed of each allocation; views of one count as one."""
    held: dict[int, Tensor] = {}  # by the allocation's address: which of its bytes tensors hold
    for t in tensors:
        storage = t.untyped_storage()
        bytes_held = held.setdefault(
            storage.data_ptr(), torch.zeros(storage.nbytes(), dtype=torch.bool)
        )
        size = t.element_size()
        strides = [size * stride for stride in t.stride()]
        bytes_held.as_strided((*t.shape, size), (*strides, 1), size * t.storage_offset()).fill_(
            True
        )
    by_size = {
        size: np.sort(np.concatenate([a.ravel() for a, of in accesses if of == size]))
        for size in {size for _, size in accesses}
    }
    found = []
    for start, bytes_held in held.items():
        accessed, touched = 0, np.zeros(len(bytes_held), dtype=bool)
        for size, addresses in by_size.items():
            first, end = np.searchsorted(addresses, np.uint64([start, start + len(bytes_held)]))
            accessed += size * int(end - first)
            ours = (addresses[first:end] - np.uint64(start)).astype(np.int64)
            for byte in range(size):
                touched[ours + byte] = True
        found.append(Operand(int(bytes_held.sum()), accessed, int(touched.sum())))
    total = sum(size * len(addresses) for size, addresses in by_size.items())
    assert total == sum(o.accessed for o in found), "an access outside of the launch's tensors"
    return found
