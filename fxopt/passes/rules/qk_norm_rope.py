"""QK-norm, rotary embedding and the joint text+image concatenation of one attention operand.

The region is everything between the projections and the operand of attention. Its norms are read
off; its rotation is not: it is run on random inputs and compared with the two ways to pair
channels, over every way to read the tables. So interleaved stacks, rotated halves, complex
products, 2x2 matrices, even/odd writes, parts of a head and whatever comes next are one rule.

Shapes: B batch, S tokens, H heads, d head dim.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from torch import fx

from fxopt.kernels.qk_norm_rope import qk_norm_rope
from fxopt.passes import algebra, ir
from fxopt.passes.algebra import Norm
from fxopt.passes.cancel_permutes import cancel_permutes
from fxopt.passes.ir import aten
from fxopt.passes.regions import between
from fxopt.passes.rotation import Rotation, find_rotation
from fxopt.passes.rule import Binding, Call, Reason, Rule
from fxopt.passes.rules.attention import SOFTMAX, Scores, read_scores, scores_behind, unrepeated

PROJECTIONS = frozenset(
    {ir.LINEAR, aten.addmm.default, aten.mm.default, aten.conv1d.default, aten.conv2d.default}
)


@dataclass(frozen=True)
class Section:
    """One part of the sequence: its projection, its norm, and its rotation if it has its own."""

    source: fx.Node
    norm: Norm | None
    end: fx.Node  # before the concatenation
    rotation: Rotation | None = None


@dataclass(frozen=True)
class Heads:
    """Sizes of the operand, and which dim its heads are: [B, H, S, d] or [B, S, H, d]."""

    num_heads: int
    head_dim: int
    dim: int


def propose(attention: fx.Node) -> Iterator[Binding | Reason]:
    for name, operand in zip(("queries", "keys"), operands(attention), strict=False):
        for proposal in _propose_operand(*operand):
            if isinstance(proposal, Reason):
                yield Reason(f"{name}: {proposal.why}", proposal.node, proposal.remedy)
            else:
                yield proposal


def _propose_operand(operand: fx.Node, heads_dim: int) -> Iterator[Binding | Reason]:
    if result(operand) is not None:
        return
    sizes = ir.shape(operand)
    if len(sizes) != 4 or not all(isinstance(s, int) for s in (sizes[heads_dim], sizes[3])):
        yield Reason(f"the operand is {list(sizes)}, not [batch, heads, tokens, head_dim]", operand)
        return
    heads = Heads(sizes[heads_dim], sizes[3], heads_dim)
    region = _region(operand)
    sources = _sources(region)
    if not sources or _is_view_of(operand, sources[0]):
        return  # no projection behind it, or nothing between the projection and attention
    if len(sources) > 2:
        yield Reason(f"{len(sources)} projections are joined, the op joins two", operand)
        return
    cat = _joint_cat(region, len(sources))
    if len(sources) == 2 and cat is None:
        yield Reason("two projections meet other than by one concatenation", operand)
        return
    ends = list(cat.args[0]) if cat is not None else [operand]  # type: ignore[arg-type]
    read = [_section(end, region) for end in ends]
    sections = [s for s in read if isinstance(s, Section)]
    if len(sections) < len(read):
        yield from (s for s in read if isinstance(s, Reason))
        return
    yield from _with_rotation(operand, heads, cat, sections)


def result(node: fx.Node) -> fx.Node | None:
    """The output of a `qk_norm_rope` that `node` is a view of, if it is one."""
    while ir.is_call(node, *ir.VIEWS) and node.target is not operator.getitem:
        node = node.args[0]
    is_result = ir.is_call(node, operator.getitem) and ir.is_call(node.args[0], qk_norm_rope)
    return node if is_result else None


def operands(attention: fx.Node) -> list[tuple[fx.Node, int]]:
    """Queries and keys before they are repeated, and which dim their heads are.

    Args:
        attention: scaled_dot_product_attention, or the softmax of one whose weights are returned
            as well, so that it stays as it is written.
    """
    if ir.is_call(attention, ir.SDPA):
        named = ir.arguments(attention)
        return [_before_repeat(named[name]) for name in ("query", "key")]
    whole = ir.skip_casts(ir.arguments(attention)["self"])
    scores, behind = read_scores(whole), scores_behind(whole)
    if scores is None and behind is not None:
        scores = behind[0]
    if not isinstance(scores, Scores) or scores.num_heads is not None:
        return []
    found = []
    for node, order in ((o.node, o.order) for o in (scores.q, scores.k)):
        if order not in ((0, 1, 2, 3), (0, 2, 1, 3)):
            return []
        repeated = unrepeated(node)
        is_grouped = repeated is not None and repeated[1] == order[1]
        found.append(repeated if repeated and is_grouped else (node, order[1]))
    return found


def _before_repeat(operand: fx.Node) -> tuple[fx.Node, int]:
    """The key heads before they are repeated for grouped queries, and which dim they are."""
    node, heads_dim = ir.skip_copies(operand), 1
    if _exchanges_heads_and_tokens(node):
        node, heads_dim = ir.skip_copies(node.all_input_nodes[0]), 2
    found = unrepeated(node)
    return (operand, 1) if found is None or found[1] != heads_dim else found


def _exchanges_heads_and_tokens(node: fx.Node) -> bool:
    if ir.is_call(node, aten.transpose.int):
        return {dim % 4 for dim in node.args[1:]} == {1, 2}
    return ir.is_call(node, aten.permute.default) and list(node.args[1]) == [0, 2, 1, 3]


def _region(operand: fx.Node) -> list[fx.Node]:
    """What lies between `operand` and the projections it comes from, sources included."""
    region: set[fx.Node] = set()
    stack = [operand]
    while stack:
        node = stack.pop()
        if node in region or not _depends_on_projection(node):
            continue
        region.add(node)
        if not _is_view_chain(node):
            stack += node.all_input_nodes
    return sorted(region)


def _depends_on_projection(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen or (ir.tensor(current) is None and not _is_tuple(current)):
            continue
        if current.op == "call_function" and current.target in PROJECTIONS:
            return True
        seen.add(current)
        stack += current.all_input_nodes
    return False


def _is_tuple(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (tuple, list))


def _is_view_chain(node: fx.Node) -> bool:
    """Whether `node` is a projection, or a view of one."""
    while ir.is_call(node, *ir.VIEWS):
        node = node.args[0]
    return node.op == "call_function" and node.target in PROJECTIONS


def _is_view_of(node: fx.Node, source: fx.Node) -> bool:
    while ir.is_call(node, *ir.VIEWS, *ir.COPIES) and node is not source:
        node = node.args[0]
    return node is source


def _sources(region: list[fx.Node]) -> list[fx.Node]:
    """For each projection in the region, the last view of it that everything else goes through."""
    chains: dict[fx.Node, list[list[fx.Node]]] = {}
    for node in region:
        if _is_view_chain(node):
            chain = [node]
            while ir.is_call(chain[0], *ir.VIEWS):
                chain.insert(0, chain[0].args[0])
            chains.setdefault(chain[0], []).append(chain)
    sources = []
    for group in chains.values():
        common = [nodes[0] for nodes in zip(*group, strict=False) if len(set(nodes)) == 1]
        # Heads that are cut into pairs belong to the rotation.
        while _is_tuple(common[-1]) or len(ir.shape(common[-1])) > 4:
            common.pop()
        sources.append(common[-1])
    return sources


def _joint_cat(region: list[fx.Node], num_sources: int) -> fx.Node | None:
    """The concatenation over tokens: the one that joins the sections."""
    if num_sources == 1:
        return None
    for node in reversed(region):
        if ir.is_call(node, aten.cat.default) and len(node.args[0]) == num_sources:
            upstream = [set(_sources(_region(part))) for part in node.args[0]]
            if all(len(u) == 1 for u in upstream) and len(set().union(*upstream)) == num_sources:
                return node
    return None


def _section(end: fx.Node, region: list[fx.Node]) -> Section | Reason:
    part = [n for n in _region(end) if n in region]
    norms = [n for n in (algebra.as_norm(node) for node in part) if n is not None]
    (source,) = _sources(part)
    if not norms:
        return Section(source, None, end)
    if len(norms) > 1 and not any(between(a.out, b.out) for a, b in permutations(norms, 2)):
        why = f"{len(norms)} norms stand side by side, as of heads that have a weight each"
        return Reason(f"{why}; the op has one norm for all heads", end)
    if len(norms) > 1:
        return Reason("more than one norm stands before attention", end)
    if not _is_view_of(ir.skip_casts(_skip_views(norms[0].x)), source):
        return Reason("the norm is not the first after the projection; the op rotates last", end)
    return Section(source, norms[0], end)


def _skip_views(node: fx.Node) -> fx.Node:
    while ir.is_call(node, *ir.VIEWS, *ir.CASTS, *ir.COPIES) and not _is_view_chain(node):
        node = node.args[0]
    return node


def _with_rotation(
    operand: fx.Node,
    heads: Heads,
    cat: fx.Node | None,
    sections: list[Section],
) -> Iterator[Binding | Reason]:
    joint: Rotation | Reason | None = None
    if cat is not None:
        joint = find_rotation(cat, operand, heads.num_heads, heads.head_dim)
    if isinstance(joint, Reason):
        yield joint
        return
    joints = _by_section(joint, sections)
    if isinstance(joints, Reason):
        yield joints
        return
    found = []
    for section, joint in zip(sections, joints, strict=True):
        start = section.norm.out if section.norm else section.source
        rotation = find_rotation(start, section.end, heads.num_heads, heads.head_dim)
        if isinstance(rotation, Reason):
            yield rotation
            return
        found.append(
            Section(section.source, section.norm, section.end, rotation if rotation else joint)
        )
    if all(s.norm is None and s.rotation is None for s in found):
        return
    if len({s.rotation.settings for s in found if s.rotation}) > 1:
        yield Reason("the sections pair channels differently", operand)
        return
    if not _agree([s.norm for s in found if s.norm]) or len({s.norm is None for s in found}) > 1:
        yield Reason("the sections are normed differently", operand)
        return
    yield _bind(operand, heads, found)


def _by_section(joint: Rotation | None, sections: list[Section]) -> list[Rotation | None] | Reason:
    """The joint rotation of each section: where not all tokens are rotated, those of one are."""
    if joint is None or joint.rotated == "all":
        return [joint] * len(sections)
    at = 0 if joint.rotated == "first" else -1
    rows, end = ir.shape(joint.cos.node), sections[at].end
    if not any(ir.same(size, num) for size in rows for num in ir.shape(end)[1:3]):
        return Reason("the rotated tokens are not those of one projection", end)
    found: list[Rotation | None] = [None] * len(sections)
    found[at] = replace(joint, rotated="all")
    return found


def _agree(norms: list[Norm]) -> bool:
    return len({(n.kind, n.weight_offset, _normed_width(n)) for n in norms}) <= 1


def _normed_width(norm: Norm) -> str:
    return str(ir.expression(ir.shape(norm.out)[-1]))


def _bind(operand: fx.Node, heads: Heads, sections: list[Section]) -> Binding:
    norm = sections[0].norm
    width = heads.num_heads * heads.head_dim
    across = norm is not None and _normed_width(norm) == str(width) and heads.num_heads > 1
    rotation = next((s.rotation for s in sections if s.rotation), None)
    kind = rotation.settings if rotation else ("none", "channels", "all")
    tables = [t for s in sections if s.rotation for t in (s.rotation.cos, s.rotation.sin)]
    affine = [p for s in sections if s.norm for p in (s.norm.weight, s.norm.bias)]
    listed = [*(s.source for s in sections), *affine, *(t.node for t in tables)]
    inputs = tuple(dict.fromkeys(n for n in listed if n is not None))

    def emit(call: Call, *nodes: fx.Node) -> fx.Node:
        given: dict[fx.Node | None, Any] = dict(zip(inputs, nodes, strict=True)) | {None: None}
        made: dict[int, Any] = {id(None): (None, None)}
        for rotation in (s.rotation for s in sections):
            if rotation is not None and id(rotation) not in made:
                tables = (rotation.cos, rotation.sin)
                made[id(rotation)] = [t.emit(call, given[t.node]) for t in tables]
        x = [_as_BSHd(call, given[s.source], s.source, heads) for s in sections]
        weights = [given[s.norm.weight] if s.norm else None for s in sections]
        biases = [given[s.norm.bias] if s.norm else None for s in sections]
        cos, sin = ([made[id(s.rotation)][i] for s in sections] for i in (0, 1))
        settings = (
            norm.kind if norm else "none",
            [s.norm.eps if s.norm else 0.0 for s in sections],
            norm.weight_offset if norm else 0.0,
            across,
            *kind,
            ir.dtype(operand),
        )
        lists = (x, [None] * len(x), weights, biases, cos, sin, [len(sections)])
        out_BSHd = call(operator.getitem, call(qk_norm_rope, *lists, *settings), 0)
        return out_BSHd if heads.dim == 2 else call(aten.permute.default, out_BSHd, [0, 2, 1, 3])

    constants = tuple(dict.fromkeys(t.node for t in tables))
    return Binding(operand, inputs, (operand,), emit, "qk_norm_rope", constants)


def _as_BSHd(call: Call, x: fx.Node, source: fx.Node, heads: Heads) -> fx.Node:
    sizes = ir.shape(source)
    if len(sizes) == 3:
        return call(aten.unflatten.int, x, -1, [heads.num_heads, heads.head_dim])
    if len(sizes) == 4 and ir.same(sizes[1], heads.num_heads):
        return call(aten.permute.default, x, [0, 2, 1, 3])
    return x


RULE = Rule(
    name="qk_norm_rope",
    version=3,
    anchors=(ir.SDPA, *SOFTMAX),
    propose=propose,
    finish=cancel_permutes,
)
