"""Variable-length attention on packed keys; PyTorch's kernel is emulated, all else is what runs.

B batch, H heads, S queries, T keys, d channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import attention as of_torch
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fxopt.kernels import varlen
from fxopt.kernels.attention import TABLE, Choice, Row, attention, choose
from fxopt.kernels.attention_backends import BACKENDS, refusals
from fxopt.kernels.attention_call import Call, Window
from fxopt.kernels.varlen import Pack, pack_mask
from fxopt.recipe_errors import AttentionRefused
from fxopt.traffic import kind
from tests.kernels.emulated_varlen import Kernels, on_cpu
from tests.numerics import Tensors, assert_as_accurate

B, H, S, T, d = 3, 4, 5, 12, 8
CPU = torch.device("cpu")
HOLES = "111010111010 000000111111 111111100000"  # inside, in front, at the end


def mask_of(samples: str = HOLES) -> Tensor:
    """[B, 1, 1, T]; 1 is a key, 0 padding."""
    return torch.tensor([[c == "1" for c in sample] for sample in samples.split()])[:, None, None]


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    with on_cpu() as emulated:
        yield emulated


def qkv(
    dtype: torch.dtype = torch.float32, kv_heads: int = H, num_queries: int = S, seed: int = 0
) -> list[Tensor]:
    """As models lay them out, heads behind tokens; a run of a larger buffer."""
    torch.manual_seed(seed)
    sizes = ((num_queries, H), (T, kv_heads), (T, kv_heads))
    buffers = [torch.randn(B, n + 2, h, d).to(dtype) for n, h in sizes]
    return [b[:, 1:-1].transpose(1, 2).requires_grad_() for b in buffers]


def attend(
    inputs: list[Tensor],
    mask: Tensor | None,
    asked: str = "varlen",
    causal: bool = False,
    window: Window | None = None,
) -> Tensor:
    is_grouped = inputs[0].shape[1] != inputs[1].shape[1]
    return attention(*inputs, mask, 0.0, causal, 0.3, is_grouped, window, asked)


def with_gradients(out: Tensor, inputs: list[Tensor]) -> dict[str, Tensor]:
    weight = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape)
    gradients = torch.autograd.grad(out, inputs, weight.to(out.dtype))
    return {"out": out.detach()} | dict(zip("qkv", gradients, strict=True))


def assert_accurate(
    mask: Tensor | None,
    dtype: torch.dtype,
    kv_heads: int = H,
    causal: bool = False,
    window: Window | None = None,
) -> None:
    def three(seed: int) -> tuple[Tensors, Tensors, Tensors]:
        inputs = qkv(dtype, kv_heads, T if causal or window else S, seed)
        exact = [t.detach().double().requires_grad_() for t in inputs]
        found, eager = (
            attend(inputs, mask, asked, causal, window) for asked in ("varlen", "pytorch")
        )
        truth = with_gradients(attend(exact, mask, "math", causal), exact)
        return with_gradients(found, inputs), with_gradients(eager, inputs), truth

    assert_as_accurate(*three(0), again=three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_under_a_padding_mask(dtype: torch.dtype, kv_heads: int, kernels: Kernels) -> None:
    assert_accurate(mask_of(), dtype, kv_heads)
    assert set(kernels.calls) == {"forward", "backward"}


@pytest.mark.parametrize("causal", [False, True])
def test_without_a_mask_nothing_is_packed(causal: bool, kernels: Kernels, monkeypatch) -> None:
    monkeypatch.setattr(varlen, "pack_mask", None)
    assert_accurate(None, torch.float32, causal=causal)
    assert kernels.calls[:2] == ["forward", "backward"]


@pytest.mark.parametrize("sides", [(3, 0), (0, 0), (2, 5), (-1, 2), (4, -1)])
@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("additive", [False, True])
def test_a_window_is_told_and_its_mask_not_read(
    sides: tuple[int, int], kv_heads: int, additive: bool, kernels: Kernels, monkeypatch
) -> None:
    monkeypatch.setattr(varlen, "pack_mask", None)
    left, right = (T if n < 0 else n for n in sides)
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril(right).triu(-left)
    mask = torch.where(mask, 0.0, -torch.inf) if additive else mask
    dtype = torch.float32 if additive else torch.bfloat16
    assert_accurate(mask, dtype, kv_heads, window=Window(*sides))
    assert kernels.windows == {sides}


def test_keys_that_are_left_out_have_no_gradient(kernels: Kernels) -> None:
    """Exactly zero, although the kernel leaves NaN behind the last packed row."""
    inputs, mask = qkv(), mask_of()
    found = with_gradients(attend(inputs, mask), inputs)
    for name in "kv":
        rows = found[name].transpose(1, 2)
        assert not rows[~mask[:, 0, 0]].any()
        assert (rows[mask[:, 0, 0]] != 0).any((1, 2)).all()
    assert all(found[name].isfinite().all() for name in found)


@pytest.mark.parametrize("samples", ["1" * T + " " + "0" * T + " " + "1" * T, "000000000000 " * B])
def test_a_sample_without_keys_is_zero_as_pytorch_has_it(samples: str, kernels: Kernels) -> None:
    inputs, mask = qkv(), mask_of(samples)
    found, own = (
        with_gradients(attend(inputs, mask, asked), inputs) for asked in ("varlen", "pytorch")
    )
    for name, tensor in found.items():
        assert torch.equal(tensor[1], torch.zeros_like(tensor[1])), name
        # One product of fp32 in another order.
        torch.testing.assert_close(tensor, own[name], rtol=1e-5, atol=1e-6)


FULL = mask_of().expand(B, H, S, T)


@pytest.mark.parametrize(
    "mask",
    [
        mask_of().expand(B, 1, S, T),
        FULL,
        mask_of()[:1],
        mask_of()[:1, 0].expand(H, S, T),
        torch.ones(B, 1, 1, 1, dtype=torch.bool),
    ],
    ids=lambda mask: f"{list(mask.shape)}",
)
def test_masks_that_are_the_same_for_all_queries_and_heads(mask: Tensor, kernels: Kernels) -> None:
    assert_accurate(mask, torch.float32)


@pytest.mark.parametrize(
    "mask, causal, part",
    [
        (FULL.contiguous(), False, "the mask may differ between queries or heads"),
        (FULL[:, :, :1].contiguous(), False, "the mask may differ between queries or heads"),
        (FULL[:, :1].contiguous(), False, "the mask may differ between queries or heads"),
        (FULL[0, 0].contiguous(), False, "the mask may differ between queries or heads"),
        (torch.zeros(B, 1, 1, T), False, "the mask is added to the scores"),
        (mask_of(), True, "the call is causal and has a mask"),
        (None, True, "has not as many keys as queries"),
    ],
    ids=str,
)
def test_what_it_refuses(mask: Tensor | None, causal: bool, part: str, kernels: Kernels) -> None:
    with pytest.raises(AttentionRefused, match=part):
        attend(qkv(), mask, causal=causal)
    assert kernels.calls == []


def test_all_reasons_are_collected() -> None:
    """On this machine there is no kernel; what is wrong besides is said with it."""
    q, k, v = (torch.randn(B, H, n, 12) for n in (S, T, T))
    with pytest.raises(AttentionRefused) as caught:
        attention(q, k, v, FULL.contiguous(), 0.1, False, None, False, None, "varlen")
    text = str(caught.value)
    assert "attention='varlen' cannot run q [3, 4, 5, 12]" in text and "boolean mask" in text
    for part in (
        "may differ between queries",
        "has no dropout",
        "12 channels, no multiple of 8",
        "PyTorch has no torch.nn.attention.varlen on cpu",
        "attention='auto'",
    ):
        assert part in text


def test_a_cpu_has_no_kernel() -> None:
    with pytest.raises(AttentionRefused) as caught:
        attend(qkv(), mask_of())
    assert caught.value.reasons == ("PyTorch has no torch.nn.attention.varlen on cpu",)


def test_it_takes_the_flash_attention_that_is_in_place(kernels: Kernels, monkeypatch) -> None:
    monkeypatch.setattr(of_torch, "current_flash_attention_impl", lambda: "FA3")
    attend(qkv(), mask_of())
    assert kernels.calls == ["forward"]


def test_the_table_can_name_it(kernels: Kernels, monkeypatch) -> None:
    row = Row("varlen", 1.4, d, "padding", False, False, 1, 64, torch.float32)
    monkeypatch.setitem(TABLE, "cpu", (row,))
    inputs = qkv()
    call = Call.of(*inputs, mask_of().expand(B, 1, S, T))
    assert choose("auto", lambda: call).backend == "varlen"
    attend(inputs, mask_of(), "auto")
    assert kernels.calls == ["forward"]
    dense = choose("auto", lambda: Call.of(*inputs, FULL.contiguous()))
    assert dense.backend == "pytorch" and dense.why.startswith("nothing like q [3, ")


def test_a_row_that_cannot_run_here_is_left_out(monkeypatch) -> None:
    row = Row("varlen", 1.4, d, "padding", False, False, 1, 64, torch.float32)
    monkeypatch.setitem(TABLE, "cpu", (row,))
    found = choose("auto", lambda: Call.of(*qkv(), mask_of()))
    why = "PyTorch has no torch.nn.attention.varlen on cpu"
    measured = "1.4x PyTorch's own choice as measured on cpu"
    assert found == Choice("pytorch", f"varlen is {measured}, but refuses: {why}")


def test_other_functions_run_as_they_are(kernels: Kernels) -> None:
    """And attention outside of the op is PyTorch's own."""
    inputs = qkv()
    attend(inputs, mask_of())
    F.scaled_dot_product_attention(*inputs, mask_of())
    assert kernels.calls == ["forward"]


