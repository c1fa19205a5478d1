"""The launches of every Triton kernel: what `bench.static` compiles and the tests count.

A case is one way in which the blocks of the presets call an op (`bench.calls`,
`bench.quantized_calls`). The provider itself says how its kernels are launched. Under
`torch.device("meta")` nothing but the launches happens; `recorded` keeps them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench.calls import (
    HEAD_DIM,
    gated_activation,
    linear_cross_entropy,
    norm_modulate,
    norm_modulate_segments,
    qk_norm_rope,
    silu_linears,
)
from bench.quantized_calls import (
    activation_with_weights,
    norm_modulate_segments_quantize,
    packed_activation,
    quantize,
    quantize_group,
    quantize_heads,
    quantize_mixed,
    quantize_pieces,
    quantize_together,
    quantized_producers,
    saving,
    sum_parts,
)

MODULATED = "residual gate scale shift"
CAPABILITIES, FP8_CAPABILITIES = (80, 90, 100, 120), (89, 90, 100, 120)


@dataclass(frozen=True)
class Case:
    """One variant of an op.

    Args:
        name: op and variant.
        run: calls the Triton provider for a batch, a number of tokens and a width.
        widths: at which it is compiled.
        capabilities: for which it is compiled.
        num_launches: at least: forward and backward, or two passes.
    """

    name: str
    run: Callable[[int, int, int], None]
    widths: tuple[int, ...]
    capabilities: tuple[int, ...] = CAPABILITIES
    num_launches: int = 2


def _norm_cases() -> Iterator[Case]:
    all_widths, wide = (1536, 3072, 5120), (3072, 5120)
    for variant, widths, options in (
        ("scale shift", all_widths, {}),
        (MODULATED, all_widths, {}),
        (f"{MODULATED} x_bias", (*all_widths, 6144, 8192), {}),
        ("residual scale shift x_bias", wide, {"dtype": torch.float32}),
        ("residual gate weight bias", all_widths, {"dtype": torch.float32}),
        (MODULATED, (3072,), {"per_token": "gate scale shift"}),
        (f"{MODULATED} x_bias", (3072,), {"num_streams": 2}),
        ("residual gate x_bias", wide, {"norm": "none"}),
        ("weight scale", wide, {"norm": "rms"}),
        ("weight scale shift", (3072,), {"norm": "rms", "per_token": "shift"}),
        ("residual weight", wide, {"norm": "rms"}),
    ):
        name = " ".join(["norm_modulate", options.get("norm", "layer"), variant])
        name += ", fp32 operands" if "dtype" in options else ""
        name += f", {options['per_token']} per token" if "per_token" in options else ""
        name += ", two streams" if "num_streams" in options else ""
        yield Case(name, partial(norm_modulate, operands=variant, **options), widths)
    for variant, widths, options in (
        ("scale shift", (3072,), {}),
        (f"{MODULATED} x_bias", wide, {}),
        ("residual gate x_bias", (3072,), {"norm": "none"}),
        ("weight scale", (5376,), {"norm": "rms"}),
        ("weight scale shift", (3072,), {"norm": "rms", "per_token": True}),
    ):
        name = " ".join(["norm_modulate_segments", options.get("norm", "layer"), variant])
        name += ", shift per token" if "per_token" in options else ""
        yield Case(name, partial(norm_modulate_segments, operands=variant, **options), widths)


def _cases() -> Iterator[Case]:
    wide = (3072, 5120)
    yield from _norm_cases()
    for variant, widths, options in (
        ("joint, x_bias", (3072,), {"joint": True, "biased": True}),
        ("views of one projection", wide, {"merged": True}),
        ("complex tables", wide, {"tables": "pairs"}),
        ("joint, no rotation", (3072,), {"joint": True, "rotation": "none"}),
        (
            "across heads, complex tables, x_bias",
            (1536, 5120),
            {"across_heads": True, "tables": "pairs", "biased": True},
        ),
        ("across heads, no rotation", (5120,), {"across_heads": True, "rotation": "none"}),
        ("layer norm", (3072,), {"norm": "layer"}),
        ("half", wide, {"rotation": "half"}),
        ("no norm, half", (3072,), {"norm": "none", "rotation": "half"}),
        ("half, part of a head", (3072,), {"rotation": "half", "rotary_dim": HEAD_DIM // 4}),
        ("matrices", (3072,), {"tables": "matrices"}),
        ("first tokens, x_bias", (3072,), {"rotated": "first", "biased": True}),
    ):
        yield Case(f"qk_norm_rope {variant}", partial(qk_norm_rope, **options), widths)
    for activation, form, biased in (
        *(("gelu_tanh", "none", False), ("gelu_erf", "none", False), ("sigmoid", "none", False)),
        *(("relu", "none", False), ("silu", "up", False), ("silu", "gate_up", False)),
        *(("gelu_tanh", "gate_up", False), ("gelu_tanh", "streams", False)),
        *(("gelu_tanh", "none", True), ("gelu_tanh", "gate_up", True)),
        ("gelu_tanh", "streams", True),
    ):
        words = ("gated_activation", activation, *(form,) * (form != "none"), *("bias",) * biased)
        name = " ".join(words)
        run = partial(gated_activation, activation=activation, form=form, biased=biased)
        yield Case(name, run, (12288,))
    for num_pieces, num_linears in ((3, 1), (6, 2)):
        run = partial(silu_linears, num_pieces=num_pieces, num_linears=num_linears)
        yield Case(f"silu_linears {num_linears} to {num_pieces} parts", run, wide, num_launches=3)
    yield from _fp8_cases()
    yield Case("sum_parts", sum_parts, (3072,), num_launches=1)
    vocabularies = (32000, 128256, 151936)  # Llama 2, Llama 3, Qwen3
    yield Case("linear_cross_entropy", linear_cross_entropy, vocabularies, num_launches=1)


def _fp8_cases() -> Iterator[Case]:
    fp8 = partial(Case, widths=(3072,), capabilities=FP8_CAPABILITIES)
    for rows, columns in (
        ("e4m3/tensor/fp32", "e4m3/tensor/fp32"),
        ("e5m2/row/fp32", "e5m2/row/fp32"),
        ("e4m3/row/pow2", "e4m3/row/pow2"),
        ("e4m3/row/fp32", None),
        (None, "e4m3/tensor/pow2"),
    ):
        yield fp8(f"quantize {rows} {columns}", partial(quantize, rows=rows, columns=columns))
    for name in ("e4m3/tensor/fp32", "e4m3/row/pow2"):
        weights = partial(quantize_group, name=name, num_weights=4)
        yield fp8(f"quantize_group {name}, 4 weights", weights)
        producers = partial(quantized_producers, name=name)
        yield fp8(f"quantized producers {name}", producers)
        yield fp8(f"quantized producers {name}, two streams", partial(producers, num_streams=2))
        yield fp8(f"quantize_together {name}", partial(quantize_together, name=name))
        yield fp8(f"quantize_pieces {name}", partial(quantize_pieces, name=name))
        both = partial(activation_with_weights, name=name)
        yield fp8(f"activation_with_weights {name}", both)
        packing = partial(both, is_packing=True)
        yield fp8(f"activation_with_weights {name}, packing", packing)
        by_segment = partial(norm_modulate_segments_quantize, name=name)
        yield fp8(f"quantized norm by segment {name}", by_segment)
    yield fp8(f"quantize_group {name}, an activation", partial(quantize_group, name=name))
    joined = partial(quantized_producers, name=name, is_joined=True)
    yield fp8(f"quantized producers, gated residual and joined, {name}", joined)
    for gradient, weight in (("e5m2/tensor/fp32", "e4m3/tensor/fp32"), (name, name)):
        both = partial(quantize_mixed, gradient=gradient, weight=weight)
        yield fp8(f"quantize_mixed {gradient} {weight}", both)
    producers = partial(quantized_producers, is_packing=True)
    joined = partial(producers, name="e4m3/tensor/fp32", is_joined=True)
    yield fp8("quantized producers, gated residual and joined, packing", joined)
    both = partial(producers, name="e4m3/row/pow2", num_streams=2)
    yield fp8("quantized producers e4m3/row/pow2, two streams, packing", both)
    for norm, variant in (("layer", MODULATED), ("none", "residual gate")):
        run = partial(norm_modulate, norm=norm, operands=variant, is_packing=True)
        widths = (3072, 5120, 6144) if norm == "layer" else (3072,)
        name = f"norm_modulate {norm} {variant}, packing"
        yield Case(name, run, widths, FP8_CAPABILITIES)
    for variant, widths, options in (
        ("", (3072,), {}),
        ("half", (3072,), {"rotation": "half"}),
        ("across heads", (1536, 5120), {"across_heads": True, "tables": "pairs"}),
    ):
        run = partial(qk_norm_rope, is_packing=True, **options)
        name = " ".join(("qk_norm_rope", *(variant,) * bool(variant)))
        yield Case(f"{name}, packing", run, widths, FP8_CAPABILITIES)
    yield fp8("saving", saving)
    yield fp8("quantize_heads", quantize_heads, num_launches=1)
    for form in ("none", "up", "gate_up"):
        run = partial(packed_activation, form=form)
        yield fp8(f"packed_activation {form}", run, num_launches=1)
    name, of_gradients = "e4m3/tensor/fp32", "e5m2/tensor/fp32"
    for case, run in (
        (f"quantize {of_gradients}", partial(quantize, rows=of_gradients, columns=of_gradients)),
        (f"quantize_group {name}, 4 weights", partial(quantize_group, name=name, num_weights=4)),
        (f"quantize_group {name}, an activation", partial(quantize_group, name=name)),
        (f"quantized producers {name}", partial(quantized_producers, name=name)),
        (
            f"quantized producers, gated residual and joined, {name}",
            partial(quantized_producers, name=name, is_joined=True),
        ),
    ):
        yield fp8(f"delayed {case}", partial(run, is_delayed=True))


def _measuring_cases() -> Iterator[Case]:
    """Backwards that leave the magnitudes of gradients."""
    for norm, variant, widths, options in (
        ("layer", MODULATED, (3072, 5120), {}),
        ("layer", MODULATED, (3072,), {"is_packing": True}),
        ("none", "residual gate", (3072, 5120, 6144), {}),
        ("rms", "residual weight", (3072,), {}),
    ):
        run = partial(norm_modulate, norm=norm, operands=variant, is_measuring=True, **options)
        packing = ", packing" * bool(options)
        name = f"norm_modulate {norm} {variant}{packing}, measuring"
        yield Case(name, run, widths, FP8_CAPABILITIES)
    for variant, width, options in (
        ("", 3072, {}),
        (" half", 3072, {"rotation": "half"}),
        (" across heads", 5120, {"across_heads": True, "tables": "pairs"}),
        (", packing", 3072, {"is_packing": True}),
    ):
        run = partial(qk_norm_rope, is_measuring=True, **options)
        yield Case(f"qk_norm_rope{variant}, measuring", run, (width,), FP8_CAPABILITIES)
    run = partial(quantized_producers, name="e4m3/tensor/fp32", is_measuring=True)
    name = "quantized producers e4m3/tensor/fp32, measuring"
    yield Case(name, run, (3072,), FP8_CAPABILITIES)
    run = partial(packed_activation, form="up", is_measuring=True)
    yield Case("packed_activation up, measuring", run, (3072,), FP8_CAPABILITIES, num_launches=1)


CASES = (*_cases(), *_measuring_cases())


@contextlib.contextmanager
def recorded(launch: Callable[..., Any], kernel_type: type) -> Iterator[None]:
    """Have `launch(kernel, *args, grid, warmup, **options)` in place of launches."""
    with mock.patch.object(kernel_type, "run", launch):
        yield
