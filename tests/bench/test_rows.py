"""The row format that every bench command shares."""

import argparse
import json

import pytest

from bench.rows import Row, add_arguments, publish


def arguments(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize(
    ("row", "target", "holds"),
    [
        (Row("c", "m", 1.5, at_most=1.5), "<= 1.5", True),
        (Row("c", "m", 1.6, at_most=1.5), "<= 1.5", False),
        (Row("c", "m", 0.98, at_least=0.98), ">= 0.98", True),
        (Row("c", "m", 0.97, at_least=0.98), ">= 0.98", False),
        (Row("c", "m", float("nan"), at_most=1), "<= 1", False),
        (Row("c", "m", 3.0), None, None),
    ],
)
def test_target(row, target, holds):
    assert (row.target, row.holds) == (target, holds)


def test_json_alone_on_standard_output(capsys):
    row = Row("block", "ratio", 2.0, at_most=1.0)
    assert publish(arguments("--json", "-"), [row]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rows"] == [
        {"case": "block", "metric": "ratio", "value": 2.0, "target": "<= 1", "holds": False}
    ]
    assert {"commit", "torch", "platform", "device"} <= document["environment"].keys()


def test_json_to_a_file_beside_the_table(tmp_path, capsys):
    path = tmp_path / "rows.json"
    publish(arguments("--json", str(path)), [Row("block", "ratio", 2.0, at_most=1.0)])
    assert capsys.readouterr().out.splitlines()[1].split() == [
        "block",
        "ratio",
        "2",
        "<=",
        "1",
        "MISSED",
    ]
    assert json.loads(path.read_text())["rows"][0]["value"] == 2.0


def test_only_check_turns_a_miss_into_an_exit_code():
    missed, held, free = Row("c", "m", 2, at_most=1), Row("c", "m", 1, at_most=1), Row("c", "m", 9)
    assert publish(arguments(), [missed, held, free]) == 0
    assert publish(arguments("--check"), [missed, held, free]) == 1
    assert publish(arguments("--check"), [held, free]) == 0
