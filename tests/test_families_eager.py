"""The tiny families are what the other tests take them for, and the judge of accuracy judges."""

import pytest
import torch

from tests.families import FAMILIES, Family
from tests.numerics import assert_as_accurate, inaccuracy, relative_l2, run, truth

# The last block's text stream does not reach the output of these models.
UNREACHED = ("transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.txt_mlp")
# Their text queries come after the last use of text: the gradient is zero.
DISCARDED = ("attn.add_q_proj", "attn.norm_added_q")


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES.keys())
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


@pytest.mark.parametrize(("batch", "size"), [(2, 0), (1, 3)])
def test_every_parameter_counts(family: Family, batch: int, size: int) -> None:
    model = family.build()
    for name, gradient in run(model, family.inputs(batch, size, torch.float32)).items():
        if gradient is None:
            assert any(part in name for part in UNREACHED), name
        elif not gradient.any():
            assert any(part in name for part in DISCARDED), name
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.std() > 0.01, f"{name} is constant"


def test_build_and_inputs_are_deterministic(family: Family) -> None:
    first = run(family.build(), family.inputs(2, 1, torch.float32))
    torch.rand(1)
    second = run(family.build(), family.inputs(2, 1, torch.float32))
    assert all(t is None or torch.equal(t, second[name]) for name, t in first.items())


def test_sizes_differ(family: Family) -> None:
    shapes = [
        [getattr(leaf, "shape", leaf) for leaf in torch.utils._pytree.tree_leaves(inputs)]
        for inputs in (family.inputs(2, size, torch.float32) for size in range(20))
    ]
    assert all(shapes.count(shape) == 1 for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_truth_tells_a_small_fault_from_rounding(family: Family, dtype: torch.dtype) -> None:
    inputs = family.inputs(2, 0, dtype)
    model = family.build().to(dtype)
    eager, exact = run(model, inputs), truth(model, inputs)
    assert_as_accurate(eager, eager, exact, what=family.name)

    roundoff = torch.finfo(dtype).eps / 2
    for name, tensor in eager.items():
        if tensor is not None and tensor.any():
            # A scale error of d leaves at least d - e, which exceeds the bound of 2e + roundoff
            # also after the last rounding.
            d = 4 * relative_l2(tensor, exact[name]) + 4 * roundoff
            assert inaccuracy([((tensor * (1 + d)).to(dtype), tensor, exact[name])]), name


def test_a_missing_gradient_fails() -> None:
    tensor = torch.ones(3)
    with pytest.raises(AssertionError, match="None in"):
        assert_as_accurate({"g": None}, {"g": tensor}, {"g": tensor.double()})


def test_a_nan_fails() -> None:
    tensor = torch.ones(3)
    with pytest.raises(AssertionError, match="error nan"):
        assert_as_accurate(tensor * torch.nan, tensor, tensor.double())


def test_both_spellings_of_attention_have_one_truth() -> None:
    """The fp32 softmax of the eager spelling is promoted; else they would part at 1e-7."""
    pair = [FAMILIES["qwen3-eager"], FAMILIES["qwen3-sdpa"]]
    eager, sdpa = (truth(f.build(), f.inputs(2, 0, torch.float32)) for f in pair)
    for name, expected in eager.items():
        # 1e-12: float64 rounding through two layers; gradients are of order one.
        torch.testing.assert_close(sdpa[name], expected, rtol=1e-9, atol=1e-12)
