"""Several calls of an op in one launch: the values of the single calls, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fxopt.kernels import (
    gated_activation_quantized_linear as gated_activation_quantized_linear,  # mixes calls
)
from fxopt.kernels import magnitude_parts
from fxopt.kernels import norm_modulate_segments_quantize as by_segment
from fxopt.kernels import quantize as quantizing
from fxopt.kernels import quantized_producers as producers
from fxopt.kernels import triton_gated_activation_quantize as activation
from fxopt.kernels import triton_norm_modulate_quantize as norm
from fxopt.kernels import triton_quantize_group as group
from fxopt.kernels.quantize_group import quantize_columns, quantize_rows
from fxopt.kernels.registration import LAUNCHES, REREADS, SECOND_FORMS, call_form
from fxopt.kernels.together import SHARED, Ask, answer
from tests.kernels.codes import bits, draw, line
from tests.kernels.interpreted import Interpreted
from tests.kernels.test_quantized_producers import activation_arguments, norm_arguments

FORMATS = [
    ("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
    ("e4m3/row/pow2", "e4m3/row/pow2"),
    ("e5m2/tensor/pow2", "e4m3/row/fp32"),
    ("e4m3/row/fp32", None),
]
OPS = {
    "quantize": quantizing.quantize,
    "norm": producers.norm_modulate_quantize,
    "norm columns": producers.norm_modulate_quantize_columns,
    "norm by segment": by_segment.norm_modulate_segments_quantize,
    "norm by segment columns": by_segment.norm_modulate_segments_quantize_columns,
    "activation": producers.gated_activation_quantize,
    "activation backward": producers.gated_activation_quantize_backward,
}


def seen() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


def norms(rows: str, columns: str | None) -> list[tuple[Any, ...]]:
    """A stream with a residual, affine and a bias, and one of other rows with a modulation."""
    first, second = norm_arguments("residual"), norm_arguments("modulated")
    second[0], second[9:12] = second[0][:, :7], [1e-6, 0.0, 2.0]
    return [(*first, rows, columns), (*second, rows, columns)]


def norms_by_segment(rows: str, columns: str | None) -> list[tuple[Any, ...]]:
    """The first as it is, and the second with a table, negative indices and a shift per token."""
    (first, second), (x, shift) = norms(rows, columns), (draw(2, 7, 40), draw(2, 7, 40, seed=1))
    reading = torch.arange(14).view(2, 7) % 3 - 2, True
    tables = (draw(2, 3, 40, seed=2), shift)
    return [
        (*first[:8], None, False, *first[8:]),
        (x, *second[1:5], *tables, None, *reading, *second[8:]),
    ]


def columns_by_segment(rows: str, columns: str | None) -> list[tuple[Any, ...]]:
    given, found = norms_by_segment(rows, columns), []
    for call in given:
        _, _, amax_t, h, mean, rstd = by_segment.native(*call)
        settings = *call[10:14], call[15], columns, amax_t
        kept = call[0] if call[1] is None else h
        found.append((kept, *call[3:7], *call[8:10], mean, rstd, *settings))
    return found


def calls(name: str, rows: str, columns: str | None) -> list[tuple[Any, ...]]:
    """Calls of other sizes, strides and operands."""
    if name == "quantize":
        xs = [draw(70, 40), draw(140, 80).T, draw(3, 20, 136), torch.zeros(5, 16)]
        return [(x, rows, columns, None, i != 1) for i, x in enumerate(xs)]
    if "by segment" in name:
        columns_too = name.endswith("columns")
        return (columns_by_segment if columns_too else norms_by_segment)(rows, columns)
    if name.startswith("norm"):
        given = norms(rows, columns)
        if name == "norm":
            return given
        found = [producers.native_norm(*call) for call in given]
        kept = [c[0] if c[1] is None else f[3] for c, f in zip(given, found, strict=True)]
        return [
            (h, *c[3:7], *f[4:], *c[8:12], c[13], columns, f[2])
            for h, c, f in zip(kept, given, found, strict=True)
        ]
    first = activation_arguments("silu", "none", True, False)
    second = activation_arguments("silu", "none", True, True)
    second[:3] = [t[:, :5] for t in second[:3]]
    given = [(*first, rows, columns), (*second, rows, columns)]
    if name == "activation":
        return given
    amax_t = [producers.native_activation(*call)[2] for call in given]
    return [
        (draw(*c[0].shape, seed=7), *c[:5], columns, a) for c, a in zip(given, amax_t, strict=True)
    ]


def cases() -> list[tuple[str, str, str, str | None]]:
    """Op, its lines, and how it quantizes."""
    found = []
    for name in OPS:
        transposes = name.endswith(("columns", "backward"))
        each = [("no", *formats) for formats in FORMATS[: 3 if transposes else 4]]
        each += [("counted", *formats) for formats in FORMATS[:2]]
        # Delayed scaling has one scale for a tensor.
        each += [("known", "e4m3/tensor/fp32", "e4m3/tensor/fp32" if transposes else None)]
        found += [(name, *case) for case in each]
    return found


def lines_of(name: str, is_known: bool) -> tuple[Any, ...]:
    """A line for each copy; where the op takes them, a magnitude and where to record one."""
    known = torch.tensor([1.5]) if is_known else None
    return {
        "quantize": (line(), line(), known, seen() if is_known else None),
        "norm columns": (line(),),
        "norm by segment columns": (line(),),
        "activation backward": (line(),),
    }.get(name, (line(), known, seen() if is_known else None))


def assert_same(found: Any, expected: Any) -> None:
    for f, e in zip(found, expected, strict=True):
        assert f.shape == e.shape and f.dtype == e.dtype and torch.equal(bits(f), bits(e))


def assert_answers(asks: list[Ask]) -> None:
    """What is asked together has the bits of each op alone."""
    for ask, found in zip(asks, answer(asks), strict=True):
        assert_same(tree_leaves(found), tree_leaves(ask.op(*ask.args)))


@pytest.mark.parametrize("name, lines, rows, columns", cases())
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_values_are_those_of_single_calls(
    provider: str, name: str, lines: str, rows: str, columns: str | None
) -> None:
    op, own = OPS[name], calls(name, rows, columns)
    given = [() if lines == "no" else lines_of(name, lines == "known") for _ in own]
    again = [() if lines == "no" else lines_of(name, lines == "known") for _ in own]
    with Interpreted(provider == "triton"):
        found = answer([Ask(op, c, more) for c, more in zip(own, given, strict=True)])
        alone = [call_form(op, more, *c) for c, more in zip(own, again, strict=True)]
    for f, e in zip(found, alone, strict=True):
        assert_same(f, e)
    for f, e in zip(given, again, strict=True):
        assert_same([t for t in f if t is not None], [t for t in e if t is not None])


@pytest.mark.parametrize("name", OPS)
def test_an_empty_stream(name: str) -> None:
    first, *_, second = calls(name, *FORMATS[0])
    # What has a dim for each token; statistics are of all tokens.
    empty = [a[:0] if isinstance(a, Tensor) and a.dim() > 1 else a for a in second]
    with Interpreted():
        assert_answers([Ask(OPS[name], call) for call in (first, tuple(empty))])


class Launched(Interpreted):
    """Collects the launches of Triton kernels and of ATen's reductions, and what was called."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.called: list[tuple[str, Any]] = []
        for module in (norm.kernels, activation, group):
            for name in ("rows_kernel", "tiles_kernel", "amax_kernel", "cast_kernel"):
                self.count(patch, module, name)
        self.count(patch, activation, "backward_kernel")

    def count(self, patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        kernel, launches = getattr(module, name, None), self.launches

        class Counting:
            def __getitem__(self, grid: Any) -> Any:
                launches.append(name)
                return kernel[grid]

        patch.setattr(module, name, Counting(), raising=False)

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "fxopt":
            self.called.append((op._schema.name, args))
        with Reductions(self.launches):
            return super().__torch_dispatch__(op, types, args, kwargs)


class Reductions(TorchDispatchMode):
    def __init__(self, launches: list[str]) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += ["amax"] * (op is torch.ops.aten.amax.default)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("is_large", [False, True])
def test_launches_are_those_of_the_provider(
    is_large: bool, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:
        monkeypatch.setattr(magnitude_parts, "MOST_LINES", 1)
        monkeypatch.setattr(magnitude_parts, "MOST_TILES", 1)
    for rows, columns in FORMATS[:3]:
        own = calls(name, rows, columns)
        with monkeypatch.context() as patch, Launched(patch) as mode:
            answer([Ask(OPS[name], call) for call in own])
        ((called, args),) = mode.called
        assert called == f"{OPS[name]._schema.name}_together"
        assert LAUNCHES[called](*args) == len(mode.launches)


def called(asks: list[Ask]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch, Launched(patch) as mode:
        answer(asks)
    return [op.removeprefix("fxopt::") for op, _ in mode.called]


def test_calls_of_other_kinds_run_apart() -> None:
    x, wide, op = draw(20, 32), draw(20, 48), quantizing.quantize
    plain, other = (x, *FORMATS[0], None, True), (wide, *FORMATS[0], None, False)
    assert called([Ask(op, plain), Ask(op, other)]) == ["quantize_together"]
    assert called([Ask(op, plain)]) == ["quantize"]
    known = None, None, torch.ones(1), seen()
    assert called([Ask(op, plain), Ask(op, plain, known)]) == ["quantize", "quantize_counting"]
    emulated = (x, "e4m3/1x32/e8m0", None, None, False)
    assert called([Ask(op, emulated), Ask(op, emulated)]) == ["quantize"] * 2
    (norm, _), rows = norms(*FORMATS[0]), producers.norm_modulate_quantize
    narrow = [a[..., :32] if isinstance(a, Tensor) else a for a in norm]
    assert called([Ask(rows, norm), Ask(rows, tuple(narrow))]) == ["norm_modulate_quantize"] * 2


@pytest.mark.parametrize("provider", ["native", "triton"])
def test_casts_of_other_formats_run_in_one_launch(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, others, pieces = draw(70, 40), [draw(20, 32), draw(9, 64)], [draw(33, 24), draw(33, 150)]
    amax_t = {name: [producers.amax_for(o, name) for o in others] for _, name in FORMATS[:2]}
    asks = [
        Ask(quantizing.quantize, (x, *FORMATS[0], None, True)),
        Ask(quantizing.quantize, (x, FORMATS[1][0], None, None, False), (None,) * 4),
        Ask(quantizing.quantize_pieces, (pieces, *FORMATS[2], None, True)),
        *(Ask(quantize_columns, (others, *given), (None,)) for given in amax_t.items()),
    ]
    with Interpreted(provider == "triton"):
        assert_answers(asks)
    assert called(asks) == ["quantize_mixed"]
    with monkeypatch.context() as patch, Launched(patch) as mode:
        answer(asks)
    ((name, args),) = mode.called
    assert mode.launches == ["amax_kernel", "cast_kernel"] and LAUNCHES[name](*args) == 2
    assert [x.shape for x in REREADS[name](args, None)] == [x.shape, x.shape, (33, 24), (33, 150)]
    with Launched(monkeypatch) as mode:
        answer(asks[3:])
    assert mode.launches == ["cast_kernel"]
    checks = ("test_faketensor", "test_autograd_registration")  # as below
    torch.library.opcheck(torch.ops.fxopt.quantize_mixed.default, args, test_utils=checks)


@pytest.mark.parametrize("rows, columns", FORMATS)
@pytest.mark.parametrize("provider", ["native", "triton"])
def test_activations_and_weights_are_cast_in_the_same_launches(
    provider: str, rows: str, columns: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    activations = [Ask(OPS["activation"], call) for call in calls("activation", rows, columns)]
    each = [draw(33, 24), draw(40, 200)], [draw(70, 16)]
    weights = [Ask(quantize_rows, (list(own), *FORMATS[1]), (None,) * 3) for own in each]
    # In an order in which streams would not ask.
    asks = [weights[0], *activations, weights[1]]
    with Interpreted(provider == "triton"):
        assert_answers(asks)
    with Launched(monkeypatch) as mode:
        answer(asks)
    ((name, args),) = mode.called
    assert name == "fxopt::gated_activation_quantize_with_weights"
    assert mode.launches == ["amax_kernel", "cast_kernel"] and LAUNCHES[name](*args) == 2
    assert len(REREADS[name](args, None)) == 8
    checks = ("test_faketensor", "test_autograd_registration")  # as below
    overload = torch.ops.fxopt.gated_activation_quantize_with_weights.default
    torch.library.opcheck(overload, args, test_utils=checks)


def test_what_is_of_several_kinds_or_counts_is_not_cast_with_weights() -> None:
    first, second = (Ask(OPS["activation"], call) for call in calls("activation", *FORMATS[0]))
    weights = Ask(quantize_rows, ([draw(33, 24)], *FORMATS[0]))
    alone = ["gated_activation_quantize", "quantize_rows"]
    assert called([first, weights]) == ["gated_activation_quantize_with_weights"]
    in_rows = Ask(quantize_rows, ([draw(33, 24)], *FORMATS[1]))
    assert called([first, weights, in_rows]) == [*alone, "quantize_rows"]
    assert called([weights, in_rows]) == ["quantize_rows"] * 2
    counted = second._replace(lines=(line(), None, None))
    assert sorted(called([counted, weights])) == ["gated_activation_quantize_counting", alone[1]]
    empty = first._replace(args=(*(a[:0] for a in first.args[:2]), *first.args[2:]))
    with Interpreted():
        assert_answers([empty, weights])


def test_what_counts_runs_apart_from_other_formats() -> None:
    x, name = draw(20, 32), FORMATS[0][1]
    columns = Ask(quantize_columns, ([x], name, [torch.ones(1)]))
    plain = Ask(quantizing.quantize, (x, *FORMATS[0], None, False))
    assert called([plain, columns]) == ["quantize_mixed"]
    counted = plain._replace(lines=(line(), line(), None, None))
    assert sorted(called([counted, columns])) == ["quantize_columns", "quantize_counting"]
    pieces = Ask(quantizing.quantize_pieces, ([x, x], *FORMATS[0], None, False))
    lines = [(line(), line(), None, None) for _ in range(2)]
    found = called([pieces._replace(lines=own) for own in lines])
    assert found == ["quantize_pieces_counting"] * 2
    assert all(own[0][0] == own[1][0] == 1 for own in lines)


@pytest.mark.parametrize("name", ["norm", "norm columns"])
@pytest.mark.parametrize("lines", ["no", "counted"])
def test_a_stream_by_segment_runs_with_one_that_is_not(name: str, lines: str) -> None:
    plain, wider = OPS[name], OPS[name.replace("norm", "norm by segment")]
    asks = [
        Ask(op, call, () if lines == "no" else lines_of(name, False))
        for op, call in (
            (plain, calls(name, *FORMATS[1])[0]),
            (wider, calls(name.replace("norm", "norm by segment"), *FORMATS[1])[1]),
        )
    ]
    suffix = "_together" if lines == "no" else "_counting_together"
    assert called(asks) == [f"{wider._schema.name[7:]}{suffix}"]
    for provider in (False, True):
        with Interpreted(provider):
            assert_answers(asks)


def test_lists_are_joined() -> None:
    xs = [draw(20, 32), draw(4, 48), draw(8, 16)]
    asks = [Ask(quantize_rows, (own, *FORMATS[0])) for own in (xs[:1], xs[1:])]
    assert called(asks) == ["quantize_rows"]
    assert_answers(asks)
    amax_t = [answer(asks)[0][2], answer(asks)[1][2]]
    names = [(own, FORMATS[0][1], a) for own, a in zip((xs[:1], xs[1:]), amax_t, strict=True)]
    lines = [([line() for _ in own],) for own, *_ in names]
    asks = [Ask(quantize_columns, n, c) for n, c in zip(names, lines, strict=True)]
    assert called(asks) == ["quantize_columns_counting"]
    assert all(c[0] == 1 for (own,) in lines for c in own)
    assert [len(codes) for codes, _ in answer(asks)] == [1, 2]


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    # Its other checks multiply and compare outputs, which FP8 tensors cannot do.
    checks = ("test_faketensor", "test_autograd_registration")
    own, op = calls(name, *FORMATS[1]), OPS[name]
    for lines in ((), lines_of(name, is_known=False)):
        asks = [Ask(op, call, lines) for call in own]
        with pytest.MonkeyPatch.context() as patch, Launched(patch) as mode:
            answer(asks)
        ((called, args),) = mode.called
        overload = getattr(torch.ops.fxopt, called.removeprefix("fxopt::")).default
        torch.library.opcheck(overload, args, test_utils=checks)
        written = [a.name for a in overload._schema.arguments if a.alias_info]
        assert bool(written) == bool(lines)


def test_every_op_has_both_forms() -> None:
    assert SHARED.keys() >= {*OPS.values(), quantize_rows, quantize_columns}
    for op in OPS.values():
        for form in (op, SECOND_FORMS[op]):
            assert hasattr(torch.ops.fxopt, f"{form._schema.name[7:]}_together")
