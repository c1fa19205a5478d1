"""The page of results says what the committed files say."""

from __future__ import annotations

from bench.tables import PAGE, page, table


def test_the_page_is_that_of_the_committed_results():
    assert PAGE.read_text() == page(), "run python -m bench.tables"


def row(case, metric, value, target=None, holds=None):
    return {"case": case, "metric": metric, "value": value, "target": target, "holds": holds}


def test_what_has_a_target_is_shown_and_a_miss_is_bold():
    rows = [
        row("flux", "eager [ms]", 3.0),
        row("flux", "speedup", 0.91234, ">= 0.98", False),
        row("wan", "speedup", 1.5, ">= 0.98", True),
    ]
    assert table(rows) == (
        "| case | speedup (>= 0.98) |\n| --- | ---: |\n| flux | **0.912** |\n| wan | 1.5 |"
    )


def test_targets_that_differ_stand_with_their_figures():
    rows = [
        row("flux", "speedup", 0.9, ">= 0.98", False),
        row("llama", "speedup", 1.6, ">= 1.5", True),
    ]
    assert table(rows).splitlines()[2:] == [
        "| flux | **0.9** (>= 0.98) |",
        "| llama | 1.6 (>= 1.5) |",
    ]


def test_figures_without_targets_are_all_shown():
    rows = [row("fp8", "difference", 0.001), row("fp8", "band", 0.02)]
    assert table(rows).splitlines()[0] == "| case | difference | band |"