masks = st.integers(1, 4).flatmap(
    lambda num_keys: st.lists(
        st.lists(st.booleans(), min_size=num_keys, max_size=num_keys), min_size=1, max_size=4
    )
)


@settings(max_examples=100, deadline=None)
@given(masks)
def test_packing(rows: list[list[bool]]) -> None:
    is_kept_BT = torch.tensor(rows)
    packing = pack_mask(is_kept_BT)
    kept = is_kept_BT.flatten().nonzero().flatten().tolist()
    source_N = packing.sample_N * is_kept_BT.shape[1] + packing.key_N
    assert source_N[: len(kept)].tolist() == kept
    assert packing.row_BT[is_kept_BT].tolist() == list(range(len(kept)))
    sizes = [sum(row) for row in rows]
    assert packing.offsets.tolist() == [sum(sizes[:b]) for b in range(len(rows) + 1)]
    assert packing.offsets.dtype == torch.int32
    for index in (source_N, packing.row_BT):  # also where any will do
        assert index.min() >= 0 and index.max() < is_kept_BT.numel()


@pytest.mark.parametrize("samples", [HOLES, "000000000000 " * B, "111111111111 " * B])
def test_pack_is_a_gather_both_ways(samples: str) -> None:
    *places, _ = pack_mask(mask_of(samples)[:, 0, 0])
    x = torch.randn(B, 2, T, d, dtype=torch.float64, requires_grad=True)
    rows = Pack.apply(x, *places)
    used = rows[: int(places[-1].sum())]
    assert torch.equal(used, x.transpose(1, 2)[places[-1]])
    assert torch.autograd.gradcheck(lambda x: Pack.apply(x, *places)[: len(used)], x)


