"""Backends of attention: what runs, what is refused and why, what the table says."""

from __future__ import annotations

import json
import threading
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import attention as of_torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contest import RESULTS
from fxopt.kernels import attention as kernels
from fxopt.kernels.attention import TABLE, Choice, Row, attention, choose, steers
from fxopt.kernels.attention_backends import BACKENDS, refusals
from fxopt.kernels.attention_call import Call
from fxopt.recipe_errors import AttentionRefused, UnknownAttention
from fxopt.recipe_problems import CHOICES
from tests.numerics import assert_as_accurate

CPU = torch.device("cpu")
ON_A_CPU = ("flash", "math")
ROW = Row("math", 1.31, 8, "none", False, False, 8, 32, torch.float32)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype).requires_grad_()


def qkv(dtype: torch.dtype = torch.float32, kv_heads: int = 4) -> list[Tensor]:
    torch.manual_seed(0)
    return [draw(2, h, 16, 8, dtype=dtype) for h in (4, kv_heads, kv_heads)]


def attend(inputs: list[Tensor], asked: str, mask: Tensor | None = None, causal=False) -> Tensor:
    grouped = inputs[0].shape[1] != inputs[1].shape[1]
    return attention(*inputs, mask, 0.0, causal, 0.3, grouped, None, asked)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    gradients = torch.autograd.grad(out, inputs, weight)
    return {"out": out.detach()} | dict(zip("qkv", gradients, strict=True))


def ran(out: Tensor) -> str:
    """The backend, by the node that it leaves."""
    assert out.grad_fn is not None
    return "flash" if "FlashAttention" in out.grad_fn.name() else "math"


def switches() -> tuple[list[SDPBackend], list[int]]:
    return of_torch._cur_sdpa_kernel_backends(), torch._C._get_sdp_priority_order()


def test_recipes_know_the_backends() -> None:
    assert ("auto", "pytorch", *BACKENDS, "fp8") == CHOICES["attention"]


def test_no_row_without_a_run_behind_it() -> None:
    saved = RESULTS.glob("attention_*.json")
    devices = {json.loads(path.read_text())["environment"]["device"] for path in saved}
    assert set(TABLE) <= devices


@pytest.mark.parametrize("backend", ON_A_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "causal", "boolean", "additive", "grouped"])
def test_a_backend_by_name(backend: str, dtype: torch.dtype, kind: str) -> None:
    inputs = qkv(dtype, 2 if kind == "grouped" else 4)
    mask = None
    if kind == "boolean":
        mask = torch.ones(2, 1, 1, 16, dtype=torch.bool)
        mask[..., -3:] = False
    elif kind == "additive":
        mask = torch.linspace(-2, 2, 256).view(16, 16).to(dtype)
    before = switches()
    out = attend(inputs, backend, mask, kind == "causal")
    assert switches() == before
    assert ran(out) == backend
    eager = attend(inputs, "pytorch", mask, kind == "causal")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    wide = mask.double() if kind == "additive" else mask
    truth = with_gradients(attend(exact, "math", wide, kind == "causal"), exact)
    assert_as_accurate(with_gradients(out, inputs), with_gradients(eager, inputs), truth)


@pytest.mark.parametrize("backend", ["cudnn", "efficient", "flash3", "flash4"])
def test_what_a_cpu_has_not_is_refused(backend: str) -> None:
    before = switches()
    with pytest.raises(AttentionRefused) as caught:
        attend(qkv(torch.bfloat16), backend)
    assert switches() == before
    text = str(caught.value)
    assert f"attention={backend!r} cannot run q [2, 4, 16, 8], k [2, 4, 16, 8]" in text
    assert "in bfloat16 on cpu, no mask" in text and "attention='auto'" in text
    reason = {"flash3": "FA3", "flash4": "FA4"}.get(backend, "on cpu")
    assert any(reason in why for why in caught.value.reasons)


