"""A function of a backend in the place of scaled_dot_product_attention, wherever that is called."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxopt.kernels.attention_backends import Backend, refusals
from fxopt.kernels.attention_call import Call, Window, as_autocast
from fxopt.recipe_errors import AttentionRefused


class InPlace(TorchFunctionMode):
    """Within it, this thread's calls of scaled_dot_product_attention run on `backend`.

    Args:
        backend: one that has a function.
        window: what the masks of these calls are known to say.

    Raises:
        AttentionRefused: of a call that it cannot run, before anything has run.
    """

    def __init__(self, backend: Backend, window: Window | None = None) -> None:
        super().__init__()
        self.backend, self.window = backend, window

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self.attend(*args, **(kwargs or {}))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        assert self.backend.in_place is not None
        q, k, v = as_autocast(query, key, value)
        options["window"] = self.window
        call = Call.of(q, k, v, *args, **options)
        if reasons := refusals(self.backend, call):
            raise AttentionRefused(self.backend.name, str(call), reasons)
        return self.backend.in_place(q, k, v, *args, **options)
