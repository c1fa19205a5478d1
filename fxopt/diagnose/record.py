"""The claim record: what was measured, on what, with which result, in one file that can be checked.

The dataclasses here are the schema; `claim.schema.json` is its export. Pydantic validates a record
when it is written and when it is read, and a digest over its canonical JSON shows later changes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fxopt.diagnose.errors import CannotWrite, InvalidRecord
from fxopt.diagnose.memory import Memory
from fxopt.diagnose.numerics import Check
from fxopt.diagnose.protocol import Samples
from fxopt.diagnose.verdict import Verdict
from fxopt.errors import MissingPackage

VERSION: Literal["fxopt.claim/1"] = "fxopt.claim/1"


@dataclass(frozen=True)
class Stop:
    """Why a claim is not complete.

    Args:
        phase: what was going on.
        error: type and message; "KeyboardInterrupt" after Ctrl-C.
        where: "file.py:line" that raised.
    """

    phase: str
    error: str
    where: str


@dataclass(frozen=True)
class Speed:
    """What bounds the time of a case.

    Args:
        flops: of one call of "baseline" and "candidate", by dtype of the operands; encoders
            excluded. Of compiled code, those of the code that it came from.
        frozen_flops: of frozen modules of the baseline, encoders for one.
        peak_flops: FLOP/s by dtype that the device reached in a calibration.
        bandwidth: bytes/s that it reached.
        floor_s: least seconds that are plausible, of "baseline" and "candidate"; what is faster is
            INVALID.
        utilization: MFU by dtype, of "baseline" and "candidate".
    """

    flops: Mapping[str, Mapping[str, int]]
    frozen_flops: Mapping[str, int]
    peak_flops: Mapping[str, float]
    bandwidth: float
    floor_s: Mapping[str, float]
    utilization: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Claim:
    """One baseline against one candidate at one shape.

    Args:
        name: of the case.
        baseline, candidate: where each comes from.
        configuration: all that was chosen: seed, shape, door, recipe, margin, tolerance.
        status: "complete", "interrupted" (Ctrl-C) or "failed"; only a complete one has a verdict
            that counts.
        stop: where it ended; None if complete.
        verdict: None if no round was measured.
        samples: raw.
        checks: of numerics.
        memory: of "baseline" and "candidate", as far as measured.
        speed: None if it was not counted.
        manifest: fxopt's report on the candidate's model; None without one.
    """

    name: str
    baseline: str
    candidate: str
    configuration: Mapping[str, Any]
    status: Literal["complete", "interrupted", "failed"]
    stop: Stop | None
    verdict: Verdict | None
    samples: Samples
    checks: tuple[Check, ...] = ()
    memory: Mapping[str, Memory] = field(default_factory=dict)
    speed: Speed | None = None
    manifest: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Record:
    """Claims that were measured by one command.

    Args:
        version: of this schema.
        created: ISO 8601 with time zone.
        command: as typed.
        environment: from `environment.describe`.
        claims: one per case.
        digest: SHA-256 over the canonical JSON of all else; "" until written.
    """

    version: Literal["fxopt.claim/1"]
    created: str
    command: tuple[str, ...]
    environment: Mapping[str, Any]
    claims: tuple[Claim, ...]
    digest: str = ""


def _adapter() -> Any:
    try:
        from pydantic import TypeAdapter
    except ModuleNotFoundError as error:
        raise MissingPackage("pydantic", "a claim record", "evidence") from error
    return TypeAdapter(Record)


def schema() -> dict[str, Any]:
    """The JSON schema of a record."""
    return _adapter().json_schema()


def digest(data: Mapping[str, Any]) -> str:
    """SHA-256 over the canonical JSON of a record without its digest."""
    rest = {key: value for key, value in data.items() if key != "digest"}
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_text(record: Record) -> str:
    """The record as JSON with its digest, once it validates against the schema.

    Raises:
        InvalidRecord: naming the field.
    """
    data = json.loads(json.dumps(dataclasses.asdict(record), allow_nan=False))
    data["digest"] = digest(data)
    _validated(data, "the record to write")
    return json.dumps(data, indent=1) + "\n"


def write(record: Record, path: Path) -> None:
    """Put the record at `path`, whole or not at all.

    Raises:
        InvalidRecord: as `to_text`.
        CannotWrite: as `write_bytes`.
    """
    write_text(to_text(record), path)


def write_text(text: str, path: Path) -> None:
    """Put `text` at `path`; see `write_bytes`."""
    write_bytes(text.encode(), path)


def write_bytes(data: bytes, path: Path) -> None:
    """Put `data` at `path`, whole or not at all.

    Raises:
        CannotWrite: on a full disk, a missing folder or missing rights; what was there stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CannotWrite(str(path), error.strerror or str(error)) from error


def read(path: Path) -> Record:
    """The record at `path`.

    Raises:
        InvalidRecord: if it cannot be read, does not fit the schema or does not fit its digest.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRecord(str(path), error.strerror or str(error)) from error
    except ValueError as error:
        raise InvalidRecord(str(path), f"it is not JSON: {error}") from error
    record = _validated(data, str(path))
    if data["digest"] != digest(data):
        raise InvalidRecord(str(path), "its digest does not fit: it was changed after it was made")
    return record


def _validated(data: Any, origin: str) -> Record:
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        field_name = ".".join(map(str, first["loc"])) or "record"
        raise InvalidRecord(origin, f"{field_name}: {first['msg']}") from error
