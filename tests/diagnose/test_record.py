"""The claim record: one schema, checked on both ways, whole or not at all."""

import dataclasses
import errno
import json
from pathlib import Path

import pytest

import fxopt.diagnose
from fxopt.diagnose import record
from fxopt.diagnose.compare import compare
from fxopt.diagnose.errors import CannotWrite, InvalidRecord, RecordsDiffer
from fxopt.diagnose.memory import Memory
from fxopt.diagnose.numerics import Check, Difference
from fxopt.diagnose.protocol import Samples, WarmUp
from fxopt.diagnose.record import Claim, Record
from fxopt.diagnose.verdict import Label, judge


def claim(ratio: float = 1.2, **changes) -> Claim:
    samples = Samples(WarmUp("evidence", 9, 1.5, 0))
    for index in range(20):
        wobble = 1 + 1e-3 * (index % 3 - 1)
        samples.rounds.append((ratio, wobble, 1.0, ratio))
        samples.reference.append((0.01, 0.01))
        samples.readings.append({"clock_mhz": 1980.0})
    difference = Difference("output 0", 1e-6, 1e-4, 1.0, 0.0)
    check = Check("before", "float64", 1, 4, (), (difference,))
    made = Claim(
        "step", "a.py:f", "a.py:g", {"seed": 0, "batch": 2}, "complete", None, judge(samples),
        samples, (check,), {"baseline": Memory(10, None, 5), "candidate": Memory(8, None, 4)},
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def made(*claims: Claim, **environment) -> Record:
    place = {"device": "H100", "torch": "2.13.0", "commit": "abc+"} | environment
    command = ("fxopt", "bench", "a.py:f")
    return Record(record.VERSION, "2026-01-01T00:00:00+00:00", command, place, claims or (claim(),))


def test_the_schema_in_the_repository_is_that_of_the_code():
    path = Path(fxopt.diagnose.__file__).with_name("claim.schema.json")
    assert json.loads(path.read_text()) == record.schema()


def test_what_is_written_is_what_is_read(tmp_path):
    path = tmp_path / "claim.json"
    record.write(made(), path)
    found = record.read(path)
    assert dataclasses.replace(found, digest="") == made()
    assert found.digest == record.digest(json.loads(path.read_text()))
    assert found.claims[0].verdict.label is Label.FAST
    assert [p.name for p in tmp_path.iterdir()] == ["claim.json"]


def test_a_changed_number_does_not_fit_the_digest(tmp_path):
    path = tmp_path / "claim.json"
    record.write(made(), path)
    path.write_text(path.read_text().replace('"speedup": 1.2', '"speedup": 1.3'))
    with pytest.raises(InvalidRecord, match="digest does not fit"):
        record.read(path)


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda data: data.pop("environment"), "environment: "),
        (lambda data: data.update(version="fxopt.claim/0"), "version: "),
        (
            lambda data: data["claims"][0]["verdict"].update(label="GOOD"),
            "claims.0.verdict.label: ",
        ),
        (
            lambda data: data["claims"][0]["samples"]["rounds"].append([1.0]),
            "claims.0.samples.rounds",
        ),
    ],
)
def test_a_field_that_does_not_fit_the_schema_is_named(tmp_path, spoil, problem):
    path = tmp_path / "claim.json"
    data = json.loads(record.to_text(made()))
    spoil(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InvalidRecord, match=problem):
        record.read(path)


@pytest.mark.parametrize("text, problem", [("{", "not JSON"), (None, "No such file")])
def test_what_is_no_record_is_said(tmp_path, text, problem):
    path = tmp_path / "claim.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InvalidRecord, match=problem):
        record.read(path)


def test_a_record_that_does_not_fit_is_not_written(tmp_path):
    path = tmp_path / "claim.json"
    with pytest.raises(InvalidRecord, match=r"claims\.0\.status"):
        record.write(made(claim(status="fine")), path)
    assert not path.exists()


def test_a_full_disk_leaves_the_good_file(tmp_path, monkeypatch):
    path = tmp_path / "claim.json"
    record.write(made(), path)
    good = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(CannotWrite, match="No space left on device; nothing was replaced"):
        record.write(made(claim(2.0)), path)
    assert path.read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["claim.json"]


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(CannotWrite, match="No such file or directory"):
        record.write(made(), tmp_path / "absent" / "claim.json")


@pytest.mark.parametrize(
    ("new", "expected"), [(1.2, Label.SAME), (1.1, Label.SLOW), (1.4, Label.FAST)]
)
def test_two_records_compare_by_their_speedups(new, expected):
    (change,) = compare(made(), made(claim(new), commit="def"))
    assert change.label is expected
    # The jitter of the samples is 1 in 1000.
    assert change.ratio == pytest.approx(new / 1.2, rel=2e-3)


def test_a_new_record_that_is_wrong_is_invalid():
    wrong = claim(2.0, verdict=judge(claim().samples, ["output 0: relative error 1"]))
    (change,) = compare(made(), made(wrong))
    assert change.label is Label.INVALID


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (made(device="A100"), "environment.device is 'H100' in the old one and 'A100'"),
        (made(driver="570"), "environment.driver is None in the old one and '570'"),
        (made(claim(configuration={"seed": 1, "batch": 2})), "step: configuration.seed is 0"),
        (made(claim(configuration={"seed": 0})), "step: configuration.batch is 2"),
        (made(claim(baseline="b.py:f")), "step: baseline is 'a.py:f'"),
        (made(claim(name="other")), "the set of cases"),
    ],
)
def test_records_under_other_conditions_are_refused_with_the_field(other, field):
    with pytest.raises(RecordsDiffer) as raised:
        compare(made(), other)
    assert field in str(raised.value)


def test_a_partial_record_is_not_compared():
    with pytest.raises(InvalidRecord, match="claim is interrupted"):
        compare(made(), made(claim(status="interrupted")))
