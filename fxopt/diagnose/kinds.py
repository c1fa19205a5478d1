"""What kind of work a kernel or a host op is, by metadata where there is any, else by name."""

from __future__ import annotations

import functools
import re

COMMUNICATION = "communication"
COPIES = "copies"
GLUE = "glue"

# In this order: a fused attention kernel may have "gemm" in its name.
_PATTERNS = (
    # Inductor names what it fuses after the ops around it; amax and the like are of its own doing.
    (GLUE, r"^triton_(poi|red|per|for)_(?!.*(quant|to_fp8|scaled_cast|amax))"),
    # ncclKernel_ before NCCL 2.19, ncclDevKernel_ since.
    (
        COMMUNICATION,
        r"\|collective$|nccl|rccl|^c10d::|gloo:|all_?reduce|all_?gather|reduce_?scatter",
    ),
    (COPIES, r"\|copy$|^aten::(copy_|_to_copy)$|memcpy|memset"),
    ("attention", r"flash|fmha|scaled_dot_product|attention|attn"),
    ("quantisation", r"quant|to_fp8|scaled_cast|amax"),
    (
        "GEMM",
        r"gemm|cutlass|xmma|nvjet|cublas|aten::(mm|addmm|bmm|baddbmm|addmm_)\b|_scaled_mm"
        r"|^triton_tem_\w*mm|conv(?!ert)",
    ),
)
_DTYPES = (
    ("fp4", r"e2m1|fp4|float4"),
    ("fp8", r"e4m3|e5m2|fp8|float8|f8"),
    ("bf16", r"bf16|bfloat16"),
    ("fp16", r"f16|half|hgemm|float16"),
    ("tf32", r"tf32"),
    ("fp64", r"f64|dgemm|double"),
    ("fp32", r"f32|sgemm|float"),
)


@functools.cache
def kind(name: str) -> str:
    """ "GEMM bf16", "attention", "quantisation", "communication", "copies" or "glue".

    Args:
        name: of a kernel or op, with metadata behind "|" as `trace.read` gives it.
    """
    text = name.lower()
    for found, pattern in _PATTERNS:
        if re.search(pattern, text):
            return f"GEMM {_dtype(text)}" if found == "GEMM" else found
    return GLUE


def _dtype(text: str) -> str:
    return next((dtype for dtype, pattern in _DTYPES if re.search(pattern, text)), "other")
