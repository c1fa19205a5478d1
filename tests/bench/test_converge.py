"""The convergence study: its verdicts, and that it finds what is planted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import converge
from bench.converge import Result, faults, judge, plot, train
from fxopt.demo.training import Scale
from fxopt.kernels import formats, quantize, quantized_gradients, saving
from fxopt.recipes import RECIPES, Recipe

pytest.importorskip("diffusers", reason="the demo's model is diffusers'")
pytest.importorskip("sklearn", reason="the demo's images are scikit-learn's")

FP8, NVFP4 = RECIPES["fp8"], RECIPES["nvfp4"]
SCALE = Scale(num_steps=4, batch=8, num_double=1, num_single=1)


def results(*losses: float, ratio: float = 1.0, cosine: float = 1.0) -> list[Result]:
    return [Result([x], {"mlp": [ratio]}, {"mlp": [cosine]}) for x in losses]


PLAIN = results(1.0, 1.1, 0.9, 1.05, 0.95)  # a standard deviation of 0.079


@pytest.mark.parametrize(
    "losses, word",
    [
        ((1.01, 1.11, 0.91, 1.06, 0.96), "same"),
        ((1.5, 1.6, 1.4, 1.55, 1.45), "worse"),
        ((0.5, 0.6, 0.4, 0.55, 0.45), "same"),  # or better
        ((1.5, 1.1, 0.5, 1.55, 0.95), "inconclusive"),
    ],
)
def test_verdicts(losses: tuple[float, ...], word: str) -> None:
    verdict = judge(FP8, PLAIN, results(*losses))
    assert verdict.word == word and word in str(verdict)


def test_the_interval_is_that_of_student() -> None:
    verdict = judge(FP8, results(0.0, 1.0), results(0.1, 1.3))
    assert verdict.difference == pytest.approx(0.2)
    # Differences of 0.1 and 0.3: their mean has a standard error of 0.1; t(0.975, 1) = 12.7062.
    assert verdict.margin == pytest.approx(1.27062, rel=1e-5)
    assert verdict.band == pytest.approx(2 * 0.5**0.5)


@pytest.mark.parametrize("ratio, cosine", [(1.1, 1.0), (0.9, 1.0), (1.0, 0.5)])
def test_gradients_come_before_the_loss(ratio: float, cosine: float) -> None:
    low = results(1.0, 1.1, 0.9, 1.05, 0.95, ratio=ratio, cosine=cosine)
    verdict = judge(FP8, PLAIN, low)
    assert verdict.word == "wrong gradients" and "mlp" in verdict.found[0]


SAVED = Recipe("bf16 saved", saved="fp8")


def test_a_sound_recipe_has_sound_gradients() -> None:
    for recipe in (FP8, NVFP4, SAVED):
        assert not list(faults(recipe, [train(recipe, SCALE, 0)]))


def test_a_wrong_scale_in_one_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = quantized_gradients._weight_gradient
    monkeypatch.setattr(quantized_gradients, "_weight_gradient", lambda *a: right(*a) * 1.125)
    found = list(faults(FP8, [train(FP8, SCALE, 0)]))
    assert any("attention is 1.1" in fault for fault in found)
    assert not any("modulation" in fault for fault in found)  # it is not quantized


def test_activations_that_come_back_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = saving.unpack
    monkeypatch.setattr(saving, "unpack", lambda *a: [1.125 * x for x in right(*a)])
    found = list(faults(SAVED, [train(SAVED, SCALE, 0)]))
    assert any("mlp" in fault for fault in found)


def test_a_dropped_hadamard_transform_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    right = quantize.quantize_matrix

    def one_operand(x, operand, uniform, *_):
        return right(x, replace(operand, hadamard=operand.stochastic and operand.hadamard), uniform)

    monkeypatch.setattr(quantize, "quantize_matrix", one_operand)
    found = list(faults(NVFP4, [train(NVFP4, SCALE, 0)]))
    assert any("mlp has a cosine of" in fault for fault in found)


def test_biased_rounding_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = formats.round_to

    def toward_zero(x, format, uniform=None):
        if uniform is None:
            return right(x, format)
        return right(x.abs(), format, torch.full_like(uniform, 1 - 2**-24)).copysign(x)

    monkeypatch.setattr(formats, "round_to", toward_zero)
    found = list(faults(NVFP4, [train(NVFP4, SCALE, 0)]))
    assert any("times as large" in fault for fault in found)


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(converge, "train", lambda *_: results(1.0)[0])
    monkeypatch.setattr(converge, "NUM_BINS", 1)
    picture = tmp_path / "losses.png"
    arguments = ["--recipe", "fp8,mxfp8", "--seeds", "2", "--plot", str(picture)]
    assert converge.main([*arguments, "--saved", "fp8"]) == 0
    assert "mxfp8_saved: same" in capsys.readouterr().err
    delayed = ["--recipe", "fp8", "--seeds", "2", "--history", "16"]
    assert converge.main(delayed) == 0
    assert "fp8_delayed: same" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        converge.main(["--recipe", "mxfp8", "--history", "16"])
    assert "history" in capsys.readouterr().err
    assert converge.main([*arguments, "--check"]) == 0
    printed = capsys.readouterr()
    assert "mxfp8: same" in printed.err and "gradient cosine, mlp" in printed.out
    assert picture.stat().st_size
    with pytest.raises(SystemExit):
        converge.main(["--seeds", "1"])
    plot(picture, PLAIN, {})
