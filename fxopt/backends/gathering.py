"""FSDP2 gathers codes: weights that only quantized products read travel at one byte an element.

Who reads which weight is known when the model has run once under FSDP2. Until then, and where
somebody else reads it, a weight is gathered as ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

from fxopt.backends import state
from fxopt.backends.sharded_codes import Fp8Param, Magnitudes, Shard, is_backward
from fxopt.backends.weight_reads import Read
from fxopt.kernels.gathered import is_shared
from fxopt.recipe_errors import CannotGather
from fxopt.recipes import Operand, Recipe
from fxopt.report import Applied, Declined, Report

RULE = "fp8_all_gather"
NOT_SETTLED = "gathered whole until a forward and backward have run under FSDP2 on several ranks"
NONE_QUANTIZED = "no product is quantized, fxopt.report(model) says why"
OF_ANOTHER_RANK = "another rank reads it otherwise"


class Reader(Protocol):
    """A door that knows which weights its quantized products read."""

    settings: state.Settings

    def weights_read(self) -> dict[str, Read]: ...


class Gathering:
    """The FP8 all-gather of one door on a model, and a door itself, behind that one.

    When the model has run under FSDP2 it is known who reads which weight. Before its next forward
    the ranks agree on those whose codes are gathered from then on.
    """

    def __init__(self, model: nn.Module, door: Any) -> None:
        self.door: Reader = door
        self.settings: state.Settings = door.settings
        self.has_run = self.had_grad = self.is_settled = False
        self.magnitudes: list[Magnitudes] = []
        self.reasons: dict[str, str] = {}
        self.handle = model.register_forward_pre_hook(self)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if is_backward() or torch.compiler.is_compiling():
            return
        for magnitudes in self.magnitudes:
            magnitudes.expire()
        if self.is_settled or not dist.is_initialized():
            return
        records = {fqn: r for fqn, r in _records(model) if self._block(fqn) is not None}
        if not records:
            return
        self.had_grad |= torch.is_grad_enabled()
        if not self.has_run:
            self.has_run = True
            self.handle.remove()  # to come before FSDP2's own, which gathers
            self.handle = model.register_forward_pre_hook(self, prepend=True)
        elif not any(self._is_in_use(group) for group in {g for g, _ in records.values()}):
            self._settle(records)

    def _is_in_use(self, group: FSDPParamGroup) -> bool:
        """Whether the group is gathered, or will be for a backward to come."""
        return not group.is_sharded or (self.had_grad and bool(group._post_forward_indices))

    def _settle(self, records: dict[str, tuple[FSDPParamGroup, FSDPParam]]) -> None:
        self.is_settled = True
        found: dict[str, Recipe] = {}
        for fqn, read in self.door.weights_read().items():
            why_not = read if isinstance(read, str) else _why_not(records.get(fqn), read)
            if why_not is not None:
                self.reasons[fqn] = why_not
            elif isinstance(read, Recipe):
                found[fqn] = read
        by_group: dict[str, list[str]] = {}
        for fqn, (_, param) in records.items():
            by_group.setdefault(param.shard_mesh.get_group().group_name, []).append(fqn)
        with torch.inference_mode(False), torch.no_grad():
            for fqns in by_group.values():
                first = records[fqns[0]][1]
                group = first.shard_mesh.get_group()
                agreed = _agreed(group, [fqn in found for fqn in fqns], first.device)
                names = [fqn for fqn, of_all in zip(fqns, agreed, strict=True) if of_all]
                shards = [Shard(fqn, *records[fqn], _formats(found[fqn])) for fqn in names]
                if shards:
                    self.magnitudes.append(Magnitudes(group, shards))
        gathered = {shard.fqn for shard in self._shards()}
        self.reasons |= {fqn: OF_ANOTHER_RANK for fqn in found if fqn not in gathered}
        if not gathered:
            counted = Counter(self.reasons.values()).items()
            reasons = "; ".join(f"{why} ({count} weights)" for why, count in counted)
            raise CannotGather(self.settings.recipe.name, reasons or NONE_QUANTIZED)

    def _shards(self) -> Iterator[Shard]:
        for magnitudes in self.magnitudes:
            yield from magnitudes.shards

    def restore(self, model: nn.Module) -> None:
        self.handle.remove()
        for shard in self._shards():
            shard.remove()

    def report(self) -> Report:
        by_block = Counter(self._block(shard.fqn) or "" for shard in self._shards())
        applied = tuple(
            Applied(RULE, fqn, count, "fsdp2", "exact", "", block_class=self._class(fqn))
            for fqn, count in by_block.items()
        )
        reasons = self.reasons
        if not self.is_settled:
            reasons = dict.fromkeys(self.settings.blocks, NOT_SETTLED)
        declined = tuple(
            Declined(RULE, fqn, "", "", (why,), block_class=self._class(self._block(fqn) or ""))
            for fqn, why in reasons.items()
        )
        return Report("", self.settings.recipe.name, "", applied, declined)

    def _block(self, fqn: str) -> str | None:
        blocks = self.settings.blocks
        return next((b for b in blocks if not b or f"{fqn}.".startswith(f"{b}.")), None)

    def _class(self, block: str) -> str:
        found = self.settings.blocks.get(block)
        return "" if found is None else type(found).__name__


def _formats(recipe: Recipe) -> tuple[Operand, Operand]:
    assert recipe.fprop is not None and recipe.dgrad is not None
    return recipe.fprop.b, recipe.dgrad.b


def _records(model: nn.Module) -> Iterator[tuple[str, tuple[FSDPParamGroup, FSDPParam]]]:
    """FSDP2's records of the matrices in `model`, by FQN, in an order that all ranks share."""
    names = {m: name for name, m in model.named_modules()}
    for module in names:
        if not isinstance(module, FSDPModule):
            continue
        of_module: Any = module._get_fsdp_state()
        groups = getattr(of_module, "_fsdp_param_groups", None)
        for group in [of_module._fsdp_param_group] if groups is None else groups:  # one in 2.11
            for param in group.fsdp_params if group else ():
                owner = param._module_info
                modules = owner.module, *owner.shared_modules
                is_sharded = isinstance(param.mesh_info, FSDPMeshInfo)
                is_sharded = is_sharded and param.shard_mesh.size() > 1
                if is_sharded and len(param._orig_size) == 2 and owner.module in names:
                    for m, name in zip(
                        modules, (owner.param_name, *owner.shared_param_names), strict=True
                    ):
                        yield ".".join(filter(None, (names[m], name))), (group, param)


