"""The protocol: order of the calls, end of the warm-up, what a failure leaves, ranks that agree."""

import pytest

from fxopt.diagnose.protocol import WINDOW, Plan, Samples, measure, warm_up
from tests.diagnose.machines import Machine

NEVER = lambda samples: False  # noqa: E731
PLAN = Plan(max_rounds=4, min_warmup=0, warmup_seconds=5)


def run(machine: Machine, plan: Plan = PLAN, before: float = 0.1, after: float = 0.1) -> Samples:
    samples = Samples()
    steps = machine.step("A", before), machine.step("B", after)
    measure(*steps, machine, plan, samples, NEVER)
    return samples


def test_rounds_alternate_a_b_b_a_and_b_a_a_b():
    machine = Machine()
    run(machine)
    assert "".join(machine.calls) == "AB" * (WINDOW + 1) + "ABBABAAB" * 2


def test_every_round_stores_the_baseline_outside():
    samples = run(Machine(), before=0.1, after=0.2)
    for round_ in samples.rounds:
        # What adding to a clock of some seconds rounds away.
        assert round_ == pytest.approx((0.1, 0.2, 0.2, 0.1), rel=1e-9)


def test_short_steps_are_called_several_times_a_sample():
    samples = run(Machine(), before=0.001, after=0.001)
    assert samples.num_calls == 5
    assert samples.rounds[0] == pytest.approx((0.001,) * 4, rel=1e-6)


def test_the_reference_is_timed_around_every_round():
    samples = run(Machine())
    assert len(samples.reference) == len(samples.rounds) == 4
    assert all(pair == pytest.approx((0.002, 0.002)) for pair in samples.reference)


def warmed(machine: Machine, step, plan: Plan = PLAN):
    samples = Samples()
    warm_up(step, machine.step("B", 0.1), machine, plan, samples.warmup)
    return samples.warmup


def test_a_quiet_machine_is_warm_after_one_window():
    machine = Machine(white=0.002)
    found = warmed(machine, machine.step("A", 0.1))
    assert (found.ended, found.num_rounds) == ("evidence", WINDOW + 1)


def changing(machine: Machine, change, num_calls: int = 10):
    """A step that calls `change` in each of its first calls."""
    calls = []

    def step() -> None:
        calls.append(None)
        machine.spend(0.1)
        if len(calls) <= num_calls:
            change()

    return step


def test_recompiles_delay_the_end():
    machine = Machine()

    def compile_once() -> None:
        machine.compiled += 1

    found = warmed(machine, changing(machine, compile_once))
    assert (found.ended, found.num_rounds, found.num_recompiles) == (
        "evidence",
        10 + WINDOW - 1,
        10,
    )


def test_growth_of_the_allocator_delays_the_end():
    machine = Machine()

    def grow() -> None:
        machine.held += 10 << 20

    assert warmed(machine, changing(machine, grow)).num_rounds == 10 + WINDOW - 1


def test_a_change_of_level_delays_the_end():
    machine = Machine()
    slow_start = changing(machine, lambda: machine.spend(0.05), num_calls=WINDOW // 2 + 1)
    # The first window holds as many slow calls as fast ones; later ones forget them.
    found = warmed(machine, slow_start)
    assert found.ended == "evidence"
    assert found.num_rounds > WINDOW + 1


def test_a_warm_up_that_never_settles_ends_at_its_limit():
    machine = Machine()

    def compile_once() -> None:
        machine.compiled += 1

    found = warmed(machine, changing(machine, compile_once, num_calls=10**9))
    assert found.ended == "limit"
    assert found.seconds == pytest.approx(PLAN.warmup_seconds, abs=0.2)  # one round of 0.2 s


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device lost"), KeyboardInterrupt()])
def test_what_was_measured_survives_a_step_that_raises(error):
    machine, samples, calls = Machine(), Samples(), []

    def failing() -> None:
        calls.append(None)
        machine.spend(0.1)
        if len(calls) == 2 * 3 + WINDOW + 1:  # three rounds have passed
            raise error

    plan = Plan(max_rounds=100, min_warmup=0)
    with pytest.raises(type(error)):
        measure(machine.step("A", 0.1), failing, machine, plan, samples, NEVER)
    assert len(samples.rounds) == 2
    assert samples.warmup.ended == "evidence"


def test_all_ranks_take_the_slowest_time_and_stop_together():
    class Slower(Machine):
        """Another rank needs twice as long for everything."""

        def agree(self, values: list[float]) -> list[float]:
            return [2 * value for value in values]

    alone, together = run(Machine()), run(Slower())
    assert together.rounds[0] == pytest.approx([2 * t for t in alone.rounds[0]])
    limited = Plan(seconds=1.0, min_warmup=0)
    assert len(run(Slower(), limited).rounds) == pytest.approx(
        len(run(Machine(), limited).rounds) / 2, abs=1
    )
