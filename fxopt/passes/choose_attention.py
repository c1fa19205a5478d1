"""Attentions of a rewritten graph, on the backend that a recipe asks for.

It is the last pass: rules look for scaled_dot_product_attention, and find it as it came.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx

from fxopt.kernels.attention import Choice, attention, choose, named, steers
from fxopt.kernels.attention_call import Call
from fxopt.passes import ir
from fxopt.passes.kernel_scopes import asked_by_model
from fxopt.passes.windows import window
from fxopt.recipe_errors import AttentionRefused

SAYS_SO = "the model's own code asks for {!r} (sdpa_kernel, or diffusers' set_attention_backend)"
NO_CALL = "it calls no scaled_dot_product_attention that {!r} could run"


def choose_attention(gm: fx.GraphModule, asked: str, target: str | None = None) -> list[Choice]:
    """Who runs each attention; where that may be another kernel than PyTorch's own choice, the
    node becomes `fxopt::attention`.

    A backend that is named and has nothing to run in the graph is a choice too, for the report.

    Args:
        asked: `Recipe.asked_attention`.
        target: a device that the graph is planned for and will not run on; nothing is changed.

    Raises:
        AttentionRefused: the recipe names another backend than the model's own code does.
    """
    choices = []
    for body in ir.graphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=ir.SDPA):
            arguments = ir.arguments(node)
            call: dict[str, Any] = {
                name: ir.tensor(a) if isinstance(a, fx.Node) else a for name, a in arguments.items()
            }
            mask = arguments["attn_mask"]
            seen = window(mask) if isinstance(mask, fx.Node) else None
            described, own = partial(Call.of, **call, window=seen), asked_by_model(node)
            choices.append(
                choose(asked, described, target)
                if own is None
                else _as_the_model_says(own, asked, described)
            )
            if target is None and steers(own or asked, call["query"].device):
                in_order = (arguments[a.name] for a in ir.SDPA._schema.arguments)
                node.target, node.args, node.kwargs = attention, (*in_order, seen, own or asked), {}
        body.recompile()
    if not choices and named(asked) is not None:
        choices.append(Choice("pytorch", NO_CALL.format(named(asked))))
    return choices


def _as_the_model_says(own: str, asked: str, described: Callable[[], Call]) -> Choice:
    name = named(asked)
    if name not in (None, own):
        raise AttentionRefused(str(name), str(described()), [SAYS_SO.format(own)])
    return Choice(own, "as the model says" if name is None else "as the recipe and the model say")
