"""The verdict on machines with synthetic clocks: how often it is right, and when it abstains."""

from collections import Counter
from types import SimpleNamespace

import pytest

from fxopt.diagnose import protocol
from fxopt.diagnose.protocol import Samples
from fxopt.diagnose.verdict import Label, Verdict, judge, label
from tests.diagnose.machines import Machine, compare, verdict

NUM_RUNS = 200
COLLECTOR = ("collect", "disable", "enable", "isenabled")
STEP = 0.1  # seconds
# White noise and spikes on top of noise that lasts, and a clock that throttles by 15%: wandering
# slowly, fast, and faster than a round.
MACHINES = {
    "slow": {"white": 0.01, "lasting": 0.05, "memory": 5.0, "spikes": 0.02, "throttling": 20.0},
    "usual": {"white": 0.02, "lasting": 0.03, "memory": 1.0, "spikes": 0.02, "throttling": 8.0},
    "fast": {"white": 0.02, "lasting": 0.03, "memory": 0.1, "spikes": 0.02, "throttling": 1.0},
}
NOISY = {"white": 0.05, "lasting": 0.05, "memory": 0.3, "spikes": 0.05, "throttling": 3.0}


@pytest.fixture(autouse=True)
def no_garbage_collection(monkeypatch):
    """Thousands of runs of Python's collector would take most of the real time here."""
    monkeypatch.setattr(protocol, "gc", SimpleNamespace(**dict.fromkeys(COLLECTOR, lambda: None)))


def labels(kind: dict[str, float], candidate: float, num_runs: int = NUM_RUNS) -> Counter[Label]:
    runs = (verdict(Machine(seed, **kind), STEP, candidate) for seed in range(num_runs))
    return Counter(run.label for run in runs)


@pytest.mark.parametrize("kind", MACHINES)
def test_a_step_against_itself_is_same_in_95_percent(kind):
    assert labels(MACHINES[kind], STEP)[Label.SAME] >= 0.95 * NUM_RUNS


@pytest.mark.parametrize("kind", MACHINES)
def test_three_percent_slower_is_slow_in_95_percent(kind):
    assert labels(MACHINES[kind], 1.03 * STEP)[Label.SLOW] >= 0.95 * NUM_RUNS


def test_three_percent_faster_is_fast_in_95_percent():
    assert labels(MACHINES["usual"], STEP / 1.03)[Label.FAST] >= 0.95 * NUM_RUNS


def test_where_noise_hides_the_answer_it_says_so_and_does_not_guess():
    found = labels(NOISY, STEP, num_runs=100)
    # 5% of 100.
    assert found[Label.FAST] + found[Label.SLOW] <= 5
    assert found[Label.INCONCLUSIVE]


def samples(ratio: float, num_rounds: int, jitter: float = 0.001) -> Samples:
    """Rounds without a machine: the candidate takes 1 / ratio, up and down by the jitter."""
    made = Samples()
    for index in range(num_rounds):
        wobble = 1 + jitter * (index % 3 - 1)
        made.rounds.append((1.0, wobble / ratio, 1 / ratio, 1.0))
        made.reference.append((0.01, 0.01))
    return made


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.016, 1.2, Label.FAST),
        (1.01, 1.2, Label.INCONCLUSIVE),
        (0.99, 1.01, Label.SAME),
        (1.002, 1.012, Label.SAME),
        (0.9, 1.1, Label.INCONCLUSIVE),
        (0.9, 0.984, Label.SLOW),
        (0.9, 0.99, Label.INCONCLUSIVE),
    ],
)
def test_the_margin_divides_the_line(low, high, expected):
    assert label(low, high, margin=0.015) is expected


def test_speedup_is_baseline_over_candidate():
    found = judge(samples(1.25, 20))
    assert found.label is Label.FAST
    # The jitter of 1 in 1000 is shared out over two samples.
    assert found.steady.speedup == pytest.approx(1.25, rel=1e-3)
    assert found.steady.low <= found.steady.speedup <= found.steady.high


def test_few_rounds_never_convict():
    assert judge(samples(0.5, 5)).label is Label.INCONCLUSIVE
    assert judge(samples(0.5, 6)).label is Label.SLOW


def test_graphs_that_were_compiled_meanwhile_make_it_inconclusive():
    made = samples(1.25, 20)
    made.num_recompiles = 2
    found = judge(made)
    assert found.label is Label.INCONCLUSIVE
    assert "2 graphs were compiled" in found.reasons[0]


def test_wrong_results_are_invalid_whatever_the_speed():
    found = judge(samples(2.0, 20), ["output 0: relative error 1"])
    assert (found.label, found.reasons) == (Label.INVALID, ("output 0: relative error 1",))
    assert judge(Samples(), ["not timed"]).steady is None


def heated(speedup_cold: float, speedup_hot: float) -> Verdict:
    """20 rounds on a cold machine, then 40 on one that is 15% slower."""
    made = samples(speedup_cold, 20)
    hot = samples(speedup_hot, 40)
    made.rounds += [tuple(1.15 * t for t in sampled) for sampled in hot.rounds]
    made.reference += [(0.0115, 0.0115)] * 40
    return judge(made)


def test_burst_and_steady_state_are_apart_and_steady_decides():
    found = heated(1.2, 1.0)
    assert found.label is Label.SAME
    assert (found.burst.num_rounds, found.steady.num_rounds) == (20, 40)
    assert found.burst.speedup == pytest.approx(1.2, rel=1e-3)  # the jitter, as above
    assert found.steady.reference_s / found.burst.reference_s == pytest.approx(1.15)


def test_a_steady_drift_cancels():
    made = compare(Machine(drift=0.01), STEP, STEP)
    found = judge(made)
    # Each sample is off by 1 part in 1000 from its neighbour, in turn up and down.
    assert found.steady.speedup == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("label, code", [("FAST", 0), ("SAME", 0), ("SLOW", 1), ("INVALID", 1),
                                         ("INCONCLUSIVE", 3)])  # fmt: skip
def test_exit_codes(label, code):
    assert Label(label).exit_code == code
