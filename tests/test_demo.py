"""The demo end to end, at a size that takes seconds, and the parts that its verdict rests on."""

import copy
from pathlib import Path

import pytest
import torch

from fxopt import demo
from fxopt.demo import claim, training
from fxopt.demo.training import Run, Scale
from fxopt.diagnose import record
from fxopt.diagnose.memory import Memory

SCALE = Scale(num_steps=4, batch=4, num_double=1, num_single=1, num_heads=2)
RUNS = ["eager", "reversed", "optimize", "compile", "swap"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory) -> tuple[int, list[Run], Path]:
    """Exit code, runs and folder of a small demo, without the time that a compiler takes."""
    out = tmp_path_factory.mktemp("demo")
    runs = demo.build_runs(SCALE, "eager", seed=0)
    return demo.demonstrate(runs, SCALE, 0, out), runs, out


def test_every_door_trains_alike(shown):
    code, runs, _ = shown
    assert code == 0
    assert [run.name for run in runs] == RUNS
    assert all(len(run.losses) == SCALE.num_steps for run in runs)
    for run in runs[1:]:
        # fp32 sums of some thousand terms, and four steps: rounding of 6e-8 grows by less than 20.
        torch.testing.assert_close(run.losses, runs[0].losses, rtol=1e-5, atol=0)


def test_it_writes_a_page_and_two_pictures(shown):
    *_, out = shown
    assert "norm_modulate" in (out / "report.html").read_text()
    for name in ("loss.png", "samples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_it_ends_with_a_claim_record(shown):
    *_, out = shown
    made = record.read(out / "claim.json")
    assert [found.name for found in made.claims] == ["optimize", "compile", "swap"]
    for found in made.claims:
        assert found.baseline == "eager"
        gradients, losses = found.checks
        assert not gradients.failures and not losses.failures
        assert (gradients.when, gradients.num_outputs, losses.num_outputs) == ("before", 0, 4)
        assert gradients.num_gradients > 50
        assert found.memory["candidate"].peak > 0
        assert found.manifest["applied"]


def test_neighbouring_steps_are_rounds():
    runs = [finished("eager", [1.0] * 8), finished("optimize", [1.0] * 8)]
    runs[0].seconds = [9.0, 9.0, 9.0, 9.0, 1.0, 2.0, 3.0, 4.0]
    runs[1].seconds = [9.0, 9.0, 9.0, 9.0, 5.0, 6.0, 7.0, 8.0]
    made = claim.rounds(runs[1], runs[0])
    assert made.rounds == [(1.0, 5.0, 6.0, 2.0), (3.0, 7.0, 8.0, 4.0)]
    assert made.warmup.num_rounds == 4


@pytest.mark.parametrize("found", [1 + 2 * demo.LARGEST_GAP, float("nan")])
def test_losses_that_part_make_the_claim_invalid(found):
    runs = [finished("eager", [1.0, 1.0]), finished("optimize", [1.0, found])]
    check = claim.losses(runs[1], runs[0], demo.LARGEST_GAP)
    assert len(check.failures) == 1


def test_wrong_gradients_make_the_claim_invalid_though_the_losses_agree():
    runs = [finished("eager", [1.0, 1.0]), finished("optimize", [1.0, 1.0])]
    for run, sign in zip(runs, (1, -1), strict=True):
        run.first_gradients = {
            "gradient of a": torch.ones(9),
            "gradient of b": sign * torch.ones(9),
        }
    check = claim.gradients(runs[1], runs[0])
    (failure,) = check.failures
    assert failure.startswith("gradient of b: relative error 2.00e+00")
    memory = dict.fromkeys(("eager", "optimize"), Memory(1, None, 1))
    report = demo.Report("optimize", "bf16", "cpu")
    made = claim.claim(runs[1], runs[0], {}, report, memory, demo.LARGEST_GAP)
    assert made.verdict.label == "INVALID"


def test_the_table_counts_rewrites_and_costs(capsys):
    runs = [finished("eager", [1.0, 1.0]), finished("optimize", [1.0, 1.0])]
    runs[1].seconds = [3.0, 0.5]
    report = demo.Report("optimize", "bf16", "cpu", (applied("qk_norm_rope", 12),))
    demo.print_table(runs, {"optimize": report}, {"eager": 2_000_000, "optimize": 1_000_000})
    printed = capsys.readouterr().out.splitlines()
    lines = {line[:24].strip(): line[24:].split() for line in printed}
    assert lines["qk_norm_rope"] == ["12"]
    assert lines["step time / eager's"] == ["1.00", "0.50"]
    assert lines["peak memory / eager's"] == ["1.00", "0.50"]
    assert lines["set-up, first step, s"] == ["1.0", "3.0"]


def applied(rule: str, count: int):
    from fxopt.report import Applied

    return Applied(rule, "block", count, "native", "rounding", "")


def finished(name: str, losses: list[float]) -> Run:
    run = Run(name, torch.nn.Identity(), None, SCALE, losses=losses)
    run.seconds, run.opening_seconds = [1.0] * len(losses), 0.0
    return run


@pytest.mark.parametrize("found", [1 + 2 * demo.LARGEST_GAP, float("nan")])
def test_losses_that_part_fail(found, capsys):
    runs = [finished("eager", [1.0, 1.0]), finished("optimize", [1.0, found])]
    assert demo.verdict(runs) == 1
    assert "'optimize' part" in capsys.readouterr().out
    runs[1].losses = [1.0, 1 + demo.LARGEST_GAP / 2]
    assert demo.verdict(runs) == 0


def test_a_wrong_gradient_moves_the_loss_past_rounding():
    scale = Scale(num_steps=8, batch=4, num_double=1, num_single=1, num_heads=2)

    def faulty(model):
        linear = model.single_transformer_blocks[0].proj_mlp
        linear.weight.register_hook(lambda gradient: -gradient)
        return model

    model = training.build_model(scale, 0)
    runs = [Run("eager", copy.deepcopy(model), None, scale), Run("fault", model, faulty, scale)]
    demo.train(runs, scale, 0)
    assert demo.verdict(runs) == 1


def test_the_same_seed_gives_the_same_data():
    for a, b in zip(training.batches(SCALE, 3), training.batches(SCALE, 3), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    first, other = next(training.batches(SCALE, 3)), next(training.batches(SCALE, 4))
    assert not torch.equal(first.noise_BSC, other.noise_BSC)


def test_patches_hold_neighbouring_pixels():
    images = torch.arange(2 * 64.0).view(2, 8, 8)
    tokens = training.pack(images)
    assert tokens[1, 5].tolist() == images[1, 2:4, 2:4].flatten().tolist()
    assert torch.equal(training.unpack(tokens), images)


def test_euler_steps_along_the_true_velocity_reach_the_image():
    images, labels = training.load_images()
    wanted = images[[int((labels == label).nonzero()[0]) for label in range(10)]]

    def straight(hidden_states, timestep, **_):
        return ((hidden_states - wanted) / timestep[:, None, None],)

    # 25 fp32 steps, each of which rounds values near 1.
    torch.testing.assert_close(
        training.sample(straight, seed=0), training.unpack(wanted), atol=1e-4, rtol=0
    )


def test_the_compiled_door_says_what_it_lacks(monkeypatch, capsys):
    monkeypatch.setattr(demo.shutil, "which", lambda name: None)
    assert demo.main([]) == 2
    assert "--inner aot_eager" in capsys.readouterr().err
