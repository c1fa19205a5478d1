"""Calls of one op that are wanted at the same time, in one launch: `fxopt::<name>_together`.

Of linears on one input, or of streams, text and image say. What is a tensor, a number or a flag of
the op is there a list with an entry for each call; strings and dtypes are those of all calls. The
results of a call follow those of the one before it. The values are those of the single calls.

What computes in several steps is a generator (`Steps`): it yields the calls that it wants next and
goes on with their results, so that several can run side by side and share launches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch._ops import OpOverload

from fxopt.kernels.registration import LAUNCHES, REREADS, SECOND_FORMS, call_form, register

Call = tuple[Any, ...]  # arguments of one call
COMMON = ("str", "str?", "ScalarType")  # what has one value for all calls


class Ask(NamedTuple):
    """A call that is wanted; lines: as `call_form` takes them, and behind them rooms: where it
    leaves codes of what it reads, or None."""

    op: OpOverload
    args: Call
    lines: Call = ()
    rooms: Call = ()

    @property
    def further(self) -> Call:
        """All that `call_form` takes; nothing where none of it is there."""
        found = *self.lines, *self.rooms
        return () if all(t is None for t in found) else found


Result = TypeVar("Result")
# Yields calls that it wants, goes on with their results, and ends with one of its own.
Steps: TypeAlias = Generator[Sequence[Ask], list[Any], Result]


Run: TypeAlias = Callable[[Sequence[Ask]], Sequence[Any]]
RunMixed: TypeAlias = Callable[[Sequence[Ask]], Sequence[Any] | None]


def has_none(lines: Call) -> bool:
    """Whether there are no lines."""
    return all(line is None for line in lines)


class Shared(NamedTuple):
    """How calls of an op run together.

    run: the results of calls that have the same `common`.
    common: of the arguments; None for a call that has to run alone.
    family: of ops whose calls run together, by the `run` of any of them; None for the op alone.
    mixed: the results of calls of several kinds, of the ops that have it and whose lines are
        `plain`, or None if these run kind by kind; None if all do.
    plain: whether lines of a call let it run so; by default only where there are none.
    """

    run: Run
    common: Callable[[Call], Hashable]
    family: OpOverload | None = None
    mixed: RunMixed | None = None
    plain: Callable[[Call], bool] = has_none


SHARED: dict[OpOverload, Shared] = {}


def answer(asks: Sequence[Ask]) -> list[Any]:
    """The results of all calls, in as few launches as there are kinds of them."""
    kinds: dict[Hashable, list[int]] = {}
    for i, ask in enumerate(asks):
        kinds.setdefault(_kind(ask) or i, []).append(i)
    found: dict[int, Any] = {}
    for run_mixed, groups in _by_mix(asks, [*kinds.values()]):
        members = [i for group in groups for i in group]
        results = run_mixed([asks[i] for i in members]) if len(groups) > 1 else None
        if results is None:
            results = [r for group in groups for r in _of_one_kind([asks[i] for i in group])]
        found |= zip(members, results, strict=True)
    return [found[i] for i in range(len(asks))]


def _of_one_kind(asks: Sequence[Ask]) -> Sequence[Any]:
    first = asks[0]
    if len(asks) == 1:
        return [call_form(first.op, first.further, *first.args)]
    return SHARED[first.op].run(asks)


def _by_mix(
    asks: Sequence[Ask], groups: Sequence[list[int]]
) -> list[tuple[RunMixed, list[list[int]]]]:
    """Groups of one kind each, by what may run them together."""
    found: dict[RunMixed, list[list[int]]] = {}
    apart: list[tuple[RunMixed, list[list[int]]]] = []
    for group in groups:
        first = asks[group[0]]
        is_plain = _kind(first) is not None and SHARED[first.op].plain(first.lines)
        run_mixed = SHARED[first.op].mixed if is_plain else None
        if run_mixed is None:
            apart.append((_of_one_kind, [group]))
        else:
            found.setdefault(run_mixed, []).append(group)
    return [*found.items(), *apart]


def run(steps: Steps[Result]) -> Result:
    """What they end with."""
    found: Any = None
    while True:
        try:
            asks = steps.send(found)
        except StopIteration as end:
            result: Result = end.value
            return result
        found = answer(asks)


def side_by_side(*runs: Steps[Any]) -> Steps[list[Any]]:
    """Several as one, which ends with what each ends with: what they want at one time is wanted
    together."""
    results: dict[int, Any] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(runs)))
    while answers:
        asked: dict[int, Sequence[Ask]] = {}
        for i, found in answers.items():
            try:
                asked[i] = runs[i].send(found)
            except StopIteration as end:
                results[i] = end.value
        every = yield [ask for asks in asked.values() for ask in asks]
        each = parts(every, [len(asks) for asks in asked.values()])
        answers = {i: list(own) for i, own in zip(asked, each, strict=True)}
    return [results[i] for i in range(len(runs))]


def parts(items: Sequence[Any], sizes: Sequence[int]) -> list[Sequence[Any]]:
    """The items in groups of these sizes."""
    return [items[start:end] for start, end in pairwise(accumulate(sizes, initial=0))]


def _kind(ask: Ask) -> Hashable:
    """What calls have in common that run together; None for one that runs alone."""
    shared = SHARED.get(ask.op)
    common = None if shared is None else shared.common(ask.args)
    watched = tuple(i for i, line in enumerate(ask.further) if line is not None)
    family = ask.op if shared is None else shared.family or ask.op
    return None if common is None else (family, common, watched)


def where_it_fits(
    calls: Sequence[Call],
    fits: Callable[..., bool],
    together: Callable[[Sequence[Call]], Sequence[Any]],
    otherwise: Callable[..., Any],
) -> Sequence[Any]:
    """`together` of calls that all fit; else each by itself, `otherwise` one that does not."""
    if all(fits(*call) for call in calls):
        return together(calls)
    return [together([c])[0] if fits(*c) else otherwise(*c) for c in calls]


def alone(together: Callable[[Sequence[Call]], Sequence[Any]]) -> Callable[..., Any]:
    """What `together` makes of a single call."""
    return lambda *args: together([args])[0]


def share(
    op: OpOverload, launch: Callable[[list[Call]], Sequence[Any]], kind: Callable[..., Hashable]
) -> None:
    """Let calls of an op run by `launch`, which takes the arguments of each and its rooms, where
    `kind` of the arguments is the same."""
    SHARED[op] = Shared(
        lambda asks: launch([ask.args + ask.further for ask in asks]), lambda args: kind(*args)
    )


def mix(ops: Sequence[OpOverload], run: RunMixed, **fields: Any) -> None:
    """Let calls of several kinds run as one, of these ops, which share those of one kind.

    fields: further ones of `Shared`.
    """
    for op in ops:
        SHARED[op] = SHARED[op]._replace(mixed=run, **fields)


def share_with(op: OpOverload, wider: OpOverload, widen: Callable[[Call], Call]) -> None:
    """Let calls of an op also run with those of a wider one, as which `widen` writes them."""
    own, other = SHARED[op], SHARED[wider]

    def run(asks: Sequence[Ask]) -> Sequence[Any]:
        if all(ask.op is op for ask in asks):
            return own.run(asks)
        return other.run([
            ask if ask.op is wider else ask._replace(op=wider, args=widen(ask.args)) for ask in asks
        ])  # fmt: skip

    SHARED[op], SHARED[wider] = (s._replace(run=run, family=wider) for s in (own, other))


def share_lists(op: OpOverload) -> None:
    """Let calls of an op that takes lists, and returns lists as long, run as one."""

    def run(asks: Sequence[Ask]) -> list[Call]:
        args, lines = (
            [_joined(field) for field in zip(*each, strict=True)]
            for each in ([ask.args for ask in asks], [ask.lines for ask in asks])
        )
        every = [iter(field) for field in call_form(op, lines, *args)]
        sizes = [len(ask.args[0]) for ask in asks]
        return [tuple(list(islice(field, size)) for field in every) for size in sizes]

    def common(args: Call) -> Hashable:
        return tuple(a for a in args if not isinstance(a, list))

    SHARED[op] = Shared(run, common)


def _joined(values: Sequence[Any]) -> Any:
    """Lists as one; anything else is the same in all calls."""
    first = values[0]
    return [t for each in values for t in each] if isinstance(first, list) else first


def register_together(
    op: OpOverload,
    triton: Callable[[list[Call]], Sequence[Sequence[Any]]],
    launches: Callable[[list[Call]], int] | None = None,
    kind: Callable[..., Hashable] = lambda *args: (),
) -> OpOverload:
    """Define `<name>_together` of an op and of its second form.

    Args:
        op: with results that are tensors.
        triton: the results of each of several calls, in one launch.
        launches: kernels of these calls; None for those of the largest.
        kind: what else calls share that run together; None for one that runs alone.
    """
    num_args = len(op._schema.arguments)
    together = _define(op, num_args, triton, launches)
    SECOND_FORMS[together] = _define(SECOND_FORMS[op], num_args, triton, launches)
    types = _types(op)

    def run(asks: Sequence[Ask]) -> list[Call]:
        columns = zip(*(ask.args for ask in asks), strict=True)
        args = [c[0] if t in COMMON else list(c) for t, c in zip(types, columns, strict=True)]
        columns = zip(*(ask.further for ask in asks), strict=True)
        further = [None if c[0] is None else list(c) for c in columns]
        return by_call(call_form(together, further, *args), len(op._schema.returns))

    def common(args: Call) -> Hashable:
        own = kind(*args)
        shared = [a for t, a in zip(types, args, strict=True) if t in COMMON]
        return None if own is None else (own, *shared)

    SHARED[op] = Shared(run, common)
    return together


def _define(
    op: OpOverload,
    num_args: int,
    triton: Callable[[list[Call]], Sequence[Sequence[Any]]],
    launches: Callable[[list[Call]], int] | None,
) -> OpOverload:
    """`<name>_together`, of an op whose arguments from `num_args` on are lines."""
    name, types = op._schema.name, _types(op)
    alone, rereads = LAUNCHES.get(name, lambda *args: 1), REREADS.get(name)
    num_results = len(op._schema.returns)

    def calls(args: Sequence[Any]) -> list[Call]:
        num_calls = len(next(a for t, a in zip(types, args, strict=True) if t == "Tensor"))
        each = [
            [a] * num_calls if t in COMMON or a is None else a
            for t, a in zip(types, args, strict=True)
        ]
        return list(zip(*each, strict=True))

    def one_by_one(*args: Any) -> list[Any]:
        return [t for call in calls(args) for t in op(*call)]

    def in_one(*args: Any) -> list[Any]:
        return [t for results in triton(calls(args)) for t in results]

    def num_launches(*args: Any) -> int:
        every = calls(args)
        return launches(every) if launches else max(alone(*call) for call in every)

    def reads(args: Sequence[Any], out: Any) -> list[Any]:
        pairs = zip(calls(args), by_call(out, num_results), strict=True)
        return [t for call, own in pairs for t in rereads(call, own)] if rereads else []

    names = [argument.name for argument in op._schema.arguments]
    lists = [_list_of(t, i >= num_args) for i, t in enumerate(types)]
    listed = ", ".join(f"{t} {n}" for t, n in zip(lists, names, strict=True))
    return register(
        f"{name.removeprefix('fxopt::')}_together({listed}) -> Tensor[]",
        native=one_by_one,
        fake=one_by_one,
        triton=in_one,
        launches=num_launches,
        rereads=reads,
    )


def _types(op: OpOverload) -> list[str]:
    """Of each argument its type as the schema writes it."""
    inside = str(op._schema).partition("(")[2].rpartition(") -> ")[0]
    return [argument.rpartition(" ")[0] for argument in inside.split(", ")]


def _list_of(type: str, is_line: bool) -> str:
    """The type for several calls; of lines there is one for each call or none at all."""
    if type in COMMON:
        return type
    return f"{type.removesuffix('?')}[]?" if is_line else f"{type}[]"


def by_call(results: Sequence[Any], num_results: int) -> list[Call]:
    """The results of each call, of all one after the other."""
    starts = range(0, len(results), num_results)
    return [tuple(results[i : i + num_results]) for i in starts]
