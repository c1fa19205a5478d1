"""Compilations and the guards behind them, from Dynamo's structured log."""

import torch
from torch._logging._internal import trace_log

from fxopt.diagnose.compiles import compiles


def test_every_compilation_has_its_function_and_the_guard_that_failed():
    def doubled(x, factor):
        return 2 * x.sin() * factor

    function = torch.compile(doubled, backend="eager", dynamic=False)
    with compiles() as found:
        function(torch.ones(3), 1.0)
        function(torch.ones(3), 1.0)
        function(torch.ones(4), 1.0)
        function(torch.ones(4), 2.0)
    torch.compiler.reset()
    line = doubled.__code__.co_firstlineno
    assert {compile.function for compile in found} == {f"doubled at test_compiles.py:{line}"}
    first, size, value = (compile.reason for compile in found)
    assert first == ""
    assert size == "tensor 'x' size mismatch at index 0. expected 3, actual 4"
    assert "factor" in value
    assert all(compile.seconds > 0 for compile in found)


def test_nothing_stays_behind():
    before = list(trace_log.handlers)
    with compiles() as found:
        pass
    torch.compile(torch.sin, backend="eager")(torch.ones(2))
    assert trace_log.handlers == before
    assert not found
