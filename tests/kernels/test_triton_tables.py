"""The tables of launch parameters: which row is taken."""

from __future__ import annotations

import pytest
import torch

from fxopt.kernels import triton_tables
from fxopt.kernels.triton_tables import TABLES, Row


@pytest.mark.parametrize("kernel", TABLES)
def test_the_last_row_holds_everywhere(kernel):
    last = TABLES[kernel][-1]
    assert last == Row(last.parameters)
    assert all({*row.parameters} == {*last.parameters} for row in TABLES[kernel])


@pytest.mark.parametrize(
    ("features", "rows", "capability", "expected"),
    [
        (512, 8, 90, 1),
        (257, 9, 90, 1),
        (256, 8, 90, 2),
        (513, 8, 90, 2),
        (512, 7, 90, 2),
        (512, 10, 90, 2),
        (512, 8, 100, 2),
        (0, 0, 0, 2),
    ],
)
def test_the_first_row_that_holds_is_taken(monkeypatch, features, rows, capability, expected):
    first = Row({"num_warps": 1}, 257, 512, 8, 9, capability=90)
    monkeypatch.setitem(TABLES, "kernel", (first, Row({"num_warps": 2}), Row({"num_warps": 3})))
    monkeypatch.setattr(triton_tables, "capability_of", lambda x: capability)
    found = triton_tables.parameters("kernel", features, rows, torch.empty(0))
    assert found == {"num_warps": expected}
