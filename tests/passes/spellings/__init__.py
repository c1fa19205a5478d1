"""The idioms of the catalogue in the many ways in which people write them.

Each function draws one spelling and returns a module with inputs. `pick(what, *alternatives)`
returns one of its alternatives; the caller decides how.

Shapes: B batch, S tokens, T text tokens, D channels, F hidden channels, H heads, d head dim.
"""

from tests.passes.spellings.activations import gated_activation
from tests.passes.spellings.attention import attention
from tests.passes.spellings.norms import gated_residual, norm_modulate, rms_norm
from tests.passes.spellings.rotary import qk_norm_rope

__all__ = [
    "attention",
    "gated_activation",
    "gated_residual",
    "norm_modulate",
    "qk_norm_rope",
    "rms_norm",
]
