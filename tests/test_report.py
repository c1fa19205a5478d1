"""One schema as objects, JSON, text and a page; the page is read in a real browser."""

import html
import json
import re
import shutil
import subprocess

import pytest

from fxopt.cost import BlockCost, Cost, Fp8BreakEven
from fxopt.render import quantity
from fxopt.report import TOTALS, Applied, Attention, Declined, Report

PHONE_WIDTH = 390


def applied(rule="qk_norm_rope", fqn="blocks.0", count=2, **fields):
    fields = {"block_class": "FluxBlock"} | fields
    return Applied(rule, fqn, count, "triton", "rounding", "flux.py:12", **fields)


def declined(**fields):
    fields = {
        "fqn": "blocks.0",
        "block_class": "FluxBlock",
        "remedy": "call clone() first",
    } | fields
    reasons = ("dim is -2", "a < b & c")
    return Declined("attention", node="softmax_3", source="flux.py:40", reasons=reasons, **fields)


REPORT = Report(
    "optimize",
    "bf16",
    "cuda:sm_90",
    applied=(
        applied(),
        applied(fqn="blocks.1"),
        applied("norm_modulate", count=1, bytes_saved=3_000_000_000),
    ),
    declined=(declined(),),
    totals={"glue_bytes_before": 10_000_000_000, "glue_bytes_after": 4_000_000_000},
    attentions=(
        Attention("pytorch", "nothing was measured <here>", "blocks.0", "FluxBlock"),
        Attention("pytorch", "nothing was measured <here>", "blocks.1", "FluxBlock"),
    ),
)
BLOCK = BlockCost(
    "FluxBlock",
    19,
    Cost(4e-3, 1.5e-3, 2e-3, 10**12, 10**11, 6 * 10**9, 177, 630_000_000),
    Cost(4e-3, 1.5e-3, 7e-4, 10**12, 10**11, 2 * 10**9, 60, 350_000_000),
    (Fp8BreakEven(3072, 3072, 4096, 743), Fp8BreakEven(64, 3072, 4096, None)),
)
PLAN = Report(
    "explain",
    "bf16",
    "h100",
    (
        applied(fqn="", count=38, bytes_saved=2_500_000_000),
        applied("norm_modulate", fqn="", count=19, bytes_saved=-1_500_000),
    ),
    (declined(fqn=""),),
    REPORT.totals,
    (BLOCK,),
)


def test_counts_sum_over_blocks():
    assert REPORT.count("qk_norm_rope") == 4
    assert REPORT.count("rms_norm") == 0
    assert REPORT.counts() == {"qk_norm_rope": 4, "norm_modulate": 1}


def test_schema_is_the_published_one():
    data = REPORT.to_dict()
    assert {"door", "recipe", "target", "applied", "declined", "totals"} <= set(data)
    assert set(data["totals"]) == set(TOTALS)
    assert {"rule", "fqn", "count", "provider", "tier", "bytes_saved", "flops", "source"} <= set(
        data["applied"][0]
    )
    # Not counted is not zero.
    assert [a["bytes_saved"] for a in data["applied"]] == [None, None, 3_000_000_000]
    assert {"rule", "fqn", "node", "source", "reasons", "remedy"} <= set(data["declined"][0])


@pytest.mark.parametrize("report", [Report("swap", "bf16", "cpu"), REPORT, PLAN])
def test_json_round_trip(report):
    again = Report.from_dict(json.loads(report.to_json()))
    assert again.to_dict() == report.to_dict()
    assert again.applied == report.applied
    assert again.declined == report.declined
    assert again.blocks == report.blocks
    assert again.attentions == report.attentions


def test_merge_joins_doors_and_sums_totals():
    other = Report("swap", "bf16", "cuda:sm_90", (applied(count=5),), totals=REPORT.totals)
    merged = REPORT.merge(other)
    assert merged.door == "optimize+swap"
    assert merged.recipe == "bf16"
    assert merged.count("qk_norm_rope") == 9
    assert merged.totals["glue_bytes_before"] == 20_000_000_000


