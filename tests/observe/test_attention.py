"""Recorded attention calls: what is noted, maps, the spread of the values, memory, and engines around the model."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lora_lite.observe import attention
from lora_lite.observe.attention import Call
from lora_lite.testing import toy

TRACES = [[0, 0.83012249673, 1.15578822866, 3.02635487732], [0, 0.62689487162, 3.56839344441, 6.36300101438]]


def golden(dtype=torch.float64):
    """The call of closed-form numbers, (1, 2, 4, 3), causal, whose traces are TRACES (by mpmath at 30 digits)."""
    h = torch.arange(2, dtype=dtype)[:, None, None]
    t, d = torch.arange(4, dtype=dtype)[:, None], torch.arange(3, dtype=dtype)
    q, k = torch.sin(0.3 + 0.7 * h + 0.5 * t + 0.9 * d), torch.cos(0.2 + 0.4 * h + 0.8 * t + 0.6 * d)
    v = 2 * torch.sin(0.1 + 0.9 * h + 1.1 * t + 0.4 * d)
    return Call("layer", *(x[None].requires_grad_() for x in (q, k, v)), is_causal=True)


def random(*, T=7, S=7, H=4, Hk=4, E=6, D=6, dtype=torch.float64, **fields):
    shapes = ((2, H, T, E), (2, Hk, S, E), (2, Hk, S, D))
    tensors = (toy.inputs(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes))
    return Call("layer", *tensors, **fields)


def dense(call):
    """tr Cov_w(v) by its definition, one dimension after the other, on explicit weights in float64."""
    q, k, v = (x.double() for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * (call.scale or q.shape[-1] ** -0.5)
    if call.is_causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=torch.float64).triu(1)
    if call.mask is not None:
        scores = scores.masked_fill(~call.mask, -math.inf) if call.mask.dtype == torch.bool else scores + call.mask
    w = scores.softmax(-1)
    return (w @ v.square() - (w @ v).square()).clamp_min(0).sum(-1)


def relative(got, want):
    return float((got - want).detach().abs().max() / want.detach().abs().max())


def band(T, S):
    """May attend: keys up to t + (S - T)."""
    return torch.ones(T, S, dtype=torch.bool).tril(S - T)


def additive(allowed):
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_traces_of_the_closed_form_call():
    trace = attention.value_trace(golden())
    assert trace.dtype == torch.float64
    torch.testing.assert_close(trace, torch.tensor([TRACES], dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(attention.value_trace(golden(torch.float32)), torch.tensor([TRACES]), atol=1e-5, rtol=0)


def test_two_keys_of_equal_score_at_plus_and_minus_three_have_trace_nine():
    q = torch.zeros(1, 1, 2, 1)
    call = Call("", q, q, torch.tensor([3.0, -3.0]).reshape(1, 1, 2, 1), is_causal=True)
    torch.testing.assert_close(attention.value_trace(call), torch.tensor([[[0.0, 9.0]]]))


def test_equal_values_have_no_trace_at_any_offset():
    call = random(is_causal=True, dtype=torch.float32)
    v = torch.full_like(call.v, 100.0)
    assert float(attention.value_trace(Call("", call.q, call.k, v, is_causal=True)).detach().max()) < 1e-9


CASES = {
    "causal": {"is_causal": True},
    "bidirectional": {},
    "scale": {"is_causal": True, "scale": 0.7},
    "grouped queries": {"is_causal": True, "Hk": 2, "enable_gqa": True},
    "a width of values of its own": {"is_causal": True, "E": 6, "D": 11},
    "narrow values": {"is_causal": True, "E": 12, "D": 3},
    "boolean mask": {"mask": band(7, 7)},
    "additive mask": {"mask": additive(band(7, 7)) + 0.3},
    "mask per sample": {"mask": band(7, 7) & (torch.arange(7) < torch.tensor([7, 4])[:, None])[:, None, None]},
    "more keys than queries": {"T": 3, "S": 7, "mask": band(3, 7)},
    "flag with more keys than queries": {"T": 3, "S": 7, "is_causal": True},
    "wide heads, two calls": {"is_causal": True, "E": 256, "D": 256},
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_trace_and_its_gradient_agree_with_explicit_weights(case, dtype, tolerance):
    call = random(**case, dtype=dtype)
    got, want = attention.value_trace(call), dense(call)
    assert got.shape == call.q.shape[:-1]
    assert relative(got, want) < tolerance
    weights = toy.inputs(*want.shape, dtype=torch.float64, seed=9)
    inputs = (call.q, call.k, call.v)
    for g, w in zip(*(torch.autograd.grad((trace * weights).sum(), inputs) for trace in (got, want)), strict=True):
        assert relative(g, w) < tolerance


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_maps_carry_the_values_to_the_output_of_the_call(case):
    call = random(**case)
    flags = {"is_causal": call.is_causal, "scale": call.scale, "enable_gqa": call.enable_gqa}
    mask = call.mask.double() if call.mask is not None and call.mask.is_floating_point() else call.mask
    want = F.scaled_dot_product_attention(call.q, call.k, call.v, mask, **flags)
    v = call.v.repeat_interleave(call.q.shape[1] // call.v.shape[1], 1)
    torch.testing.assert_close(attention.maps(call) @ v, want)


def test_a_query_that_may_see_nothing_has_no_weights_no_trace_and_finite_gradients():
    call = random(mask=band(7, 7) & (torch.arange(7) > 1))
    assert not attention.maps(call)[..., :2, :].any()
    trace = attention.value_trace(call)
    assert not trace[..., :2].any()
    for gradient in torch.autograd.grad(trace.sum() + attention.maps(call).square().sum(), (call.q, call.k, call.v)):
        assert gradient.isfinite().all()


def test_a_common_offset_of_the_values_moves_a_float32_trace_by_rounding_only():
    call = random(is_causal=True)
    exact = attention.value_trace(call)
    far = [x.float() for x in (call.q, call.k, call.v + 100)]
    near = attention.value_trace(Call("", *far, is_causal=True))
    assert relative(near.double(), exact) < 3e-5
    w, v = attention.maps(Call("", *far, is_causal=True)), far[2]
    plain = (w @ v.square() - (w @ v).square()).sum(-1)
    assert relative(plain.double(), exact) > 1e-4  # what centring saves


def test_half_precision_and_autocast_are_computed_in_float32():
    call = random(is_causal=True, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trace, maps = attention.value_trace(call), attention.maps(call)
    assert trace.dtype == maps.dtype == torch.float32
    assert relative(trace, dense(call)) < 1e-5
    assert relative(maps.sum(-1), torch.ones(2, 4, 7)) < 1e-6


@pytest.mark.parametrize(
    ("fields", "causal"),
    [
        ({"is_causal": True}, True),
        ({}, False),
        ({"mask": band(7, 7)}, True),
        ({"mask": additive(band(7, 7))}, True),
        ({"mask": torch.zeros(7, 7).masked_fill(~band(7, 7), torch.finfo(torch.float32).min)}, True),
        ({"mask": CASES["mask per sample"]["mask"]}, True),
        ({"mask": torch.ones(7, 7, dtype=torch.bool)}, False),
        ({"mask": torch.ones(2, 1, 1, 7, dtype=torch.bool)}, False),
        ({"mask": band(7, 7) | torch.eye(7, dtype=torch.bool).roll(1, 1)}, False),
        ({"T": 3, "S": 7, "mask": band(3, 7)}, True),
        ({"T": 3, "S": 7, "mask": band(4, 7)[1:].roll(1, 1)}, False),
    ],
)
def test_causal_is_what_forbids_every_later_key(fields, causal):
    assert attention.is_causal(random(**fields)) is causal


def test_a_mask_that_layers_share_is_looked_at_once(monkeypatch):
    looked, is_causal, mask = [], attention.is_causal, band(7, 7)
    monkeypatch.setattr(attention, "is_causal", lambda call: looked.append(call) or is_causal(call))
    shared = [random(mask=mask) for _ in range(3)]
    calls = [*shared, random(mask=~mask), random(is_causal=True), random()]
    assert attention.causal(calls) == [*shared, calls[4]]
    assert looked == [calls[0], *calls[3:]]


# --- memory -----------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made inside holds; the quadratic kernel makes its scores as a tensor."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.untyped_storage().nbytes() // x.itemsize for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *made])
        return out


def largest(compute, T, **fields):
    call = random(T=T, S=T, H=1, Hk=1, dtype=torch.float32, **fields)
    with Largest() as seen:
        compute(call).sum().backward()
    return seen.numbers


@pytest.mark.parametrize("fields", [{"E": 8, "D": 8}, {"E": 256, "D": 256}], ids=["one call", "two calls"])
def test_forward_and_backward_of_the_trace_make_no_tensor_of_queries_times_keys(fields):
    short, long = (largest(attention.value_trace, T, is_causal=True, **fields) for T in (256, 1024))
    assert long == 4 * short
    assert largest(attention.maps, 1024, is_causal=True) >= 1024**2


class Squares(TorchDispatchMode):
    """The floating-point tensors of at least `least` numbers made inside, by where they are stored."""

    def __init__(self, least):
        super().__init__()
        self.least, self.held = least, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if (
                isinstance(x, torch.Tensor)
                and x.is_floating_point()
                and x.untyped_storage().nbytes() >= self.least * x.itemsize
            ):
                self.held[x.untyped_storage().data_ptr()] = x  # held, so that no other gets the place
        return out


@pytest.mark.parametrize("kind", [torch.bool, torch.bfloat16, torch.float32])
def test_layers_with_one_mask_share_one_wide_copy_of_it(kind):
    allowed = torch.ones(1, 1, 256, 256, dtype=torch.bool).tril()
    allowed[..., :3] = False
    mask = allowed if kind == torch.bool else torch.zeros(allowed.shape, dtype=kind).masked_fill(~allowed, -torch.inf)
    calls = [random(T=256, S=256, H=1, Hk=1, E=8, D=8, dtype=torch.float32, mask=mask) for _ in range(3)]
    with Squares(256 * 256) as made:
        traces = attention.value_traces(calls)
        sum(trace.sum() for trace in traces).backward()
    assert len(made.held) <= (kind != torch.float32)
    assert all(torch.equal(trace, attention.value_trace(call)) for trace, call in zip(traces, calls))


# --- recording --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, causal=True):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(8, 24), nn.Linear(8, 8), causal

    def forward(self, x):
        q, k, v = (y.view(*y.shape[:-1], 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Stack(nn.Module):
    """Two attention layers under activation checkpointing or not."""

    def __init__(self, run=lambda layer, x: layer(x)):
        super().__init__()
        self.layers, self.run = nn.ModuleList([Attention(), Attention(causal=False)]), run

    def forward(self, x):
        for layer in self.layers:
            x = x + self.run(layer, x)
        return x


def stack(**fields):
    return toy.seeded(lambda: Stack(**fields))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_calls_are_named_by_the_running_module_and_carry_the_models_own_tensors():
    model, x = stack(), toy.inputs(3, 5, 8)
    plain = model(x)
    with attention.recorded(model) as calls:
        assert torch.equal(model(x), plain)
    assert [(call.layer, call.is_causal, call.with_grad) for call in calls] == [
        ("layers.0", True, True),
        ("layers.1", False, True),
    ]
    q = model.layers[0].qkv(x)[..., :8].unflatten(-1, (2, 4)).transpose(1, 2)
    assert torch.equal(calls[0].q, q)
    assert calls[0].q.grad_fn is not None
    attention.value_trace(calls[1]).sum().backward()
    assert model.layers[0].qkv.weight.grad.abs().max() > 0


def test_nothing_is_left_on_the_model_also_after_an_exception():
    model = stack()
    with pytest.raises(RuntimeError), attention.recorded(model):  # noqa: PT012
        assert hooks(model) > 0
        model(toy.inputs(3, 5, 9))
    assert hooks(model) == 0
    with attention.recorded(model) as calls:
        pass
    model(toy.inputs(3, 5, 8))
    assert calls == []


def test_an_exception_that_the_model_catches_does_not_shift_the_names():
    class Careful(Stack):
        def forward(self, x):
            try:
                self.layers[1](x[..., :1])
            except RuntimeError:
                pass
            return super().forward(x)

    with attention.recorded(model := Careful()) as calls:
        model(toy.inputs(3, 5, 8))
    assert [call.layer for call in calls] == ["layers.0", "layers.1"]


def test_calls_without_gradients_say_so():
    model = stack()
    with attention.recorded(model) as calls, torch.no_grad():
        model(toy.inputs(3, 5, 8))
    assert [call.with_grad for call in calls] == [False, False]


def test_multihead_attention_leaves_no_call():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = toy.inputs(3, 5, 8)
    with attention.recorded(model) as calls:
        model(x, x, x, need_weights=False)
    assert calls == []


def gradients(model, x, forward):
    with attention.recorded(model) as calls:
        loss = forward(x).square().mean()
    loss = loss + sum(attention.value_trace(call).mean() for call in calls)
    loss.backward()
    return [loss.detach()] + [p.grad for p in model.parameters()]


def test_checkpointing_gives_the_same_value_and_gradients():
    x = toy.inputs(3, 5, 8)
    plain, recomputed = stack(), stack(run=functools.partial(checkpoint, use_reentrant=False))
    for got, want in zip(gradients(recomputed, x, recomputed), gradients(plain, x, plain), strict=True):
        assert torch.equal(got, want)


def test_reentrant_checkpointing_leaves_calls_that_say_they_have_no_gradient():
    model = stack(run=functools.partial(checkpoint, use_reentrant=True))
    with attention.recorded(model) as calls:
        model(toy.inputs(3, 5, 8).requires_grad_())
    assert [call.with_grad for call in calls] == [False, False]
    assert not any(call.q.requires_grad for call in calls)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_records_every_layer_with_its_gradient(backend):
    torch.compiler.reset()
    model, plain, x = stack(), stack(), toy.inputs(3, 5, 8)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled(x)
    for got, want in zip(gradients(model, x, compiled), gradients(plain, x, plain), strict=True):
        torch.testing.assert_close(got, want)
    with attention.recorded(compiled) as calls:
        compiled(x)
    assert [call.layer for call in calls] == ["layers.0", "layers.1"]
    torch.compiler.reset()


# --- language models --------------------------------------------------------------------------------------------------


def language_model(kind, attn):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.35, "attn_implementation": attn}
    config = getattr(transformers, f"{kind}Config")(**shape, **heads)
    return toy.seeded(lambda: getattr(transformers, f"{kind}ForCausalLM")(config)).eval()


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_maps_and_traces_equal_those_of_eager_attention(kind, padding):
    ids = toy.seeded(lambda: torch.randint(0, 50, (2, 10)))
    mask = torch.ones_like(ids)
    mask[1, {"right": slice(7, 10), "left": slice(0, 3), None: slice(0, 0)}[padding]] = 0
    batch = {"input_ids": ids, "use_cache": False} | ({} if padding is None else {"attention_mask": mask})
    model = language_model(kind, "sdpa")
    with attention.recorded(model) as calls:
        model(**batch)
    weights = language_model(kind, "eager")(**batch, output_attentions=True).attentions
    kept = mask.bool()[:, None].expand(2, 4, 10)
    assert [call.layer for call in calls] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    for call, w in zip(calls, weights, strict=True):
        assert attention.is_causal(call)
        assert float((attention.maps(call) - w).detach().abs().amax(-1)[kept].max()) < 1e-5
        v = call.v.repeat_interleave(4 // call.v.shape[1], 1).double()
        want = (w.double() @ v.square() - (w.double() @ v).square()).sum(-1).detach()
        trace = attention.value_trace(call)
        assert 10 < float(want.max()) < 60
        assert float((trace - want).detach().abs()[kept].max()) < 5e-5
        assert trace.isfinite().all()
        for gradient in torch.autograd.grad(trace.sum(), (call.q, call.k, call.v), retain_graph=True):
            assert gradient.isfinite().all()
