"""The floor against sums done by hand, the baselines against the published ones, the command."""

import json
from collections import Counter

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from bench import floor_traffic, traffic
from fxopt.cost import Product
from fxopt.presets import PRESETS
from fxopt.recipes import Recipe, find
from fxopt.traffic import Traffic

N, D = 16, 32
TENSOR = N * D * 4  # bytes of one [N, D] in fp32

# What eager PyTorch and AOTAutograd cost before fxopt existed, in GB at batch 1: glue in eager,
# glue under perfect fusion, saved in eager, saved by min-cut.
PUBLISHED = {
    "flux-dev double": (5.99, 1.72, 0.63, 0.60),
    "flux-dev single": (5.48, 1.44, 0.54, 0.57),
    "qwen-image block": (7.71, 1.71, 0.80, 0.60),
    "flux2-dev single": (14.1, 2.91, 1.31, 1.08),
    "z-image block": (17.8, 1.98, 1.58, 0.64),
    "wan2.1-14b block": (112, 23.4, 10.3, 9.89),
}


def fused_bytes(function) -> int:
    x_ND, w_DD = torch.empty(N, D, device="meta"), torch.empty(D, D, device="meta")
    return floor_traffic.fused_bytes(make_fx(function)(x_ND, w_DD).graph)


def test_a_chain_is_one_kernel():
    assert fused_bytes(lambda x, w: ((x @ w).sigmoid() * 2 + 1) @ w) == 2 * TENSOR


def test_a_region_reads_a_tensor_once():
    def twice(x, w):
        h = x @ w
        return h.sigmoid() + h.cos()

    assert fused_bytes(twice) == 2 * TENSOR


def test_separate_regions_read_it_each():
    def apart(x, w):
        h = x @ w
        return h.sigmoid(), h.cos()

    assert fused_bytes(apart) == 4 * TENSOR


def test_regions_join_through_views_and_views_are_free():
    def through_views(x, w):
        return (x @ w).sigmoid().view(-1).view(D, N).t().cos()

    assert fused_bytes(through_views) == 2 * TENSOR
    assert fused_bytes(lambda x, w: (x @ w).t() @ (x @ w)) == 0