def test_all_reasons_are_collected() -> None:
    """PyTorch stops at its first; each aspect of the call is asked about on its own."""
    q, k, v = draw(2, 4, 16, 8), draw(2, 4, 16, 8), draw(2, 4, 16, 6)
    call = Call.of(q.mT.contiguous().mT, k, v, torch.ones(4, 16, 16, dtype=torch.bool), 0.1)
    reasons = refusals(BACKENDS["flash"], call)
    for part in ("same last dimension", "dropout", "attn mask shapes", "stride 1"):
        assert sum(part in why for why in reasons) == 1, (part, reasons)
    assert refusals(BACKENDS["math"], call) == ()


@pytest.mark.parametrize(
    "changes, part",
    [
        ({"mask": ((16, 16), torch.float32, True)}, "the mask gets a gradient"),
        ({"tokens": (16, 0)}, "zero seq_len"),
        ({"batch": ()}, "4 dimensional"),
        ({"heads": (4, 3), "is_grouped": True}, "heads"),
    ],
)
def test_reasons_of_pytorch(changes: dict, part: str) -> None:
    call = Call(CPU, torch.float32, tokens=(16, 16))._replace(**changes)
    assert any(part in why for why in refusals(BACKENDS["flash"], call))


def test_the_flash_attention_in_place_is_the_one_asked_for(monkeypatch) -> None:
    assert refusals(BACKENDS["flash"], Call(CPU)) == ()
    monkeypatch.setattr(of_torch, "current_flash_attention_impl", lambda: "FA3")
    (why,) = refusals(BACKENDS["flash"], Call(CPU))
    assert "FA3 is in the place" in why and "restore_flash_attention_impl()" in why
    assert refusals(BACKENDS["flash3"], Call(CPU)) == ()
    (why,) = refusals(BACKENDS["flash4"], Call(CPU))
    assert "FA4 is not in the place" in why and "activate_flash_attention_impl('FA4')" in why
    with pytest.raises(AttentionRefused, match="FA3 is in the place"):
        attend(qkv(), "flash")


def test_an_error_that_is_no_refusal_stays_what_it_is() -> None:
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match="size") as caught:
        attention(q, k[..., :4], v, None, 0.0, False, None, False, None, "math")
    assert not isinstance(caught.value, AttentionRefused)


def test_threads_do_not_see_each_other() -> None:
    before, found = switches(), dict.fromkeys(ON_A_CPU, True)

    def work(backend: str) -> None:
        inputs = qkv()
        for _ in range(200):
            found[backend] &= ran(attend(inputs, backend)) == backend

    threads = [threading.Thread(target=work, args=(backend,)) for backend in ON_A_CPU]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(ON_A_CPU, True) and switches() == before