def test_text_aggregates_by_block_class_and_gives_every_reason():
    lines = str(REPORT).splitlines()
    row = next(line.split() for line in lines if line.strip().startswith("qk_norm_rope"))
    assert row[:3] == ["qk_norm_rope", "4", "2"]  # four substitutions in two blocks
    text = str(REPORT)
    assert text.count("FluxBlock") == 1
    for part in ("flux.py:40", "softmax_3", "dim is -2", "a < b & c", "remedy: call clone() first"):
        assert part in text
    assert "10 GB -> 4 GB (0.40x)" in text


def test_a_line_says_who_runs_the_attentions_of_a_block_class():
    line = "  attention: PyTorch's own choice; nothing was measured <here>"
    assert str(REPORT).splitlines().count(line) == 1
    assert REPORT.html().count("nothing was measured &lt;here&gt;") == 1
    assert len(REPORT.merge(REPORT).attentions) == 4


def test_text_says_when_nothing_matched():
    assert "No rule matched: the model runs as it" in Report("optimize", "bf16", "cpu").text()
    attentions = (Attention("flash", "as the recipe says", "blocks.0", "Block"),)
    chosen = Report("optimize", "mine", "cpu", attentions=attentions)
    assert "No rule matched: who runs the attentions is all that is new." in chosen.text()


def test_plan_shows_times_and_where_fp8_pays():
    text = PLAN.text()
    assert re.search(r"rule +times .* source +glue saved\n", text)
    assert re.search(r"qk_norm_rope +38 +19 .* 2.5 GB\n", text)
    assert re.search(r"before +4 ms +1.5 ms +2 ms +7.5 ms +6 GB +177 +630 MB", text)
    assert "FP8 pays from 743 tokens; pays at its 4,096" in text
    assert "linear 3072 -> 64: FP8 never pays" in text
    assert "roofline" in text


def test_quantities():
    assert quantity(5.99e9, "B") == "5.99 GB"
    assert quantity(0.00153, "s") == "1.53 ms"
    assert quantity(0, "B") == "0"


def test_page_loads_nothing_from_elsewhere():
    page = PLAN.html()
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script|<link", page)


def visible_on_a_phone(page, folder):
    """(text a reader sees, width of the document in pixels) in a frame as wide as a phone."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("chromium is not installed: the page was not opened in a browser")
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe style="border:0;width:{PHONE_WIDTH}px;height:800px" '
        f'srcdoc="{html.escape(page)}"></iframe><pre id="seen"></pre><script>'
        "onload = () => { const page = document.querySelector('iframe').contentDocument;"
        "document.querySelector('#seen').textContent ="
        "page.documentElement.scrollWidth + '|' + page.body.innerText; }</script>",
        encoding="utf-8",
    )
    dump = subprocess.run(
        [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--no-first-run", f"--user-data-dir={folder / 'profile'}"),
            *("--virtual-time-budget=5000", "--dump-dom", frame.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    seen = re.search(r'<pre id="seen">(.*?)</pre>', dump, re.DOTALL)
    assert seen is not None, dump[:500]
    width, _, text = html.unescape(seen.group(1)).partition("|")
    return text, int(width)


def test_page_reads_on_a_phone(tmp_path):
    text, width = visible_on_a_phone(PLAN.html(), tmp_path)
    assert width <= PHONE_WIDTH
    for part in (
        "fxopt explain: bf16 on h100",
        "57 substitutions would be made: qk_norm_rope 38, norm_modulate 19.",
        "FluxBlock \N{MULTIPLICATION SIGN}19",
        "before 7.5 ms",
        "after 6.2 ms",
        "qk_norm_rope\t38\t19\ttriton\trounding\tflux.py:12\t2.5 GB",
        "norm_modulate\t19\t19\ttriton\trounding\tflux.py:12\t-1.5 MB",
        "attention flux.py:40, node softmax_3, 19 block(s)",
        "a < b & c",
        "Remedy: call clone() first",
        "FP8 pays from 743 tokens",
    ):
        assert part in text