@pytest.mark.parametrize("shape", [(T, d), (H, T, d), (1, B, H, T, d)], ids=str)
def test_other_numbers_of_dims_are_refused(shape: tuple[int, ...], kernels: Kernels) -> None:
    x = torch.randn(shape)
    with pytest.raises(AttentionRefused, match="4 dimensional"):
        attention(x, x, x, None, 0.0, False, None, False, None, "varlen")


def test_one_set_of_keys_for_the_batch(kernels: Kernels) -> None:
    q, k, v = qkv()
    for mask in (mask_of(), None):
        shared = [q, k[:1], v[:1]]
        # One product of fp32 in another order.
        expected = F.scaled_dot_product_attention(q, k[:1].expand_as(k), v[:1].expand_as(v), mask)
        found = attention(*shared, mask, 0.0, False, None, False, None, "varlen")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(RuntimeError, match="expanded size"):
            attention(q, k[:2], v[:2], mask, 0.0, False, None, False, None, "varlen")


def test_heads_that_are_expanded(kernels: Kernels) -> None:
    q, k, v = qkv(kv_heads=1)
    wide = [q, *(t.expand(B, H, T, d) for t in (k, v))]
    own = with_gradients(attend(wide, mask_of(), "math"), [q, k, v])
    found = with_gradients(attend(wide, mask_of()), [q, k, v])
    for name, tensor in found.items():  # one product of fp32 in another order
        torch.testing.assert_close(tensor, own[name], rtol=1e-5, atol=1e-5, msg=name)


