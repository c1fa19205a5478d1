"""The list of combinations that tests draw from."""

import itertools

from tests.pairwise import pairwise


def test_holds_every_pair_in_few_rows():
    axes = {"a": "vwxyz", "b": (None, 1, 2, 3), "c": (True, False), "d": "vw", "e": range(4)}
    rows = pairwise(**axes)
    for (a, of_a), (b, of_b) in itertools.combinations(axes.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(itertools.product(of_a, of_b))
    # At least the product of the two longest axes, 20; all combinations would be 320.
    assert 20 <= len(rows) <= 25
    assert rows == pairwise(**axes)


def test_one_axis_has_no_pairs():
    assert pairwise(a="xyz") == []