def test_opcheck() -> None:
    tests = ("test_schema", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for backend in ON_A_CPU:
        arguments = (*qkv(), None, 0.0, False, None, False, None, backend)
        torch.library.opcheck(attention, arguments, test_utils=tests)


def test_a_description_adds_no_guard() -> None:
    calls = []

    def run(q: Tensor) -> Tensor:
        calls.append(Call.of(q, q, q))
        return q + q.shape[2]

    traced = make_fx(run, tracing_mode="symbolic")(torch.empty(2, 4, 16, 8))
    assert traced.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    assert calls == [Call.of(*[torch.empty(2, 4, 16, 8)] * 3)]
    assert not traced.shape_env.guards


def described(**changes) -> Call:
    return Call(CPU, torch.float32, (2,), (4, 4), (16, 16), (8, 8))._replace(**changes)


def chosen(call: Call) -> Choice:
    return choose("auto", lambda: call)


def test_a_name_that_is_no_backend_is_refused() -> None:
    with pytest.raises(UnknownAttention, match="unknown attention backend 'flsh'"):
        attend(qkv(), "flsh")


def test_an_empty_table_leaves_the_choice_to_pytorch() -> None:
    assert not steers("auto", CPU) and not steers("pytorch", CPU) and steers("flash", CPU)
    assert chosen(described()) == Choice("pytorch", "nothing has been measured on cpu")
    on_gpu = choose("auto", described, "NVIDIA H200")
    why = "nothing has been measured on NVIDIA H200: python -m bench.attention prints the rows"
    assert on_gpu == Choice("pytorch", why)
    inputs = qkv()
    assert torch.equal(attend(inputs, "auto"), attend(inputs, "pytorch"))


def test_a_plan_finds_the_device_by_its_words(monkeypatch) -> None:
    """And asks this machine nothing about it."""
    monkeypatch.setitem(TABLE, "NVIDIA GB200", (ROW._replace(backend="flash"),))
    monkeypatch.setitem(TABLE, "NVIDIA H100 80GB HBM3", (ROW._replace(backend="cudnn"),))
    on_h100 = Choice("cudnn", "1.31x PyTorch's own choice as measured on NVIDIA H100 80GB HBM3")
    assert choose("auto", described, "h100") == on_h100
    for target in ("h200", "b200"):
        backend, why = choose("auto", described, target)
        assert backend == "pytorch" and f"nothing has been measured on {target}: " in why


def test_queries_without_batch_or_heads() -> None:
    q = torch.randn(16, 8)
    for each in (q, q[None], q[None, None], q[None, None, None]):
        assert Call.of(each, each, each).tensors()[0].shape[-2:] == (16, 8)
        out = attention(each, each, each, None, 0.0, False, None, False, None, "math")
        # One product of fp32 in another order.
        expected = F.scaled_dot_product_attention(each, each, each)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_the_row_that_holds_is_taken(monkeypatch) -> None:
    monkeypatch.setitem(TABLE, "cpu", (ROW,))
    assert steers("auto", CPU) and not steers("pytorch", CPU)
    assert chosen(described()) == Choice("math", "1.31x PyTorch's own choice as measured on cpu")
    assert ran(attend(qkv(), "auto")) == "math"


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": (7, 16)},
        {"tokens": (16, 33)},
        {"head_dims": (16, 16)},
        {"head_dims": (8, 16)},
        {"is_causal": True},
        {"heads": (4, 2), "is_grouped": True},
        {"mask": ((16, 16), torch.bool, False)},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_a_row_is_for_calls_of_its_kind(changes: dict, monkeypatch) -> None:
    monkeypatch.setitem(TABLE, "cpu", (ROW,))
    backend, why = chosen(described(**changes))
    assert backend == "pytorch" and why.startswith("nothing like q [2, ")
    assert why.endswith(" has been measured on cpu")


def test_a_row_whose_backend_refuses_is_left_out_with_its_reasons(monkeypatch) -> None:
    monkeypatch.setitem(TABLE, "cpu", (ROW._replace(backend="cudnn"),))
    backend, why = chosen(described())
    assert backend == "pytorch"
    assert why.startswith("cudnn is 1.31x") and "but refuses: " in why and "on cpu" in why
    inputs = qkv()
    assert torch.equal(attend(inputs, "auto"), attend(inputs, "pytorch"))


def test_what_the_user_switched_off_is_not_chosen(monkeypatch) -> None:
    monkeypatch.setitem(TABLE, "cpu", (ROW,))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        backend, why = chosen(described())
    assert backend == "pytorch" and "switched off in torch.backends.cuda" in why


def test_the_choice_is_asked_for_once_per_kind(monkeypatch) -> None:
    monkeypatch.setitem(TABLE, "cpu", (ROW._replace(backend="flash"),))
    asked = []
    ask = torch._fused_sdp_choice
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *a, **k: asked.append(a) or ask(*a, **k))
    for _ in range(3):
        chosen(described(dropout_p=0.25))
    # The call, one that all kernels take, and one for each aspect; nothing the second time.
    num_asked = len(asked)
    chosen(described(dropout_p=0.25))
    assert num_asked > 1 and len(asked) == num_asked


def test_without_a_backend_nothing_is_described() -> None:
    run = partial(F.scaled_dot_product_attention, *qkv())

    def never() -> Call:
        raise AssertionError("described")

    assert torch.equal(kernels.attend(choose("pytorch", never), never, run), run())