def _why_not(record: tuple[FSDPParamGroup, FSDPParam] | None, recipe: Recipe) -> str | None:
    """Why a weight that only quantized products read is not gathered as codes, or None."""
    if record is None:
        return "a module around the model shards it, or none"
    group, param = record
    if isinstance(param, Fp8Param):
        return "another door has it gathered as codes already"
    if param._module_info.shared_modules:
        return "several modules share it"
    if param.is_dtensor or param.fsdp_placement.dim != 0:
        return "it is sharded in another way than by rows over the ranks of FSDP2"
    if param.offload_to_cpu:
        return "its shards are offloaded to the CPU"
    if group._use_post_forward_mesh:
        return "reshard_after_forward is a number of ranks"
    if not hasattr(param, "_unsharded_param"):
        return "it was not gathered in the first forward"
    if not is_shared(_formats(recipe)) and not group._reshard_after_forward:
        return "scales per row need reshard_after_forward=True: the backward reads another copy"
    return None


def _agreed(group: dist.ProcessGroup, wanted: Sequence[bool], device: torch.device) -> list[bool]:
    """What all ranks want."""
    mask = torch.tensor(wanted, dtype=torch.int32, device=device)
    dist.all_reduce(mask, dist.ReduceOp.MIN, group)
    return [bool(value) for value in mask.tolist()]
