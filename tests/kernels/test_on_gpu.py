"""The Triton providers on a CUDA device, against float64 references on the same inputs."""

import itertools
from functools import partial

import pytest
import torch

from fxopt.kernels import gated_activation, linear_cross_entropy, norm_modulate, qk_norm_rope
from fxopt.kernels.attention import attention
from fxopt.kernels.norm_modulate_linears import norm_modulate_linears_streams
from tests.numerics import assert_as_accurate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [24, 64, 1536, 3072, 5120]


def leaves(*shapes, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    return [
        torch.randn(s, device="cuda", dtype=torch.float32, generator=generator)
        .to(dtype)
        .requires_grad_()
        if s
        else None
        for s in shapes
    ]


def values_and_gradients(function, inputs):
    given = [t for t in inputs if t is not None and t.requires_grad]
    outputs = [o for o in function(*inputs) if o.requires_grad]
    generator = torch.Generator("cuda").manual_seed(1)
    seeds = [torch.randn(o.shape, device="cuda", generator=generator).to(o.dtype) for o in outputs]
    return [o.detach() for o in outputs] + list(torch.autograd.grad(outputs, given, seeds))


def check(op, reference, inputs, dtype):
    """The op is at most twice as far from float64 as its reference run in the model's dtype."""
    doubled = [
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in inputs
    ]
    exact = values_and_gradients(lambda *a: reference(torch.float64, *a), doubled)
    plain = values_and_gradients(lambda *a: reference(dtype, *a), inputs)
    ours = values_and_gradients(op, inputs)
    for i, (a, e, t) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_as_accurate(a, e, t, what=f"tensor {i}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_modulate(norm, width, dtype):
    for gated, affine, modulated in itertools.product([False, True], repeat=3):
        if not (gated or affine or modulated):
            continue
        rows = (2, 37, width)
        inputs = leaves(
            rows,
            rows if gated else None,
            (2, 1, width) if gated else None,
            (width,) if affine else None,
            (width,) if affine else None,
            (2, 1, width) if modulated else None,
            (2, 1, width) if modulated else None,
            (width,) if gated else None,
            dtype=dtype,
        )

        def op(*tensors, gated=gated):
            y, h, *_ = norm_modulate.norm_modulate(*tensors, norm, 1e-6, 0.0, 1.0, dtype, dtype)
            return (y, h) if gated else (y,)

        def reference(to, *tensors, gated=gated):
            y, h = norm_modulate.reference(*tensors, norm, 1e-6, 0.0, 1.0, to, to)
            return (y, h) if gated else (y,)

        check(op, reference, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_of_one_value_has_no_variance(width, dtype):
    x = torch.full((3, width), 1000.0, device="cuda", dtype=dtype)
    settings = "layer", 1e-6, 0.0, 0.0, dtype, dtype
    y, *_ = norm_modulate.norm_modulate(x, *[None] * 7, *settings)
    assert y.eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1536, 5120])
def test_norm_modulate_streams(width, dtype):
    """Two streams of other lengths, gated and not, in the node that their linears share."""
    per_stream = [None, None, (2, 1, width), (2, 1, width), None]
    inputs = leaves(
        *((2, n, width) for n in (37, 5)), (2, 37, width), None, (2, 1, width), None,
        *(shape for shape in per_stream for _ in range(2)), (8, width), (8, width),
        dtype=dtype,
    )  # fmt: skip

    def op(*tensors):
        fields = [list(tensors[i : i + 2]) for i in range(0, 16, 2)]
        numbers = [1e-6, 1e-5], [0.0, 0.0], [1.0, 0.0]
        outs, hs = norm_modulate_linears_streams(
            *fields, "layer", *numbers, dtype, dtype,
            list(tensors[16:]), [None, None], [1, 1], [0, 0, 8, 0, 0, 8], [1, 1],
        )  # fmt: skip
        return (*outs, hs[0])

    def reference(to, *tensors):
        outs, hs = [], []
        for i, (eps, offset) in enumerate(((1e-6, 1.0), (1e-5, 0.0))):
            operands, weight = tensors[i:16:2], tensors[16 + i]
            y, h = norm_modulate.reference(*operands, "layer", eps, 0.0, offset, to, to)
            outs.append(torch.nn.functional.linear(y, weight))
            hs.append(h)
        return (*outs, hs[0])

    check(op, reference, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rotation", "form", "width"),
    [
        ("none", "channels", 128),
        *((kind, "channels", width) for kind in ("interleaved", "half") for width in (128, 32)),
        *((kind, "matrices", 64) for kind in ("interleaved", "half")),
    ],
)
@pytest.mark.parametrize("across_heads", [False, True])
def test_qk_norm_rope(across_heads, rotation, form, width, dtype):
    heads, dim = (24, 24, 8, 8), 128  # two sections of queries, two of keys
    tokens, joined = (19, 33, 19, 33), [2, 2]
    widths = [h * dim if across_heads else dim for h in heads]
    inputs = leaves(
        *((2, n, h, dim) for n, h in zip(tokens, heads, strict=True)),
        *((h * dim,) for h in heads),
        *((w,) for w in widths),
        dtype=dtype,
    )
    tables = [[torch.randn(1, 52, 1, width, device="cuda")] * 4 for _ in range(2)]
    settings = (joined, "rms", [1e-6] * 4, 0.0, across_heads, rotation, form, "all")

    def arguments(*tensors):
        return tensors[:4], tensors[4:8], tensors[8:], [None] * 4, *tables, *settings

    def op(*tensors):
        return tuple(qk_norm_rope.qk_norm_rope(*arguments(*tensors), dtype)[:2])

    def reference(to, *tensors):
        return tuple(qk_norm_rope.reference(*arguments(*tensors), to))

    check(op, reference, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packing", ["none", "gate_up", "up_gate"])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "silu"])
def test_gated_activation(activation, packing, dtype):
    (gate,) = leaves((2, 37, 3072), dtype=dtype)

    def op(gate):
        return (gated_activation.gated_activation(gate, None, activation, packing),)

    def reference(_, gate):
        return (gated_activation.reference(gate, None, activation, packing),)

    check(op, reference, [gate], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_logits", [1000, 50257, 128256])
def test_linear_cross_entropy(num_logits, dtype):
    num_tokens = linear_cross_entropy.CHUNK + 77
    inputs = leaves((num_tokens, 64), (num_logits, 64), (num_logits,), dtype=dtype)
    generator = torch.Generator("cuda").manual_seed(0)
    target = torch.randint(num_logits, (num_tokens,), device="cuda", generator=generator)
    target[::7] = -100

    def op(*tensors):
        return (linear_cross_entropy.linear_cross_entropy(*tensors, target, -100, "mean"),)

    def reference(to, *tensors):
        return (linear_cross_entropy.reference(*tensors, target, -100, "mean"),)

    check(op, reference, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_attention_on_packed_keys(kv_heads, dtype):
    """Padding inside, in front, at the end, nowhere and everywhere; the host waits for nothing."""
    inputs = leaves((5, 8, 300, 64), *[(5, kv_heads, 333, 64)] * 2, dtype=dtype)
    keys = torch.arange(333, device="cuda")
    mask = torch.stack([keys % 3 > 0, keys > 200, keys < 77, keys >= 0, keys < 0])[:, None, None]
    options = (mask, 0.0, False, None, kv_heads < 8, None)

    def op(*tensors):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return (attention(*tensors, *options, "varlen"),)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def reference(to, *tensors):
        return (attention(*tensors, *options, "math"),)

    check(op, reference, inputs, dtype)


MASKS = {
    "none": lambda i, j: None,
    "window": lambda i, j: (j <= i) & (i - j <= 40),
    "window on both sides": lambda i, j: (i - j).abs() <= 25,
    "segments": lambda i, j: i // 70 == j // 70,
    "added": lambda i, j: -0.01 * (i - j).abs().bfloat16(),
}
WINDOWS = {"window": [40, 0], "window on both sides": [25, 25]}


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize(
    ("name", "asked"),
    [*itertools.product(MASKS, ["flex"]), *itertools.product(["none", *WINDOWS], ["varlen"])],
)
def test_attention_by_masks_as_functions(name, asked, kv_heads):
    """A window is told to both; of masks of other kinds FlexAttention reads the elements."""
    window = WINDOWS.get(name)
    inputs = leaves((3, 8, 333, 64), *[(3, kv_heads, 333, 64)] * 2, dtype=torch.bfloat16)
    positions = torch.arange(333, device="cuda")
    mask = MASKS[name](positions[:, None], positions)

    def run(asked, *tensors):
        given = mask if mask is None or mask.dtype == torch.bool else mask.to(tensors[0].dtype)
        return (attention(*tensors, given, 0.0, False, None, kv_heads < 8, window, asked),)

    check(partial(run, asked), lambda to, *tensors: run("math", *tensors), inputs, torch.bfloat16)


def test_backward_is_deterministic():
    inputs = leaves((4, 4608, 3072), None, None, None, None, (4, 1, 3072), (4, 1, 3072),
                    None, dtype=torch.bfloat16)  # fmt: skip

    def op(*tensors):
        settings = ("layer", 1e-6, 0.0, 1.0, torch.bfloat16, torch.bfloat16)
        return norm_modulate.norm_modulate(*tensors, *settings)[:1]

    first, second = (values_and_gradients(op, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
