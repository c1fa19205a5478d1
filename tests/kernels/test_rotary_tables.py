"""`fxopt::qk_norm_rope`: forms of rotary tables, and tables for a part of a head or of the tokens.

Whole heads and tables with an entry per channel or per pair are in `test_qk_norm_rope`.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from fxopt.kernels import native_qk_norm_rope, triton_qk_norm_rope
from fxopt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_backward, reference
from tests.kernels.test_qk_norm_rope import (
    ACROSS,
    NUM_FIELDS,
    Case,
    assert_triton_matches_native,
    eager,
    fused,
    present,
    results,
    rms_error,
    to_double,
)

ROTATIONS = ["interleaved", "half"]
# Of 24 channels: 12 are half of a head, 6 are an odd number of pairs.
FORMS = [("channels", 0.5), ("channels", 0.25), ("pairs", 0.25), ("matrices", 1.0)]
FORMS += [("matrices", 0.5)]
FORM = pytest.mark.parametrize(("tables", "rotated"), FORMS)
ROTATION = pytest.mark.parametrize("rotation", ROTATIONS)


def call(rotation: str, tables: str, rotated: float, **options) -> Case:
    return Case(rotation=rotation, tables=tables, rotated=rotated, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@FORM
@ROTATION
@ACROSS
def test_error_is_at_most_twice_that_of_eager(across_heads, rotation, tables, rotated, dtype):
    for norm, affine in itertools.product(["rms", "layer", "none"], ["none", "x_bias+weight"]):
        options = {"norm": norm, "affine": affine, "across_heads": across_heads, "dtype": dtype}
        case = call(rotation, tables, rotated, shape=(2, 32, 4, 24), sections="text", **options)
        args, grads = case.args, case.grads
        exact = results(reference, to_double(args), [g.double() for g in grads])
        ours, theirs = results(fused, args, grads), results(eager, args, grads)
        for o, t, e in zip(ours, theirs, exact, strict=True):
            assert o.dtype == dtype and o.shape == e.shape
            # The rule is 2x; half an ulp where eager's few operations are exact by luck.
            half_ulp = torch.finfo(dtype).eps / 2 * e.square().mean().sqrt().item()
            assert rms_error(o, e) <= 2 * max(rms_error(t, e), half_ulp)


@FORM
@ROTATION
@ACROSS
def test_triton_agrees_with_native(across_heads, rotation, tables, rotated):
    # One norm for each parameter set, and all for each value of a parameter.
    norm, sections, affine, dtype = (
        ("rms", "one", "weight", torch.float16),
        ("layer", "two", "x_bias+weight+bias", torch.float32),
        ("none", "text", "x_bias", torch.float32),
    )[(FORMS.index((tables, rotated)) + ROTATIONS.index(rotation) + across_heads) % 3]
    options = {"norm": norm, "affine": affine, "dtype": dtype, "sections": sections}
    case = call(rotation, tables, rotated, across_heads=across_heads, **options)
    case.keys, case.joint_tables = norm == "layer", norm == "rms"
    assert_triton_matches_native(case)


@FORM
@ROTATION
def test_gradcheck(rotation, tables, rotated):
    case = call(rotation, tables, rotated, sections="text", dtype=torch.float64, keys=True)
    args = case.args
    leaves = [t.requires_grad_() for field in args[:4] for t in field if t is not None]
    assert torch.autograd.gradcheck(lambda *_: tuple(fused(*args)), leaves, fast_mode=True)


@pytest.mark.parametrize("rotation, form", itertools.product(ROTATIONS, FORMS[2:]))
def test_opcheck(rotation, form):
    args = call(rotation, *form, affine="x_bias+weight+bias", sections="text").args
    *outs, mean, rstd = native_qk_norm_rope.forward(*args)
    rest = (*args[:NUM_FIELDS], mean, rstd, *args[NUM_FIELDS:], present(args))
    torch.library.opcheck(qk_norm_rope_backward, (outs, *rest))
    for t in (t for field in args[:4] for t in field if t is not None):
        t.requires_grad_()
    torch.library.opcheck(qk_norm_rope, tuple(args))


@ROTATION
def test_channels_beyond_the_tables_go_through(rotation):
    args = call(rotation, "channels", 0.25, norm="none", affine="none").args
    for provider in (native_qk_norm_rope, triton_qk_norm_rope):
        out, *_ = provider.forward(*args)
        assert torch.equal(out[..., 6:], args[0][0][..., 6:])
        assert not torch.equal(out[..., :6], args[0][0][..., :6])


@ROTATION
def test_matrices_that_rotate_are_the_rotation_by_pairs(rotation):
    args = call(rotation, "pairs", 0.5).args
    cos, sin = args[4][0], args[5][0]
    columns = [torch.stack(c, -1).flatten(-2) for c in ((cos, sin), (-sin, cos))]
    same = [*args[:4], *([c] for c in columns), *args[6:-3], "matrices", *args[-2:]]
    for provider in (native_qk_norm_rope, triton_qk_norm_rope):
        assert torch.equal(provider.forward(*same)[0], provider.forward(*args)[0])


def test_columns_are_read_where_they_lie():
    matrices = torch.randn(1, 3, 1, 12, 2, 2)
    args = call("interleaved", "matrices", 1.0).args
    columns = [column.flatten(-2) for column in matrices.unbind(-1)]
    assert all(c.untyped_storage().data_ptr() == matrices.data_ptr() for c in columns)
    args[4:6] = [columns[:1], columns[1:]]
    assert_triton_matches_native(Case(), args, Case().grads)


@pytest.mark.parametrize(("tables", "width"), [("channels", 26), ("pairs", 13), ("channels", 5)])
def test_tables_that_do_not_fit_a_head_are_refused(tables, width):
    args = Case(tables=tables).args
    args[4:6] = [[torch.ones(1, 3, 1, width)]] * 2
    for provider in (native_qk_norm_rope, triton_qk_norm_rope):
        with pytest.raises(ValueError, match=f"tables of {width} entries"):
            provider.forward(*args)


@pytest.mark.parametrize(
    ("rotation", "tables", "rotated", "options"),
    [
        ("half", "channels", 0.25, {"norm": "layer", "affine": "weight+bias", "sections": "text"}),
        ("interleaved", "pairs", 1.0, {"affine": "x_bias+weight", "keys": True}),
        ("half", "matrices", 1.0, {"norm": "none", "affine": "none", "dtype": torch.float16}),
    ],
)
@pytest.mark.parametrize("tokens", ["first", "last"])
def test_tokens_beyond_the_tables_go_through(rotation, tables, rotated, options, tokens):
    case = call(rotation, tables, rotated, tokens=tokens, shape=(2, 5, 2, 24), **options)
    args = case.args
    assert_triton_matches_native(case)
    doubled = to_double(args), [g.double() for g in case.grads]
    for ours, theirs in zip(results(fused, *doubled), results(eager, *doubled), strict=True):
        # diffusers computes norms and rotations in fp32.
        assert (ours - theirs).abs().max() < 1e-5


def test_gradcheck_of_some_tokens():
    options = {"sections": "two", "dtype": torch.float64, "affine": "x_bias+weight+bias"}
    args = call("half", "channels", 0.5, tokens="last", shape=(2, 5, 2, 24), **options).args
    leaves = [t.requires_grad_() for field in args[:4] for t in field if t is not None]
    assert torch.autograd.gradcheck(lambda *_: tuple(fused(*args)), leaves, fast_mode=True)


@pytest.mark.parametrize("function", [reference, native_qk_norm_rope.forward, fused])
def test_tables_of_more_rows_than_tokens_are_refused(function):
    args = Case(tokens="first").args
    args[4:6] = [[torch.ones(1, 4, 1, 24)]] * 2
    with pytest.raises(ValueError, match='tables of 4 rows cannot rotate the tokens "first" of 3'):
        function(*args)
