"""Attention in swapped forwards: which call it is that runs, and what is said of it."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.backends.swaps import attending
from fxopt.kernels.attention import TABLE, Row
from fxopt.recipe_errors import AttentionRefused


def llama(num_kv_heads: int) -> nn.Module:
    library = importlib.import_module("transformers.models.llama")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}
    config = library.LlamaConfig(
        **sizes, num_key_value_heads=num_kv_heads, num_hidden_layers=1, vocab_size=32
    )
    return fxopt.swap(library.LlamaModel(config))


@pytest.mark.parametrize("num_kv_heads", [1, 2])
@pytest.mark.parametrize("mask", ["none", "padding"])
def test_a_decoders_call_is_the_one_that_runs(
    mask: str, num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers leaves the mask of a whole sequence to scaled_dot_product_attention, and repeats
    keys and values of groups where there is another mask."""
    is_padded = mask == "padding"
    kind, is_grouped = ("boolean", False) if is_padded else ("none", num_kv_heads == 1)
    row = Row("math", 1.3, 32, kind, not is_padded, is_grouped, 1, 64, torch.float32)
    monkeypatch.setitem(TABLE, "cpu", (row,))
    model = llama(num_kv_heads)
    attention_mask = torch.ones(1, 8, dtype=torch.long)
    attention_mask[:, :3] = not is_padded
    model(torch.arange(8)[None], attention_mask=attention_mask, use_cache=False)
    assert [a.backend for a in fxopt.report(model).attentions] == ["math"]


def test_reported_choices_do_not_grow_with_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        TABLE, "cpu", (Row("math", 1.3, 64, "none", True, False, 1, 9, torch.float32),)
    )
    model = llama(2)
    for num_tokens in range(4, 12):
        model(torch.arange(num_tokens)[None], use_cache=False)
    (choice,) = fxopt.report(model).attentions
    assert choice.backend == "pytorch" and "nothing like q [1, 2, 4, 32]" in choice.why


def test_a_device_with_rows_is_asked_about_behind_one_without(monkeypatch) -> None:
    monkeypatch.setitem(TABLE, "meta", (Row("math", 1.3, 8, "none", False, False, 1, 9),))
    active, found = attending.Attending("auto"), []
    for device in ("cpu", "cpu", "meta", "meta"):
        q = torch.zeros(1, 2, 4, 8, device=device, dtype=torch.bfloat16)
        with attending.attending(active):
            attending.attend(partial(F.scaled_dot_product_attention, q, q, q), q)
        found.append([choice.backend for choice in active.choices.values()])
    assert found == [["pytorch"], ["pytorch"], ["pytorch", "math"], ["pytorch", "math"]]
    assert active.idle == {torch.device("cpu")}


def test_code_that_attends_otherwise_is_no_silent_fallback() -> None:
    q = torch.zeros(1, 2, 4, 8)
    named = attending.attending(attending.Attending("math"))
    with named, pytest.raises(AttentionRefused, match="calls no scaled_dot_product_attention"):
        attending.attend(lambda: (q @ q.mT).softmax(-1) @ q, q)
