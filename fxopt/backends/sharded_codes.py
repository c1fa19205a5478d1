"""One rank's rows of weights whose codes FSDP2 gathers, and the magnitudes that scale them.

FSDP2's record of such a parameter gets another class, whose all-gather sends codes, one byte an
element, and leaves them with the gathered parameter (`kernels/gathered.py`). The sharded
parameter, all there is outside of a forward and backward, stays the object that it is.

Shapes: N output features, K input features; n rows of a weight that one rank holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from fxopt.kernels import weight_casts
from fxopt.kernels.counters import MAGNITUDE
from fxopt.kernels.gathered import (
    ATTRIBUTE,
    COLUMNS,
    ROWS,
    GatheredWeight,
    is_shared,
    quantize_rows_of,
)
from fxopt.recipes import Operand

STALE = (
    "a weight was written without PyTorch's knowledge after its magnitude was found: write through "
    "an optimizer or in place, outside of a forward and of fxopt.cast_weights_once"
)


def is_backward() -> bool:
    """Whether autograd runs, as FSDP2 asks it."""
    return torch._C._current_graph_task_id() != -1


class Fp8Param(FSDPParam):
    """FSDP2's record of a parameter, with an all-gather of codes in place of the values."""

    shard: Shard

    @property
    def _sharded_local_tensor(self) -> Any:  # where FSDP2 looks for an extension
        return self.shard


class Shard:
    """One rank's rows of a weight, and what is kept to put FSDP2's record back as it was."""

    def __init__(
        self, fqn: str, group: FSDPParamGroup, param: FSDPParam, formats: tuple[Operand, Operand]
    ) -> None:
        self.fqn, self.group, self.formats = fqn, group, formats
        self.param: Any = param  # of another class while installed
        self.dtype = param.param_dtype or param.orig_dtype
        (self.num_rows, self.num_columns), self.chunk = param._orig_size, self._padded()[0]
        self.plain: tuple[type[FSDPParam], list[Tensor], Tensor]

    def _padded(self) -> torch.Size:
        return self.param.padded_sharded_param_size

    def size(self) -> torch.Size:
        """Of the rows here, as FSDP2 asks for it."""
        return self._rows().size()

    def _rows(self) -> Tensor:
        local: Tensor = self.param.sharded_param._local_tensor
        return local

    def num_magnitudes(self) -> tuple[int, int]:
        """Of the copy for fprop and of that for dgrad; none for a second of the same."""
        counts = [
            1 if operand.block == "tensor" else size
            for operand, size in zip(self.formats, (self.num_rows, self.num_columns), strict=True)
        ]
        return counts[ROWS], 0 if is_shared(self.formats) else counts[COLUMNS]

    def magnitudes(self) -> Tensor:
        """Those of the rows here, in the dtype that is gathered: the bits, int32."""
        x_nK, found = self._rows(), []
        for copy, count in enumerate(self.num_magnitudes()):
            amax = x_nK.new_zeros(count)
            if x_nK.numel() and count:
                by_row, by_tensor = copy == ROWS, self.formats[copy].block == "tensor"
                of_rows = torch.linalg.vector_norm(
                    x_nK, torch.inf, dim=None if by_tensor else int(by_row)
                )
                start = self.chunk * self.param.shard_mesh.get_local_rank()
                first = start if by_row and not by_tensor else 0
                amax.narrow(0, first, of_rows.numel()).copy_(of_rows)
            found.append(amax)
        # To round the largest of them is to find the largest of the rounded.
        return torch.cat(found).to(self.dtype).float().view(torch.int32) & MAGNITUDE

    def install(self, own: Tensor, bits: Tensor, of_all: Magnitudes) -> None:
        """Have FSDP2 gather codes from now on; the weight is sharded at this time.

        Args:
            own, bits: where `of_all` keeps the magnitudes of the rows here, and of the weight.
        """
        self.own, self.of_all, param = own, of_all, self.param
        rows, columns = bits.view(torch.float32).split(self.num_magnitudes())
        amax = rows.view(-1, 1), (columns if columns.numel() else rows).view(1, -1)
        unsharded = param._unsharded_param
        self.plain = type(param), param.all_gather_outputs, unsharded.data
        nothing = torch.full((), torch.nan, dtype=self.dtype, device=param.device)
        unsharded.data = nothing.expand(self.num_rows, self.num_columns)
        self.weight = GatheredWeight(self.fqn, self.formats, amax)
        setattr(unsharded, ATTRIBUTE, self.weight)
        param.__class__, param.all_gather_outputs, param.shard = Fp8Param, [], self
        param._init_extensions()

    def remove(self) -> None:
        """Have FSDP2 gather the weight itself again."""
        self.group.reshard()
        param = self.param
        delattr(param._unsharded_param, ATTRIBUTE)
        param.__class__, param.all_gather_outputs, param._unsharded_param.data = self.plain
        del param.shard, param._extensions_data

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor], int]:
        """FSDP2's question what to gather: these codes, and which copy they are of."""
        self.of_all.prepare(self)
        is_current = (self.magnitudes() == self.own).all()
        torch._assert_async(is_current, STALE)
        copy = COLUMNS if is_backward() and not is_shared(self.formats) else ROWS
        amax = self._of_rows_here(self.weight.amax[copy])
        codes = quantize_rows_of(self._rows().to(self.dtype), self.formats[copy], amax)
        if codes.shape != self._padded():
            padded = codes.new_zeros(self._padded())
            padded.narrow(0, 0, codes.shape[0]).copy_(codes)
            codes = padded
        return (codes,), copy

    def _of_rows_here(self, amax: Tensor) -> Tensor:
        if amax.shape[0] == 1:
            return amax
        start = self.chunk * self.param.shard_mesh.get_local_rank()
        return amax.narrow(0, min(start, self.num_rows), self.size()[0])

    def fsdp_post_all_gather(
        self, outputs: Sequence[Tensor], copy: int, dtype: torch.dtype, *, out: Any = None
    ) -> None:
        """FSDP2's answer: the codes of all ranks, for the parameter `out`."""
        assert out is not None, "its parameter was gathered before, as the weight itself"
        self.weight.codes, self.weight.held = outputs[0][: self.num_rows], copy


