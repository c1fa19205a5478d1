"""The kernel that a model's own code asks for, by a scope of `sdpa_kernel`, as a mark on nodes.

Graphs of torch.export do not show such a scope, and Dynamo's hold the switches that it sets. What
is traced inside is marked, and `choose_attention` reads the marks of attentions.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.nn import attention as sdpa
from torch.nn.attention import SDPBackend

from fxopt.kernels.attention_backends import BACKENDS
from fxopt.passes import ir

# What a scope calls as it is entered and as it is left; Dynamo writes down the calls.
SWITCH: Any = sdpa._sdpa_kernel
# In what tracers copy from node to node, `meta["custom"]`.
KEY = "fxopt_attention"


class NotOneKernel(Exception):
    """A scope allows several kernels, or one that no recipe can name."""


class Scopes:
    """Follows the scopes that are open, by the calls of `SWITCH`."""

    def __init__(self) -> None:
        self.allowed = frozenset(sdpa._cur_sdpa_kernel_backends())
        self.backend: str | None = None
        self.outer: list[tuple[frozenset[SDPBackend], str | None]] = []

    def switch(self, kernels: Iterable[SDPBackend], set_priority: bool = False) -> str | None:
        """The backend that the model asks for from this call on; None outside of its scopes.

        Raises:
            NotOneKernel: see there.
        """
        allowed = frozenset(kernels)
        if self.outer and allowed == self.outer[-1][0]:
            self.allowed, self.backend = self.outer.pop()
            return self.backend
        if set_priority or len(allowed) != 1:
            raise NotOneKernel
        self.outer.append((self.allowed, self.backend))
        self.allowed, self.backend = allowed, _name(*allowed)
        return self.backend


def _name(kernel: SDPBackend) -> str:
    """The backend of a kernel; of flash attention, that which is active in its place."""
    active = sdpa.current_flash_attention_impl()
    for backend in BACKENDS.values():
        is_flash = kernel is SDPBackend.FLASH_ATTENTION
        if backend.kernel is kernel and (not is_flash or backend.implementation == active):
            return backend.name
    raise NotOneKernel


def marked(meta: dict[str, Any], backend: str | None) -> dict[str, Any]:
    """The metadata of a node, or of what is being traced, with the mark set or taken off."""
    custom = {k: v for k, v in meta.get("custom", {}).items() if k != KEY}
    return meta | {"custom": custom | ({} if backend is None else {KEY: backend})}


def mark(gm: fx.GraphModule) -> None:
    """Mark the nodes of Dynamo's graph; the bodies of its higher-order ops are not looked into.

    Raises:
        NotOneKernel: also where a body lies inside of a scope, or has one.
    """
    scopes = Scopes()
    for node in gm.graph.nodes:
        if node.target is SWITCH:
            # Dynamo has kernels as calls that look their names up.
            kernels, set_priority = node.args
            scopes.switch([getattr(SDPBackend, k.args[0]) for k in kernels], set_priority)
        elif scopes.backend is not None:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise NotOneKernel
            node.meta = marked(node.meta, scopes.backend)


def keep_on_attentions(gm: fx.GraphModule) -> None:
    """Take the marks off all nodes but scaled_dot_product_attention: what a rule makes of matrix
    products, which no scope is about, is not what the model asks a kernel for."""
    for body in ir.graphs(gm):
        for node in body.graph.nodes:
            if node.target is not ir.SDPA and asked_by_model(node) is not None:
                node.meta = marked(node.meta, None)


def asked_by_model(node: fx.Node) -> str | None:
    """The backend that the model's own code asks for at this node."""
    backend: str | None = node.meta.get("custom", {}).get(KEY)
    return backend