def test_a_slice_costs_what_it_reads():
    assert fused_bytes(lambda x, w: (x @ w)[:, : D // 2].sigmoid()) == TENSOR


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(D, D, bias=False)
        self.down = nn.Linear(D, D, bias=False)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


def test_feed_forward():
    with torch.device("meta"):
        block, inputs = FeedForward(), {"x": torch.empty(N, D, requires_grad=True)}
    floor = floor_traffic.count(block, inputs, num_outputs=1)
    # What gelu reads and what it writes: min-cut recomputes no operand of a product. The input and
    # the parameters are not counted.
    assert floor.saved == 2 * TENSOR
    # Forward reads and writes one tensor; backward reads it and a gradient and writes a gradient.
    assert floor.glue == (2 + 3) * TENSOR


@pytest.mark.parametrize("case", PUBLISHED)
def test_baselines_are_the_published_ones(case):
    ((found, preset),) = traffic.cases(case)
    assert found == case
    value = {r.metric: r.value for r in traffic.measure(case, preset, None, detail=False)}
    metrics = ["glue, eager [GB]", "glue, floor [GB]", "saved, eager [GB]", "saved, min-cut [GB]"]
    # The table is rounded to two or three digits: at most 1% off.
    assert [value[m] for m in metrics] == pytest.approx(PUBLISHED[case], rel=0.01)


def test_targets_are_set_on_blocks_that_exist():
    assert {case for case, _ in traffic.cases()} >= traffic.TARGETED


def test_every_preset_has_its_real_number_of_parameters():
    # Of the blocks alone, in 1e9; the published totals add embedders and the output layer.
    expected = {
        "flux-dev": 11.84,
        "flux2-dev": 31.41,
        "sd3.5-large": 8.02,
        "qwen-image": 20.39,
        "wan2.1-14b": 14.06,
        "z-image": 6.14,
        "llama-3-8b": 6.98,
    }
    assert PRESETS.keys() == expected.keys()
    for name, preset in PRESETS.items():
        total = 0
        for block in preset.blocks():
            with torch.device("meta"):
                parameters = list(block.build().parameters())
            assert {p.dtype for p in parameters} == {torch.bfloat16}
            total += block.count * sum(p.numel() for p in parameters)
        assert total / 1e9 == pytest.approx(expected[name], rel=1e-3)


def test_a_rewrite_that_changes_nothing_misses_every_target(monkeypatch, capsys):
    monkeypatch.setattr(traffic, "eager_door", lambda: lambda block, args, kwargs: block)
    assert traffic.main(["--only", "flux-dev single", "--json", "-", "--check"]) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    value = {row["metric"]: row["value"] for row in rows}
    assert value["glue, fxopt [GB]"] == value["glue, eager [GB]"]
    assert value["saved, fxopt [GB]"] == value["saved, eager [GB]"]
    with_target = {row["metric"]: row["holds"] for row in rows if row["target"]}
    # Eager keeps less than min-cut on this block.
    assert with_target.pop("saved, fxopt / min-cut") is True
    assert len(with_target) == 3
    assert not any(with_target.values())


@pytest.mark.parametrize("case, launches", [("flux-dev single", 36), ("flux-dev double", 58)])
def test_targets_hold_and_launches_do_not_grow(case, launches, capsys):
    assert traffic.main(["--only", case, "--json", "-", "--check"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["launches, fxopt"]["value"] == launches


def test_an_unknown_case_names_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        traffic.main(["--only", "flux-schnell"])
    assert "flux-dev double" in capsys.readouterr().err


def test_bytes_of_quantization_by_element():
    m, n, k = 6, 4, 2
    gemms = [Product(1, 1, shape, 8) for shape in ((m, k, n), (n, k, m))]
    backward = Traffic([*gemms, Product(1, 1, (9, 9, 9))])
    linears = traffic.Linears.of(backward, find("fp8"))
    assert linears == (1, m * n + n * k + m * k)
    found = Traffic(glue=Counter({"fxopt::quantize": 88, "x": 1}))
    assert traffic.per_element(found, Traffic(), linears) == 88 / (m * n + n * k + m * k)
    # A producer that quantizes counts with what it does beyond its work in bf16.
    found.glue["fxopt::norm_modulate_quantize"] = 50
    plain = Traffic(glue=Counter({"fxopt::norm_modulate": 40}))
    assert traffic.per_element(found, plain, linears) == 98 / (m * n + n * k + m * k)


def test_a_recipe_is_compared_with_bf16(monkeypatch):
    def rewrite(block, args, inputs, recipe="bf16"):
        assert recipe in ("bf16", "fp8")
        return block

    monkeypatch.setattr(traffic, "per_element", lambda *_: 7.0)
    monkeypatch.setattr(traffic, "per_linear", lambda *_: 7.0)
    ((case, preset),) = traffic.cases("flux-dev single")
    table = {row.metric: row for row in traffic.measure_recipe(case, preset, rewrite, "fp8", False)}
    assert table["glue, recipe / bf16 (asked: 1.25)"].value == 1
    assert table["glue, fp8 [GB]"].holds is False  # eager's 5.5 is above the gate
    assert table["quantization launches / linear (asked: 5)"].holds is False  # 7 is above the gate
    assert table["saved, recipe / bf16 (asked: 0.75)"].value == 1
    assert table["quantization [B / element]"].target == "<= 8"


@pytest.mark.parametrize(
    "recipe, reason", [("bf16", "that quantizes, not for bf16"), ("mxfp8", "scaled by themselves")]
)
def test_a_history_is_for_scales_per_tensor(recipe, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        traffic.main(["--recipe", recipe, "--history", "4"])
    assert reason in capsys.readouterr().err


def test_delayed_scaling_moves_less(monkeypatch, capsys):
    argv = ["--only", "flux-dev single", "--recipe", "fp8", "--history", "16", "--json", "-"]
    assert traffic.main([*argv, "--check"]) == 0
    rows = {row["metric"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["glue, recipe / bf16 (asked: 1.25)"]["value"] == pytest.approx(1.820, abs=1e-3)
    assert rows["quantization launches / linear (asked: 5)"]["value"] == 1.6
    assert all(row["holds"] for row in rows.values() if row["target"])


def test_what_is_saved_needs_no_quantized_linear(monkeypatch, capsys):
    def rewrite(block, args, inputs, recipe="bf16"):
        assert recipe == "bf16" or find(recipe) == Recipe("bf16_saved", saved="fp8")
        return block

    monkeypatch.setattr(traffic, "eager_door", lambda: rewrite)
    only = ("--recipe", "bf16", "--saved", "fp8", "--only", "flux-dev single")
    assert traffic.main([*only, "--json", "-", "--check"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    value = {row["metric"]: row["value"] for row in rows}
    assert value["saved, recipe / bf16 (asked: 0.75)"] == 1
    assert not any("quantization" in metric for metric in value)