def test_under_autocast(kernels: Kernels) -> None:
    inputs = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend(inputs, mask_of())
        own = F.scaled_dot_product_attention(*inputs, mask_of(), scale=0.3)
    assert found.dtype == own.dtype == torch.bfloat16
    half = [t.to(torch.bfloat16) for t in inputs]
    assert torch.equal(found, attend(half, mask_of()))
    gradients = with_gradients(found, inputs)
    assert all(gradients[name].dtype == torch.float32 for name in "qkv")


def test_without_gradients_nothing_is_kept(kernels: Kernels) -> None:
    inputs = qkv()
    with torch.no_grad():
        out = attend(inputs, mask_of())
    assert out.grad_fn is None and kernels.calls == ["forward"]


def test_a_checkpoint_runs_it_again(kernels: Kernels) -> None:
    inputs, mask = qkv(), mask_of()
    direct = with_gradients(attend(inputs, mask), inputs)
    out = checkpoint(attend, inputs, mask, use_reentrant=False)
    again = with_gradients(out, inputs)
    assert kernels.calls[2:] == ["forward", "forward", "backward"]
    assert all(torch.equal(direct[name], again[name]) for name in direct)


def test_backward_keeps_packed_keys_and_no_others(kernels: Kernels) -> None:
    inputs, kept = qkv(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = attend(inputs, mask_of())
    *_, k, v, kept_out = (t for t in kept if t.dtype == torch.float32 and t.dim() == 3)
    assert kept_out.data_ptr() == out.data_ptr() and k.shape == v.shape == (B * T, H, d)
    kept_data = {t.untyped_storage().data_ptr() for t in kept}
    assert kept_data.isdisjoint(t.untyped_storage().data_ptr() for t in inputs[1:])


def test_it_counts_as_attention(kernels: Kernels) -> None:
    inputs, mask = qkv(num_queries=T), mask_of()
    with FlopCounterMode(display=False) as counted:
        attend(inputs, mask).sum().backward()
    for name in ("_varlen_attn", "_varlen_attn_backward"):
        assert kind(getattr(torch.ops.torch_attn, name).default) == "attention"
    if torch.ops.torch_attn._varlen_attn not in flop_registry:
        pytest.skip("this PyTorch counts no FLOPs of its varlen_attn")  # 2.11
    # Two products forward and five backward, of the pairs of queries and keys that are left.
    assert counted.get_total_flops() == 7 * 2 * H * T * int(mask.sum()) * d


def test_opcheck(kernels: Kernels) -> None:
    tests = ("test_schema", "test_autograd_registration", "test_aot_dispatch_dynamic")
    for mask in (mask_of(), None):
        arguments = (*qkv(), mask, 0.0, False, None, False, None, "varlen")
        torch.library.opcheck(attention, arguments, test_utils=tests)


def test_nothing_waits_for_the_device() -> None:
    """A value that is read on the host, or a shape that depends on one, would end this trace."""
    with FakeTensorMode():
        q, k, v = (torch.empty(B, H, n, d) for n in (S, T, T))
        mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
        graph = make_fx(lambda *given: varlen.attention(*given))(q, k, v, mask)
    ops = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert "torch_attn._varlen_attn.default" in ops
    assert not any("scatter" in op or "index_add" in op or "accumulate" in op for op in ops)


@pytest.mark.parametrize("is_expanded", [False, True])
def test_other_sizes_and_masks_do_not_recompile(is_expanded: bool, kernels: Kernels) -> None:
    num_graphs = 0

    def backend(gm: torch.fx.GraphModule, inputs: list) -> object:
        nonlocal num_graphs
        num_graphs += 1
        return gm.forward

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        mask = mask.expand(-1, 1, q.shape[2], -1) if is_expanded else mask
        return attention(q, k, v, mask, 0.0, False, None, False, None, "varlen")

    torch._dynamo.reset()
    compiled = torch.compile(run, backend=backend, dynamic=True)
    for batch, num_queries, num_keys in ((2, 5, 12), (3, 7, 9), (4, 16, 30)):
        q, k, v = (torch.randn(batch, H, n, d) for n in (num_queries, num_keys, num_keys))
        mask = torch.rand(batch, 1, 1, num_keys) > 0.5
        expected = F.scaled_dot_product_attention(q, k, v, mask)
        # One product of fp32 in another order.
        torch.testing.assert_close(compiled(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)
    assert num_graphs == 1 and kernels.calls == ["forward"] * 3


@pytest.mark.parametrize("has_option", [False, True])
def test_grouped_heads_are_named_where_pytorch_knows_the_option(has_option, monkeypatch) -> None:
    """2.11 does not, and takes them without it."""
    seen: list[dict] = []

    def of_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
        seen.append({})

    def of_2_12(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=False
    ):
        seen.append({"enable_gqa": enable_gqa})

    stub = of_2_12 if has_option else of_2_11
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", stub)
    varlen._kernel.cache_clear()
    try:
        for is_grouped in (False, True):
            varlen._kernel(is_grouped)(*range(7), scale=None, window_size=(-1, -1))
    finally:
        varlen._kernel.cache_clear()
    assert seen == ([{"enable_gqa": False}, {"enable_gqa": True}] if has_option else [{}, {}])


def test_the_arguments_are_those_of_pytorch() -> None:
    known = inspect.signature(varlen_attn).parameters
    assert [*known][:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert {"scale", "window_size"} <= known.keys()


def test_padding_is_described_without_a_guard() -> None:
    kinds = []

    def run(q: Tensor, mask: Tensor) -> Tensor:
        for each in (mask[:, None, None], mask[:, None, None].expand(-1, H, q.shape[2], -1)):
            kinds.append(Call.of(q, q, q, each).mask_kind)
        kinds.append(Call.of(q, q, q, mask[:, None, :, None] & mask[:, None, None]).mask_kind)
        return q + q.shape[2]

    q, mask = torch.empty(B, H, T, d), torch.ones(B, T, dtype=torch.bool)
    traced = make_fx(run, tracing_mode="symbolic")(q, mask)
    assert kinds == ["padding", "padding", "boolean"]
    assert not traced.shape_env.guards


def test_the_plain_kernels_are_asked_with_the_mask() -> None:
    call = Call.of(*qkv(), torch.ones(B, 3, 1, T, dtype=torch.bool))
    assert any("mask" in why for why in refusals(BACKENDS["flash"], call))
