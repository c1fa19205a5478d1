"""What telemetry has found: one record for each operand of a GEMM and bucket of timesteps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

COLUMNS = (
    *("linears", "GEMM", "operand", "timesteps", "samples", "amax", "scale"),
    *("underflow", "saturated", "flag"),
)


@dataclass(frozen=True)
class OperandRecord:
    """One operand of one GEMM, over all samples of a bucket.

    linears: fully qualified names; several where they share an input, which is quantized once.
    gemm: "fprop", "dgrad" or "wgrad". operand: "x", "weight" or "gradient".
    timesteps: the bucket, "all" without buckets, "mixed" where a batch had several.
    samples: quantizations that were counted; the second forward of a checkpoint is one more.
    nonzero: values other than zero in them.
    amax: largest magnitude, None if a value was not finite.
    least_scale, largest_scale: of blocks that hold more than zeros, None if one was not finite or
        there was none.
    underflow: share of the nonzero values that became zero.
    saturated: share of the nonzero values beyond the largest of the format, which they became.
    nonfinite: values that were NaN or Inf.
    """

    linears: tuple[str, ...]
    gemm: str
    operand: str
    timesteps: str
    samples: int
    nonzero: int
    amax: float | None
    least_scale: float | None
    largest_scale: float | None
    underflow: float
    saturated: float
    nonfinite: int

    @property
    def flag(self) -> str:
        """What must not go unseen: values that are not finite, values that saturated."""
        flags = ["NON-FINITE"] if self.nonfinite else []
        return ", ".join(flags + (["saturated"] if self.saturated else []))


@dataclass(frozen=True)
class TelemetryReport:
    """All records, and how they were taken.

    every: one batch in so many was sampled. sampled: how many were.
    unnamed: nodes of linears that were not recorded, as their weights are no parameters of the
        model: another model's, or computed from something frozen.
    demoted: (linear, GEMM) that run in the model's own dtype now.
    """

    every: int
    sampled: int
    unnamed: int
    operands: tuple[OperandRecord, ...]
    demoted: tuple[tuple[str, str], ...] = ()

    def worst(self) -> list[OperandRecord]:
        """The records, first those that are not finite, then by the share of values lost."""
        return sorted(
            self.operands, key=lambda r: (not r.nonfinite, -(r.underflow + r.saturated), r.linears)
        )

    def to_json(self, indent: int | None = 2) -> str:
        """The report as one JSON object; amax and scales that are not finite are null."""
        data = asdict(self)
        for operand, record in zip(data["operands"], self.operands, strict=True):
            operand["flag"] = record.flag
        return json.dumps(data, indent=indent, allow_nan=False)

    def text(self, limit: int = 20) -> str:
        """A table of the `limit` worst records."""
        if not self.operands:
            return f"No quantized operand was recorded in {self.sampled} sampled batches."
        rows = [COLUMNS, *(_row(record) for record in self.worst()[:limit])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += _remarks(self, max(len(self.operands) - limit, 0))
        return "\n".join(lines)

    def __str__(self) -> str:
        return self.text()


def _remarks(report: TelemetryReport, num_left_out: int) -> Iterator[str]:
    yield f"{report.sampled} batches sampled, one in {report.every}"
    if num_left_out:
        yield f"{num_left_out} records that lost less are not shown"
    for linear, gemm in report.demoted:
        yield f"demoted to the model's dtype: {gemm} of {linear}"
    if report.unnamed:
        yield (
            f"{report.unnamed} calls of quantized linears were not recorded: their weights are no "
            "parameters of the model"
        )


def _row(record: OperandRecord) -> tuple[str, ...]:
    scales = [_number(s) for s in (record.least_scale, record.largest_scale)]
    return (
        short(record.linears),
        record.gemm,
        record.operand,
        record.timesteps,
        str(record.samples),
        _number(record.amax),
        " to ".join(dict.fromkeys(scales)),
        f"{record.underflow:.3%}",
        f"{record.saturated:.3%}",
        record.flag,
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def short(names: Sequence[str]) -> str:
    """Names with what they begin with written once: "attn.{to_q,to_k}"."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    common = 0
    while len({tuple(p[: common + 1]) for p in parts}) == 1:
        common += 1
    rest = ",".join(".".join(p[common:]) for p in parts)
    return ".".join([*parts[0][:common], f"{{{rest}}}"])
