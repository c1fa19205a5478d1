"""What fired, what declined and why; one schema as objects, JSON, text and a page."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxopt.cost import BlockCost

TOTALS = (
    "glue_bytes_before",
    "glue_bytes_after",
    "saved_activation_bytes_before",
    "saved_activation_bytes_after",
)


@dataclass(frozen=True)
class Applied:
    """One rule's substitutions in one block.

    Args:
        rule: name of the rule.
        fqn: fully qualified name of the block.
        count: number of substitutions in it.
        provider: who runs the op on the target: "triton", "native", a PyTorch "library" kernel, or
            "emulation" of products that it has no units for.
        tier: numerics tier: "exact", "rounding" or "low_precision".
        source: "file.py:line" of the replaced code.
        bytes_saved: glue bytes that the block reads and writes less since this substitution,
            forward + backward, as in `totals`; what a later rule takes in counts there. The sum is
            the difference of the totals but for what is no rule's: canonicalization, and residuals
            read from a norm's node. None where nothing was counted: `explain` counts, at the sizes
            that it is given. The doors do not, as it takes a run of the block on fake tensors after
            each substitution; `swap` has no graph to run, and before its first forward `optimize`
            has no sizes.
        flops: of the matrix products and attentions in the replaced code, forward alone. A product
            counts in each rule that takes it in, so these do not add up. None as above, and in the
            body of a higher-order op.
        block_class: class name of the block.
    """

    rule: str
    fqn: str
    count: int
    provider: str
    tier: str
    source: str
    bytes_saved: int | None = None
    flops: int | None = None
    block_class: str = ""


@dataclass(frozen=True)
class Declined:
    """One near miss of a rule, with every reason against it.

    Args:
        rule: name of the rule.
        fqn: fully qualified name of the block.
        node: name of the anchor in the block's graph.
        source: "file.py:line" of the anchor.
        reasons: all that speaks against the substitution.
        remedy: what the user can change; "" if nothing.
        block_class: class name of the block.
    """

    rule: str
    fqn: str
    node: str
    source: str
    reasons: tuple[str, ...]
    remedy: str = ""
    block_class: str = ""


@dataclass(frozen=True)
class Attention:
    """Who runs attentions of one block.

    Args:
        backend: name of a backend, or "pytorch": the one that PyTorch takes.
        why: a recipe or the model says so, it was measured, or nothing was.
        fqn: fully qualified name of the block.
        block_class: class name of the block.
    """

    backend: str
    why: str
    fqn: str
    block_class: str = ""


@dataclass(frozen=True)
class Report:
    """The outcome of one door on one model.

    Args:
        door: "optimize", "compile", "swap" or "explain"; joined with "+" after several.
        recipe: name of the recipe.
        target: "cpu", "cuda:sm_90", or the name of a planned target.
        applied: substitutions made.
        declined: near misses.
        totals: bytes before and after, keys in `TOTALS`; empty where nothing was counted.
        blocks: costs per block class; only `explain` fills it.
        attentions: of rewritten blocks, who runs them.
        saved: what fused ops keep for their backward, as in `Recipe.saved`.
    """

    door: str
    recipe: str
    target: str
    applied: tuple[Applied, ...] = ()
    declined: tuple[Declined, ...] = ()
    totals: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[BlockCost, ...] = ()
    attentions: tuple[Attention, ...] = ()
    saved: str = "model"

    def count(self, rule: str) -> int:
        """Number of substitutions that `rule` made in the whole model."""
        return sum(a.count for a in self.applied if a.rule == rule)

    def counts(self) -> dict[str, int]:
        """Number of substitutions by rule, in the order in which the rules first fired."""
        return {rule: self.count(rule) for rule in dict.fromkeys(a.rule for a in self.applied)}

    def block_classes(self) -> list[str]:
        """Class names of the blocks that the report mentions, in order."""
        names = [block.block_class for block in self.blocks]
        names += [applied.block_class for applied in self.applied]
        names += [declined.block_class for declined in self.declined]
        names += [attention.block_class for attention in self.attentions]
        return list(dict.fromkeys(names))

    def merge(self, *others: Report) -> Report:
        """This report with the entries of `others` added and the totals summed."""
        reports = (self, *others)
        totals: Counter[str] = Counter()
        for report in reports:
            totals.update(report.totals)
        return Report(
            door=_joined(r.door for r in reports),
            recipe=_joined(r.recipe for r in reports),
            target=_joined(r.target for r in reports),
            applied=tuple(a for r in reports for a in r.applied),
            declined=tuple(d for r in reports for d in r.declined),
            totals=dict(totals),
            blocks=tuple(b for r in reports for b in r.blocks),
            attentions=tuple(a for r in reports for a in r.attentions),
            saved=next((r.saved for r in reports if r.saved != "model"), "model"),
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data; every key of `TOTALS` is there."""
        return dataclasses.asdict(self) | {"totals": dict.fromkeys(TOTALS, 0) | dict(self.totals)}

    def to_json(self, indent: int | None = 2) -> str:
        """The report as one JSON object."""
        return json.dumps(self.to_dict(), indent=indent)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Report:
        """The report that `to_dict` (or its JSON) came from."""
        return Report(
            **{k: data[k] for k in ("door", "recipe", "target")},
            applied=tuple(Applied(**a) for a in data["applied"]),
            declined=tuple(
                Declined(**d | {"reasons": tuple(d["reasons"])}) for d in data["declined"]
            ),
            totals=dict(data["totals"]),
            blocks=tuple(BlockCost.from_dict(b) for b in data.get("blocks", ())),
            attentions=tuple(Attention(**a) for a in data.get("attentions", ())),
            saved=data.get("saved", "model"),
        )

    def text(self) -> str:
        """The report as plain text, aggregated by block class."""
        from fxopt.render import text

        return text(self)

    def html(self) -> str:
        """The report as one self-contained page that reads on a phone."""
        from fxopt.render import html

        return html(self)

    def __str__(self) -> str:
        return self.text()


def _joined(names: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(name for name in names if name))
