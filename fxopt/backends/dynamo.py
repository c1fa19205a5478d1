"""The second door: `torch.compile(model, backend="fxopt")`.

Dynamo's graph is brought to the one IR, rewritten, and handed to a compiler. Where no measured
kernel beats what the compiler fuses itself, the op is inlined as plain ATen, and the compiler has
it as one fusable expression. A graph that cannot be rewritten goes on as it came.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxopt.backends import compiled_graphs, inductor, precision
from fxopt.backends import options as shared
from fxopt.backends.failures import described, giving_up
from fxopt.backends.unseen import CHOOSES_KERNELS, CannotCapture
from fxopt.errors import UnknownOption
from fxopt.kernels.attention import steers
from fxopt.passes.autocast import Autocast, suspended, without, write_out
from fxopt.passes.canonicalize import canonicalize
from fxopt.passes.choose_attention import choose_attention
from fxopt.passes.inline import inline_native
from fxopt.passes.ir import IS_KEPT, fqn, graphs, source
from fxopt.passes.kernel_scopes import SWITCH, NotOneKernel, keep_on_attentions, mark
from fxopt.passes.retrace import retrace
from fxopt.passes.rewriter import Outcome, rewrite
from fxopt.recipes import Recipe
from fxopt.report import Declined, Report

INNER = ("inductor", "aot_eager", "eager")


def backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    reports: list[Report] | None = None,
    block: str | None = None,
) -> Callable[..., Any]:
    """Rewrite and compile one graph of Dynamo's.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs, fake or real.
        mode: as for `torch.compile`; handed to Inductor.
        options: "recipe", "inner" (which compiler gets the graph: "inductor", "aot_eager" or
            "eager"), and whatever else Inductor takes.
        reports: where to note what was done; None for the list of the process.
        block: name of the block that the graph is known to be of.

    Raises:
        UnknownOption, UnknownRecipe: a name that is not known.
        ScheduleInGraph, MathInGraph, LowPrecisionParameter, NotNative: the recipe cannot be had
            like this.
    """
    settings = dict(options or {})
    recipe, inner = settings.pop("recipe", "bf16"), settings.pop("inner", "inductor")
    chosen = shared.check(recipe=recipe, execution="compile", inner=inner)
    if inner not in INNER:
        raise UnknownOption(str(inner), INNER)
    inductor.check_options(settings, own=("recipe", "inner"))
    precision.check_device(chosen, _device(example_inputs))
    precision.check_parameters(chosen, _parameters(gm).items())
    rewritten, report = rewritten_graph(gm, example_inputs, chosen, block)
    if reports is None:
        compiled_graphs.note(gm, report)
    else:
        reports.append(report)
    if rewritten is gm:
        return _compiled(gm, example_inputs, inner, mode, settings)
    ambient = Autocast.current(_device(example_inputs).type)
    with suspended(ambient.device_type):
        compiled = _compiled(rewritten, example_inputs, inner, mode, settings)
    return without(ambient, compiled)


def _compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    inner: str,
    mode: str | None,
    settings: dict[str, Any],
) -> Callable[..., Any]:
    if inner == "eager":
        return gm.forward
    if inner == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(gm, list(example_inputs))
    return inductor.compile_graph(gm, example_inputs, mode, settings)


def rewritten_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], recipe: Recipe, block: str | None = None
) -> tuple[fx.GraphModule, Report]:
    """The graph to compile, and what was done to it: `gm` itself if no rule fired."""
    device = _device(example_inputs)
    target = shared.target_name(device)
    try:
        _mark_kernels(gm)
        with giving_up(describe=described):  # of what the graph's own code raises on fakes
            graph = retrace(gm, example_inputs)
            write_out(graph, Autocast.current(device.type))
        with giving_up():
            outcome = _rewrite(graph, gm, example_inputs, recipe, block)
    except CannotCapture as reason:  # a graph that the compiler alone compiles is never broken
        found = Outcome(declined=[Declined("capture", "", "", "", (str(reason),))])
        return gm, found.report("compile", recipe.name, target)
    outcome.declined += _kept(graph)
    is_changed = outcome.applied or outcome.attentions
    return (graph if is_changed else gm), outcome.report("compile", recipe.name, target)


def _kept(graph: fx.GraphModule) -> Iterator[Declined]:
    """What no rule has seen, as its calls are in the graph as they came."""
    for body in graphs(graph):
        for node in body.graph.find_nodes(op="get_attr"):
            for call in node.users if IS_KEPT in node.meta else ():
                why = f"what {call.target} runs is no graph of the IR and stays as it is"
                yield Declined("capture", fqn(call), call.name, source(call), (why,))


def _mark_kernels(gm: fx.GraphModule) -> None:
    bodies = (node for body in [*graphs(gm)][1:] for node in body.graph.nodes)
    try:
        if any(node.target is SWITCH for node in bodies):
            raise NotOneKernel
        mark(gm)
    except NotOneKernel:
        raise CannotCapture(CHOOSES_KERNELS) from None


def _rewrite(
    graph: fx.GraphModule,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    recipe: Recipe,
    block: str | None,
) -> Outcome:
    """Rewrite `graph`, which was retraced from `gm`, for a compiler."""
    device = _device(example_inputs)
    keep_on_attentions(graph)
    canonicalize(graph)
    outcome = rewrite(
        graph,
        shared.rules_for(recipe, compiled=True, block=block, target=shared.target_of(device)),
        device=device,
        parameters=frozenset(_parameters(gm)),
    )
    # A table that arrives with requires_grad would lose its gradient; Dynamo guards on it.
    trained = outcome.constants & _trained(gm, example_inputs)
    if trained:
        raise CannotCapture(f"{sorted(trained)[0]} requires a gradient that the op lacks")
    if outcome.applied:
        inline_native(graph)
    if outcome.applied or steers(recipe.asked_attention, device):
        outcome.attentions = choose_attention(graph, recipe.asked_attention)
    return outcome


def _device(inputs: Sequence[Any]) -> torch.device:
    return next((v.device for v in inputs if isinstance(v, Tensor)), torch.device("cpu"))


def _parameters(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Parameters by the names of their placeholders."""
    return {
        str(n.target): value
        for n in gm.graph.find_nodes(op="placeholder")
        if isinstance(value := n.meta.get("example_value"), torch.nn.Parameter)
    }


def _trained(gm: fx.GraphModule, inputs: Sequence[Any]) -> set[str]:
    placeholders = gm.graph.find_nodes(op="placeholder")
    return {
        str(n.target)
        for n, v in zip(placeholders, inputs, strict=True)
        if isinstance(v, Tensor) and v.requires_grad
    }
