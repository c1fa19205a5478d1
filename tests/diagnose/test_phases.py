"""Phases, overlap, gaps and kinds on traces whose answer is known by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxopt.diagnose import intervals, kinds
from fxopt.diagnose.phases import NUM_BINS, PHASES, Step, steps
from fxopt.diagnose.trace import Columns, read
from fxopt.diagnose.work import self_time
from tests.diagnose.traces import AUTOGRAD, COMM_STREAM, Written

MS = 1e-3


@pytest.fixture
def analysed(tmp_path):
    def run(written: Written) -> Step:
        (step,) = steps(read(written.to(tmp_path / "trace.json")))
        return step

    return run


def walls(step: Step) -> dict[str, float]:
    """Milliseconds of the phases that have any."""
    found = {name: round(1e3 * phase.wall, 6) for name, phase in step.phases.items()}
    return {name: wall for name, wall in found.items() if wall}


def test_phases_of_a_host_alone(analysed):
    step = analysed(
        Written()
        .step(0, 100)
        .phase("data wait", 0, 10)
        .phase("forward", 10, 40)
        .phase("encoders", 12, 18)
        .phase("backward", 40, 70)
        .phase("optimizer", 70, 80)
        .phase("logging", 95, 120)
    )
    assert walls(step) == {
        **{"data wait": 10, "forward": 24, "encoders": 6, "backward": 30, "optimizer": 10},
        **{"logging": 5, "unaccounted": 15},
    }
    assert list(step.phases) == list(PHASES)
    assert not step.gaps


def test_a_host_that_waits_in_a_collective_is_exposed(analysed):
    step = analysed(
        Written()
        .step(0, 100)
        .phase("backward", 0, 80)
        .op("aten::mm", 0, 40)
        .add("user_annotation", "gloo:all_reduce", 30, 70, place=AUTOGRAD)
        .op("c10d::wait_tensor", 50, 75)
        .phase("logging", 72, 75)
    )
    # From the end of the product to the end of the wait, but for a message in between.
    assert walls(step) == {
        **{"backward": 45, "exposed communication": 32, "logging": 3, "unaccounted": 20}
    }
    assert (step.communication, step.overlapped) == (pytest.approx(32 * MS), 0)


def test_kernels_belong_to_the_phase_that_launched_them(analysed):
    step = analysed(
        Written()
        .step(0, 100)
        .phase("forward", 0, 10)
        .phase("backward", 10, 20)
        .phase("data wait", 90, 100)
        .kernel("sm90_xmma_gemm_bf16bf16", 5, 5, 40)
        .kernel("triton_poi_fused_add", 12, 40, 70, thread=AUTOGRAD)
        .kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 15, 60, 90, stream=COMM_STREAM)
    )
    # The device is idle for 5 ms while the host is in forward, and for 10 in data wait.
    assert walls(step) == {
        **{"forward": 40, "backward": 30, "exposed communication": 20, "data wait": 10}
    }
    assert step.phases["forward"].device == pytest.approx(35 * MS)
    assert step.phases["forward"].host == pytest.approx(10 * MS)
    assert step.phases["forward"].idle == pytest.approx(5 * MS)
    assert step.communication == pytest.approx(30 * MS)
    assert step.overlapped == pytest.approx(10 * MS)
    assert step.gaps == pytest.approx([10 * MS, 5 * MS])
    assert step.kinds == pytest.approx(
        {"GEMM bf16": 35 * MS, "glue": 30 * MS, "communication": 30 * MS}
    )
    assert step.phases["forward"].kinds == pytest.approx({"GEMM bf16": 35 * MS})
    assert step.phases["backward"].kinds == pytest.approx(
        {"glue": 30 * MS, "communication": 30 * MS}
    )
    assert step.top[0] == ("sm90_xmma_gemm_bf16bf16", pytest.approx(35 * MS), 1)
    assert step.timeline == [
        ("forward", pytest.approx(0.4)),
        ("backward", pytest.approx(0.3)),
        ("exposed communication", pytest.approx(0.2)),
        ("data wait", pytest.approx(0.1)),
    ]


def test_streams_that_compute_at_once_count_once(analysed):
    step = analysed(
        Written()
        .step(0, 50)
        .phase("forward", 0, 50)
        .kernel("a", 1, 10, 30)
        .kernel("b", 2, 20, 40, stream=8)
    )
    assert walls(step) == {"forward": 50}
    assert step.phases["forward"].device == pytest.approx(30 * MS)
    assert step.phases["forward"].idle == pytest.approx(20 * MS)
    assert step.kinds["glue"] == pytest.approx(40 * MS)  # sums of kernels, not of the clock


def test_a_copy_to_the_device_counts_where_no_kernel_hides_it(analysed):
    copy = "Memcpy HtoD (Pinned -> Device)"
    written = Written().step(0, 60).phase("forward", 0, 60).kernel("gemm_bf16", 1, 20, 50)
    written.add("gpu_memcpy", copy, 10, 30, place=9, correlation=0)
    written.add("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 50, 55, place=7, correlation=0)
    step = analysed(written)
    # Idle from 0 to 10 and from 55 on, while the host is in forward.
    assert walls(step) == {"host-to-device": 10, "forward": 50}
    assert step.phases["host-to-device"].device == pytest.approx(20 * MS)
    assert step.phases["forward"].idle == pytest.approx(15 * MS)
    assert step.kinds == pytest.approx({"GEMM bf16": 30 * MS, "copies": 25 * MS})


def test_steps_are_apart_and_a_kernel_may_run_over_the_end(analysed, tmp_path):
    written = Written().step(0, 10, 0).step(10, 20, 1).phase("forward", 0, 10).kernel("k", 2, 5, 15)
    first, second = steps(read(written.to(tmp_path / "t.json")))
    assert walls(first) == {"forward": 10}
    # Launched in the step before, by no phase of this one.
    assert walls(second) == {"unaccounted": 10}


def test_compilation_is_apart_from_the_phase_it_interrupts(analysed):
    step = analysed(
        Written()
        .step(0, 30)
        .phase("forward", 0, 20)
        .add("user_annotation", "_compile.compile_inner (dynamo_timed)", 5, 15)
    )
    assert walls(step) == {"forward": 10, "compilation": 10, "unaccounted": 10}


def test_glue_of_a_part_is_what_its_forward_launched(analysed):
    written = Written().step(0, 100).phase("forward", 0, 30).phase("backward", 30, 60)
    written.add("user_annotation", "fxopt.in blocks.0", 0, 10)
    written.add("user_annotation", "fxopt.in blocks.1", 10, 30)
    written.kernel("elementwise", 2, 40, 47).kernel("gemm_bf16", 3, 47, 50)
    written.kernel("norm", 9, 50, 55).kernel("norm", 12, 55, 60).kernel("norm", 35, 60, 70)
    assert analysed(written).glue == {
        "blocks.0": (pytest.approx(12 * MS), 2),
        "blocks.1": (pytest.approx(5 * MS), 1),
    }


def test_without_a_device_ops_belong_to_the_phase_they_began_in(analysed):
    step = analysed(
        Written()
        .step(0, 30)
        .phase("forward", 0, 10)
        .phase("backward", 10, 30)
        .op("aten::linear", 0, 10)
        .op("aten::addmm|float", 2, 8)
        .op("aten::mm|float", 12, 20, place=AUTOGRAD)
    )
    assert step.phases["forward"].kinds == pytest.approx({"GEMM fp32": 6 * MS, "glue": 4 * MS})
    assert step.phases["backward"].kinds == pytest.approx({"GEMM fp32": 8 * MS})


def test_time_in_which_the_allocator_asks_the_device(analysed):
    written = Written().step(0, 50).phase("forward", 0, 50).kernel("k", 1, 10, 30)
    written.add("cuda_runtime", "cudaMalloc", 5, 8).add("cuda_runtime", "cudaFree", 7, 12)
    written.add("cuda_runtime", "cudaMallocAsync", 48, 60)
    assert analysed(written).allocating == pytest.approx(9 * MS)


def test_a_timeline_shows_what_takes_most_of_each_part(analysed):
    written = Written().step(0, NUM_BINS).phase("forward", 0, NUM_BINS)
    written.phase("logging", 10, 10.4).phase("logging", 20, 20.6).phase("data wait", 100, 200)
    parts = [(name, round(NUM_BINS * part)) for name, part in analysed(written).timeline]
    assert parts == [
        *(("forward", 20), ("logging", 1), ("forward", 79)),
        *(("data wait", 100), ("forward", NUM_BINS - 200)),
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ncclKernel_AllReduce_RING_LL_Sum_float(ncclDevComm*)", "communication"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgs)", "communication"),
        ("some_renamed_kernel|collective", "communication"),
        ("Memcpy HtoD (Pinned -> Device)|copy", "copies"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        ("cutlass_80_tensorop_bf16_s16816gemm_bf16_128x64", "GEMM bf16"),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTT", "GEMM other"),
        ("sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn_n", "GEMM fp8"),
        ("aten::addmm|float", "GEMM fp32"),
        ("aten::mm|c10::BFloat16", "GEMM bf16"),
        ("quantize_rowwise_fp8", "quantisation"),
        ("triton_red_fused_native_layer_norm_3", "glue"),
        ("triton_poi_fused__scaled_dot_product_flash_attention_clone_3", "glue"),
        ("triton_poi_fused_convert_element_type_1", "glue"),
        ("triton_red_fused__to_copy_abs_amax_2", "quantisation"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("triton_tem_fused_addmm_4", "GEMM other"),
    ],
)
def test_kinds(name, expected):
    assert kinds.kind(name) == expected


def test_time_inside_callees_counts_once():
    # One op with two callees, one of which calls again; and an op on another thread.
    spans = np.array([[0, 10], [1, 4], [5, 9], [6, 8], [2, 7]])
    places = np.array([0, 0, 0, 0, 1])
    none = np.zeros(5, dtype=int)
    assert self_time(Columns(spans, none, places, none)).tolist() == [3, 3, 2, 2, 5]


spans = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 15)), max_size=8)


def as_set(found: np.ndarray) -> set[int]:
    return {instant for start, end in found for instant in range(int(start), int(end))}


def as_intervals(drawn: list[tuple[int, int]]) -> np.ndarray:
    return np.array([(a, a + n) for a, n in drawn], dtype=np.int64).reshape(-1, 2)


@given(spans, spans)
def test_interval_sets_are_sets(first, second):
    a, b = (intervals.union(as_intervals(drawn)) for drawn in (first, second))
    assert as_set(a) == as_set(as_intervals(first))
    assert as_set(intervals.intersection(a, b)) == as_set(a) & as_set(b)
    assert as_set(intervals.difference(a, b)) == as_set(a) - as_set(b)
    # A whole number of nanoseconds, as seconds.
    assert intervals.seconds(a) == pytest.approx(1e-9 * len(as_set(a)))
    assert as_set(intervals.joined([a, b])) == as_set(a) | as_set(b)


@settings(max_examples=40)
@given(spans, spans, spans)
def test_phases_always_add_up(tmp_path_factory, phases, computing, communicating):
    written = Written().step(0, 50)
    for index, (start, length) in enumerate(phases):
        written.phase(PHASES[index % 5], start, start + length)
    for start, length in computing:
        written.kernel("k", max(0, start - 3), start, start + length)
    for start, length in communicating:
        written.kernel("ncclKernel", start, start, start + length, stream=COMM_STREAM)
    (step,) = steps(read(written.to(tmp_path_factory.mktemp("t") / "trace.json")))
    # Sums of some dozen times in seconds.
    assert sum(phase.wall for phase in step.phases.values()) == pytest.approx(0.05, abs=1e-12)
    assert all(phase.wall >= 0 for phase in step.phases.values())
