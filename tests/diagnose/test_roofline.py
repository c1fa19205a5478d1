"""FLOPs by dtype, frozen modules apart, and the floor below which no time is believed."""

import pytest
import torch
from torch import nn

from fxopt.diagnose import memory, roofline
from fxopt.diagnose.devices import TorchDevice, this_device
from fxopt.diagnose.protocol import Plan, Samples, measure
from fxopt.diagnose.roofline import Flops, Peaks
from fxopt.diagnose.subjects import Subject
from fxopt.diagnose.verdict import is_decided, judge

B, D = 4, 32
PRODUCT = 2 * B * D * D  # FLOPs of one linear


class WithEncoder(nn.Module):
    """A frozen linear, whose result needs no gradient, before a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(D, D).requires_grad_(False)
        self.net = nn.Linear(D, D)

    def forward(self, x):
        return self.net(self.encoder(x))


def stepping(model: nn.Module, x: torch.Tensor) -> Subject:
    return Subject("step", lambda: model(x).float().square().mean().backward(), model)


def test_forward_and_backward_by_dtype():
    x = torch.randn(B, D, dtype=torch.bfloat16, requires_grad=True)
    found = roofline.count(stepping(nn.Linear(D, D, dtype=torch.bfloat16), x))
    # The output, the input's gradient, the weight's gradient.
    assert found == Flops({"bfloat16": 3 * PRODUCT}, {})


def test_frozen_encoders_are_apart():
    found = roofline.count(stepping(WithEncoder(), torch.randn(B, D)))
    # No gradient of the encoder's result is needed.
    assert found == Flops({"float32": 2 * PRODUCT}, {"float32": PRODUCT})


def test_a_frozen_module_that_a_gradient_passes_is_not_an_encoder():
    found = roofline.count(stepping(WithEncoder(), torch.randn(B, D, requires_grad=True)))
    # The frozen linear: forward and the input's gradient. The trained one: also its weight's.
    assert found == Flops({"float32": (2 + 3) * PRODUCT}, {})


def test_the_floor_is_the_slower_of_products_and_bytes():
    flops, peaks = (
        Flops({"bfloat16": 600}, {"float32": 100}),
        Peaks({"bfloat16": 100, "float32": 50}, 10),
    )
    assert flops.seconds(peaks.flops) == 6 + 2
    assert roofline.floor_seconds(flops, peaks) == 8 / roofline.ALLOWANCE
    assert roofline.floor_seconds(flops, peaks, cold_bytes=100) == 10 / roofline.ALLOWANCE
    assert roofline.utilization(flops, peaks, 12.0) == {"bfloat16": 0.5}


def test_a_calibrated_peak_is_one_that_a_product_can_reach():
    device = this_device("cpu")
    peaks = roofline.calibrate(device, {"float32"})
    a, b = torch.randn(2, 512, 512)
    rate = 2 * 512**3 / device.seconds(lambda: a @ b, 5, False)
    # The same product just measured: far from the peak only if other work took the core.
    assert 0.2 * rate < peaks.flops["float32"]
    assert peaks.bandwidth > 1e8  # any machine of this century


def test_a_flushed_call_finds_the_caches_cold():
    device = TorchDevice(torch.device("cpu"))
    touched = torch.randn(1 << 17)  # 512 kB: stays in L2 between warm calls
    cold, warm = (
        min(device.seconds(lambda: touched.sum(), 1, flush) for _ in range(20))
        for flush in (True, False)
    )
    assert cold > warm


def test_saved_and_peak_bytes_of_a_step():
    model, x = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)), torch.randn(B, D)

    def step() -> None:
        model.zero_grad()
        model(x).sum().backward()

    found = memory.measure(Subject("step", step, model), torch.device("cpu"))
    # What the GELU reads, what it writes, and the input, which is not the subject's own here.
    assert found.saved == 3 * B * D * 4
    assert found.peak >= 2 * D * D * 4  # the gradients of both weights live at the end
    assert found.reserved is None


def test_peak_bytes_is_the_allocator_high_water_mark():
    def work():
        first = torch.empty(1_000_000)
        del first
        second = torch.empty(500_000)
        return second + second + second

    # 2 MB for `second`, then two sums of it at once; a few bytes of scalars may come on top.
    assert memory.peak_bytes(work) == pytest.approx(6_000_000, abs=1000)


def training_step() -> Subject:
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256)),
        torch.randn(64, 256),
    )

    def step() -> None:
        model.zero_grad()
        model(x).square().mean().backward()

    return Subject("step", step, model)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_step_against_itself_is_same():
    labels = []
    for _ in range(20):
        samples = Samples()
        plan = Plan(seconds=60)
        measure(training_step(), training_step(), this_device("cpu"), plan, samples, is_decided)
        labels.append(judge(samples).label)
    # 5% of 20 is 1.
    assert labels.count("SAME") >= 19, labels
