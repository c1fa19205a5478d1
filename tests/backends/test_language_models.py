"""The loss of language models through the compiled door, as transformers computes it."""

import pytest
import torch
from torch import nn

from fxopt.backends import compiled_graphs
from tests import numerics
from tests.families import FAMILIES

RULE = "linear_cross_entropy"
pytestmark = pytest.mark.usefixtures("fresh")


class Loss(nn.Module):
    """What a training loop differentiates; with `logits`, what one returns that also measures."""

    def __init__(self, model: nn.Module, logits: bool = False) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, **inputs):
        found = self.model(**inputs)
        return (found.loss, found.logits) if self.logits else found.loss


def compiled(name: str, logits: bool = False):
    """The family's loss, a compiled twin, and inputs with labels."""
    family = FAMILIES[name]
    eager, twin = Loss(family.build(), logits), Loss(family.build(), logits)
    twin.compile(backend="fxopt", options={"inner": "aot_eager"})
    inputs = family.inputs(2, 0, torch.float32) | {"return_dict": True}
    labels = inputs["input_ids"].clone()
    labels[:, :2] = -100  # a prompt
    return eager, twin, inputs | {"labels": labels}


@pytest.mark.parametrize("name", ["llama-sdpa", "qwen3-sdpa"])
def test_loss_and_gradients(name):
    eager, twin, inputs = compiled(name)
    numerics.Judge(eager, inputs)(twin)
    applied = [a for g in compiled_graphs.GRAPHS for a in g.report.applied]
    assert sum(a.count for a in applied if a.rule == RULE) == 1


def test_logits_that_are_returned_stay_whole():
    _, twin, inputs = compiled("llama-sdpa", logits=True)
    twin(**inputs)
    (graph,) = compiled_graphs.GRAPHS
    report = graph.report
    assert RULE not in {a.rule for a in report.applied}
    (declined,) = (d for d in report.declined if d.rule == RULE)
    assert any("is also used by" in why for why in declined.reasons)