class Magnitudes:
    """Largest magnitudes of the weights that one process group shards.

    They are found for all when the first weight is gathered in a forward of the model, or again
    in a forward of its own, by one collective; a backward takes those of its forward. Within
    `cast_weights_once`, they are found once, and after each step of an optimizer. `_version` would
    not do: fused and foreach optimizers do not count what they write to DTensors.
    """

    def __init__(self, group: dist.ProcessGroup, shards: Sequence[Shard]) -> None:
        self.group, self.shards = group, shards
        sizes = [sum(shard.num_magnitudes()) for shard in shards]
        self.own = torch.zeros(sum(sizes), dtype=torch.int32, device=shards[0].param.device)
        self.bits = self.own.clone()
        parts = zip(shards, self.own.split(sizes), self.bits.split(sizes), strict=True)
        for shard, own, bits in parts:
            shard.install(own, bits, self)
        self.epoch: object | None = None
        self.is_known = False
        self.expire()

    def expire(self) -> None:
        """A forward of the model begins: weights may have been written since the last."""
        self.read = set(self.shards)

    def prepare(self, shard: Shard) -> None:
        """See that the magnitudes are those of the weights as they are."""
        if is_backward() and self.is_known:
            return
        epoch = weight_casts.epoch()
        if epoch is not self.epoch or (epoch is None and shard in self.read):
            self._find()
            self.epoch, self.is_known = epoch, True
            self.read.clear()
        self.read.add(shard)

    def _find(self) -> None:
        torch.cat([shard.magnitudes() for shard in self.shards], out=self.own)
        self.bits.copy_(self.own)
        # As integers the bits are ordered as the magnitudes, and a NaN is the largest.
        dist.all_reduce(self.bits, dist.ReduceOp.MAX, self.group)
        amax = self.bits.view(torch.float32)
        amax.masked_fill_(~amax.isfinite(), torch.nan)
