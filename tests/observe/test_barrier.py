"""The attention barrier: its numbers, what it does at its defaults and beyond, which layers and queries count, alpha."""

import functools
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.observe import attention
from lora_lite.observe.objectives import AttentionBarrier, parse
from lora_lite.observe.objectives.barrier import penalty, quantile
from lora_lite.observe.seen import Forward, Seen
from lora_lite.testing import toy
from tests.observe.test_attention import Largest, dense, golden, language_model, random, relative, stack

RECOMMENDED = {"alpha": "auto", "soft": True, "eps": 0.01, "weight": 0.1}


def seen_of(*calls, mask=None):
    """What a capture block would have recorded of a model in training mode."""
    model = nn.Identity()
    return Seen(model, {"attention": "", "mask": ""}, [Forward(mask, torch.is_grad_enabled(), calls=list(calls))])


def value(barrier, *calls, mask=None):
    return barrier.value(seen_of(*calls, mask=mask))


# --- numbers ----------------------------------------------------------------------------------------------------------

SOFT = {"soft": True, "eps": 0.01}
HARD_GOLDEN = {1e-4: (1.946724493e-4, 2.595632657e-4), 0.1: (0.2609322103, 0.3479096137), 10.0: (10.3616329185, 13.8155105580)}


@pytest.mark.parametrize("alpha", HARD_GOLDEN)
def test_hard_penalty_of_the_closed_form_call(alpha):
    plain, skipped = HARD_GOLDEN[alpha]
    assert float(value(AttentionBarrier(alpha=alpha), golden()).detach()) == pytest.approx(plain, rel=1e-9)
    got = value(AttentionBarrier(alpha=alpha, skip_first=True), golden()).detach()
    assert float(got) == pytest.approx(skipped, rel=1e-9)


@pytest.mark.parametrize(("alpha", "want"), [(1e-4, 1.946724493e-4), (0.1, 0.2609322103), (10.0, 1875.52324428)])
def test_soft_penalty_of_the_closed_form_call(alpha, want):
    assert float(value(AttentionBarrier(alpha=alpha, **SOFT), golden()).detach()) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize(
    ("alpha", "fields", "norm"),
    [(1e-4, {}, 7.36761e-5), (0.1, {}, 0.133282), (10.0, {}, 0.0), (1e-4, SOFT, 7.36761e-5), (10.0, SOFT, 736.505)],
)
def test_gradient_of_the_closed_form_call(alpha, fields, norm):
    call = golden()
    value(AttentionBarrier(alpha=alpha, **fields), call).backward()
    assert float(call.v.grad.norm()) == pytest.approx(norm, rel=1e-5)


def test_values_at_plus_and_minus_three():
    q = torch.zeros(1, 1, 2, 1)
    call = attention.Call("", q, q, torch.tensor([3.0, -3.0]).reshape(1, 1, 2, 1), is_causal=True)
    barrier = AttentionBarrier(alpha=0.05, skip_first=True)
    with torch.no_grad():
        assert float(value(barrier, call)) == pytest.approx(0.597837, rel=1e-6)
        assert float(value(AttentionBarrier(alpha=0.0), call)) == 0


@pytest.mark.parametrize("alpha", [1e-4, 0.05])
def test_float32_agrees_with_explicit_weights_in_value_and_gradient(alpha):
    call = random(is_causal=True, dtype=torch.float32)
    trace = dense(call)
    want = -torch.log1p(-alpha * trace).mean()
    got = value(AttentionBarrier(alpha=alpha), call)
    assert float(1 - alpha * trace.max().detach()) > 0.5
    assert relative(got.double(), want) < 1e-5
    for g, w in zip(*(torch.autograd.grad(x, (call.q, call.k, call.v)) for x in (got, want)), strict=True):
        assert relative(g.double(), w.double()) < 1e-5


def test_float32_keeps_its_digits_where_the_margin_is_near_one():
    trace = torch.linspace(0.1, 5, 50)
    got, want = (penalty(x, 1e-4, 1e-6, 20.0, soft=False) for x in (trace, trace.double()))
    assert float(((got.double() - want) / want).abs().max()) < 1e-6


def test_a_model_is_the_mean_of_its_layers():
    first, second = random(is_causal=True), random(is_causal=True, T=4, S=4)
    barrier = AttentionBarrier(alpha=0.1)
    both = value(barrier, first, second)
    assert torch.allclose(both, (value(barrier, first) + value(barrier, second)) / 2)


# --- behaviour --------------------------------------------------------------------------------------------------------


def test_at_the_default_alpha_the_penalty_is_alpha_times_trace_to_three_digits():
    trace = torch.linspace(0, 20, 50, dtype=torch.float64)[1:]
    assert relative(penalty(trace, 1e-4, 1e-6, 20.0, soft=False), 1e-4 * trace) < 1.1e-3


def test_beyond_the_barrier_the_hard_form_is_flat_and_the_soft_one_rises():
    trace = torch.tensor([0.5, 0.98, 1.0, 1.5, 30.0], dtype=torch.float64, requires_grad=True)
    hard = penalty(trace, 1.0, 0.01, 20.0, soft=False)
    (slope,) = torch.autograd.grad(hard.sum(), trace)
    assert slope[2:].tolist() == [0, 0, 0]
    assert torch.allclose(slope[:2], 1 / (1 - trace[:2]))
    soft = penalty(trace, 1.0, 0.01, 20.0, soft=True)
    (slope,) = torch.autograd.grad(soft.sum(), trace)
    assert torch.allclose(slope[2:], torch.full((3,), 100.0, dtype=torch.float64))
    assert torch.equal(soft[:2], hard[:2])


def test_the_soft_form_has_no_step_and_no_kink_at_eps():
    trace = (0.99 + torch.tensor([-1e-9, 1e-9], dtype=torch.float64)).requires_grad_()
    soft = penalty(trace, 1.0, 0.01, 20.0, soft=True)
    (slope,) = torch.autograd.grad(soft.sum(), trace)
    assert float((soft[1] - soft[0]).detach()) == pytest.approx(2e-7, rel=1e-3)
    assert float(slope[0]) == pytest.approx(float(slope[1]), rel=1e-6)


def test_the_cap_binds_for_a_tiny_eps_alone():
    far = torch.tensor(1e9, dtype=torch.float64)
    limit = {eps: float(penalty(far, 1.0, eps, 20.0, soft=False)) for eps in (1e-6, 2.1e-9, 2.0e-9)}
    assert limit[1e-6] == pytest.approx(13.8155, abs=1e-4)
    assert limit[2.1e-9] < 20
    assert limit[2.0e-9] == 20


def test_the_trace_form_bounds_the_determinant_and_equals_it_at_rank_one():
    for rank, equal in ((1, True), (3, False)):
        root = toy.inputs(4, rank, dtype=torch.float64)
        cov = root @ root.T
        alpha = 0.7 / cov.trace()
        exact = -torch.logdet(torch.eye(4, dtype=torch.float64) - alpha * cov)
        bound = penalty(cov.trace(), float(alpha), 1e-6, 20.0, soft=False)
        assert bound >= exact - 1e-12
        assert bool(bound - exact < 1e-9) is equal


def test_no_tensor_of_queries_times_keys_is_made_in_value_and_backward():
    def numbers(T):
        call = random(T=T, S=T, H=1, Hk=1, E=8, D=8, dtype=torch.float32, is_causal=True)
        with Largest() as seen:
            value(AttentionBarrier(alpha=0.1), call).backward()
        return seen.numbers

    assert numbers(1024) == 4 * numbers(256)


# --- layers and queries -----------------------------------------------------------------------------------------------


def test_bidirectional_attention_never_counts():
    barrier, call = AttentionBarrier(alpha=0.1), random(is_causal=True)
    assert torch.equal(value(barrier, call, random()), value(barrier, call))
    with pytest.raises(ll.LoraLiteError, match=r"No causal self-attention among 1 recorded calls"):
        value(barrier, random())


def named(*names):
    return [
        attention.Call(name, *(getattr(random(T=i + 3, S=i + 3), x) for x in "qkv"), is_causal=True)
        for i, name in enumerate(names)
    ]


def test_layers_are_chosen_by_pattern_or_by_a_function_of_the_call():
    calls = named("blocks.0.attention", "blocks.1.attention", "encoder.attention")
    only_first = value(AttentionBarrier(alpha=0.1), calls[0])
    for layers in ("blocks.0", (r"re:blocks\.0\.",), lambda call: call.layer.startswith("blocks.0")):
        assert torch.equal(value(AttentionBarrier(alpha=0.1, layers=layers), *calls), only_first)
    with pytest.raises(ll.LoraLiteError, match=r"'blocks.7' selects no causal attention. There is blocks.0.attention, "):
        value(AttentionBarrier(layers=("blocks.0", "blocks.7")), *calls)
    with pytest.raises(ll.LoraLiteError, match="the function selects no causal attention"):
        value(AttentionBarrier(layers=lambda call: False), *calls)


def test_masked_queries_do_not_count():
    call = random(is_causal=True)
    mask = torch.arange(7) < torch.tensor([7, 4])[:, None]
    trace = dense(call)
    want = -torch.cat([(1 - 0.1 * trace)[0].flatten(), (1 - 0.1 * trace)[1, :, :4].flatten()]).log().mean()
    assert torch.allclose(value(AttentionBarrier(alpha=0.1), call, mask=mask), want)
    skipped = -torch.cat([(1 - 0.1 * trace)[0, :, 1:].flatten(), (1 - 0.1 * trace)[1, :, 1:4].flatten()]).log().mean()
    assert torch.allclose(value(AttentionBarrier(alpha=0.1, skip_first=True), call, mask=mask), skipped)


def test_the_first_query_that_is_skipped_is_the_first_valid_one():
    mask = torch.arange(7) >= torch.tensor([0, 3])[:, None]
    call = random(mask=torch.ones(7, 7, dtype=torch.bool).tril() & mask[:, None, None])
    trace = attention.value_trace(call)
    assert not trace[1, :, 3].any()
    want = -torch.cat([(1 - 0.1 * trace)[0, :, 1:].flatten(), (1 - 0.1 * trace)[1, :, 4:].flatten()]).log().mean()
    assert torch.allclose(value(AttentionBarrier(alpha=0.1, skip_first=True), call, mask=mask), want)


def test_a_sequence_without_a_valid_token_is_left_out_and_a_batch_without_one_is_refused():
    call = random(is_causal=True)
    mask = torch.tensor([[True] * 7, [False] * 7])
    one = attention.Call("", *(x[:1] for x in (call.q, call.k, call.v)), is_causal=True)
    barrier = AttentionBarrier(alpha=0.1)
    assert torch.allclose(value(barrier, call, mask=mask), value(barrier, one))
    with pytest.raises(ll.LoraLiteError, match="'barrier' met a batch of 0 valid tokens"):
        value(barrier, call, mask=mask & False)
    with pytest.raises(ll.LoraLiteError, match=r"mask has shape \(2, 6\)"):
        value(barrier, call, mask=mask[:, :6])


def test_queries_behind_cached_keys_take_the_last_columns_of_the_mask():
    band = torch.ones(3, 7, dtype=torch.bool).tril(4)
    call = random(T=3, S=7, mask=band)
    mask = torch.tensor([[True] * 7, [True] * 5 + [False] * 2])
    trace = dense(call)
    want = -torch.cat([(1 - 0.1 * trace)[0].flatten(), (1 - 0.1 * trace)[1, :, :1].flatten()]).log().mean()
    assert torch.allclose(value(AttentionBarrier(alpha=0.1, skip_first=True), call, mask=mask), want)


def test_appended_padding_changes_nothing():
    model = language_model("Qwen3", "sdpa").train()
    ids = toy.seeded(lambda: torch.randint(0, 50, (2, 6)))
    barrier, values = AttentionBarrier(alpha=1e-3), []
    for extra in (0, 4):
        padded = torch.cat([ids, torch.zeros(2, extra, dtype=torch.long)], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(2, extra, dtype=torch.long)], 1)
        with ll.capture(model, barrier) as seen:
            model(padded, attention_mask=mask, use_cache=False)
        values.append(barrier.value(seen).detach())
    assert relative(values[1], values[0]) < 1e-6


# --- on a model -------------------------------------------------------------------------------------------------------


def adapted(**fields):
    model = stack(**fields).train()
    toy.perturb(ll.attach(model, ll.config("lora", r=2, alpha=2, targets=("qkv",))))
    return model


def losses(barrier, model, x):
    with ll.capture(model, barrier) as seen:
        task = model(x).square().mean()
    return task, barrier(seen)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_the_gradient_reaches_the_adapters_of_the_layer_and_before_it_and_no_base_weight():
    model, x = adapted(), toy.inputs(3, 5, 8)
    barrier = AttentionBarrier(alpha=0.1, layers=("layers.0",))
    losses(barrier, model, x)[1].backward()
    assert gradients(model).keys() == {f"layers.0.qkv.default.{name}" for name in "AB"}
    with ll.capture(model, {"attention"}) as seen:
        model(x)
    attention.value_trace(seen.calls[1]).sum().backward()
    assert gradients(model).keys() == {f"layers.{i}.qkv.default.{name}" for i in (0, 1) for name in "AB"}


def test_weight_zero_records_nothing_and_leaves_the_loss_bit_equal():
    model, x = adapted(), toy.inputs(3, 5, 8)
    off = AttentionBarrier(weight=0.0)
    with ll.capture(model, off) as seen:
        loss = model(x).square().mean()
    assert seen.forwards == []
    assert torch.equal(loss + off(seen), loss)


def test_in_eval_mode_nothing_is_computed_and_a_training_loop_is_told():
    model, x = adapted().eval(), toy.inputs(3, 5, 8)
    barrier = AttentionBarrier(alpha="auto")
    with torch.no_grad():
        assert float(losses(barrier, model, x)[1]) == 0
    with pytest.warns(ll.LoraLiteWarning, match=r"training mode only, and the model is in eval mode: model.train\(\)"):
        assert float(losses(barrier, model, x)[1].detach()) == 0


def test_the_metric_is_there_in_eval_mode():
    model, x = adapted().eval(), toy.inputs(3, 5, 8)
    barrier = AttentionBarrier(alpha=2.0, eps=0.01)
    with torch.no_grad(), ll.capture(model, barrier) as seen:
        model(x)
    trace = attention.value_trace(seen.calls[0]).detach().flatten()
    got = barrier.attn_trace(seen)
    assert got["mean"] == pytest.approx(float(trace.mean()))
    assert got["q95"] == float(trace.sort().values[round(0.95 * (len(trace) - 1))])
    assert got["beyond"] == pytest.approx(float((1 - 2 * trace < 0.01).float().mean()))
    assert 0 < got["beyond"] < 1


def test_checkpointing_gives_the_same_and_the_reentrant_one_is_refused():
    x = toy.inputs(3, 5, 8)
    barrier, found = AttentionBarrier(alpha=0.1, weight=1.0), []
    for run in (None, functools.partial(checkpoint, use_reentrant=False)):
        model = adapted(**({} if run is None else {"run": run}))
        task, term = losses(barrier, model, x)
        (task + term).backward()
        found.append((term.detach(), gradients(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    assert all(torch.equal(found[0][1][name], found[1][1][name]) for name in found[0][1])
    with pytest.raises(ll.LoraLiteError, match="without a gradient") as error:
        losses(barrier, adapted(run=functools.partial(checkpoint, use_reentrant=True)), x.requires_grad_())
    assert "use_reentrant" in str(error.value)


def test_a_layer_recorded_without_gradients_among_others_is_refused():
    calls = named("blocks.0", "blocks.1")
    hidden = attention.Call("blocks.1", calls[1].q, calls[1].k, calls[1].v, is_causal=True, with_grad=False)
    with pytest.raises(ll.LoraLiteError, match=r"Attention of blocks\.1 was recorded without a gradient"):
        value(AttentionBarrier(), calls[0], hidden)


def test_models_that_do_not_call_the_function_are_refused_by_name():
    model = language_model("Llama", "eager").train()
    barrier = AttentionBarrier()
    with pytest.raises(ll.LoraLiteError, match="'barrier' needs attention"), ll.capture(model, barrier):
        model(toy.seeded(lambda: torch.randint(0, 50, (2, 6))), use_cache=False)


# --- alpha="auto" -----------------------------------------------------------------------------------------------------


def test_auto_alpha_is_half_over_the_95_percent_quantile_of_the_bases_trace():
    model, batches = adapted(), [toy.inputs(3, 5, 8, seed=seed) for seed in (1, 2)]
    barrier = AttentionBarrier(**RECOMMENDED)
    with pytest.raises(ll.LoraLiteError, match=r"no alpha yet(.|\n)*objective.calibrate\(model, batches\)"):
        losses(barrier, model, batches[0])
    (barrier + ll.objectives.L1()).calibrate(model, batches)
    traces = []
    with torch.no_grad(), ll.disabled(model):
        for batch in batches:
            with attention.recorded(model) as calls:
                model(batch)
            traces.append(attention.value_trace(calls[0]).flatten())
    assert barrier.strength == pytest.approx(0.5 / float(quantile(torch.cat(traces), 0.95)))
    assert model.training
    assert model.layers[0].qkv.default.A.requires_grad
    assert float(losses(barrier, model, batches[0])[1].detach()) > 0


@pytest.mark.parametrize("kind", ["function", "list", "tensor"])
def test_auto_alpha_of_left_padded_series_counts_the_valid_queries_alone(kind):
    """A model with Toto's shapes takes no mask: rows of attention are (batch * variates), queries are patches."""
    toto_like = pytest.importorskip("benchmarks.forecast.toto_like")
    model = toy.seeded(toto_like.TotoLike)
    padded = 6
    batches = [toy.inputs(2 * 3, 16 * 8, seed=seed).view(2, 3, 128) for seed in (1, 2)]
    for series in batches:
        series[..., : padded * 8] = 0

    def valid(series):
        return toto_like.patches(series).ne(0).any(-1).flatten(0, 1)

    mask = {"function": valid, "list": [valid(series) for series in batches], "tensor": valid(batches[0])}[kind]
    assert valid(batches[0]).shape == (2 * 3, 16)
    kept, everything = [], []
    with torch.no_grad():
        for series in batches:
            with attention.recorded(model) as calls:
                model(series)
            for found in attention.causal(calls):
                trace = attention.value_trace(found)
                kept.append(trace[:, :, padded:].flatten())
                everything.append(trace.flatten())
    want, without = (0.5 / float(quantile(torch.cat(traces), 0.95)) for traces in (kept, everything))
    found = []
    for given in (mask, None):
        barrier = AttentionBarrier(**RECOMMENDED)
        (barrier + ll.objectives.L1()).calibrate(model, batches, mask=given)
        found.append(barrier.strength)
    assert found == pytest.approx([want, without])
    assert found[1] > 1.05 * found[0]
    with pytest.raises(ll.LoraLiteError, match=r"The mask has shape \(2, 16\), attention calls have \(6, 16\)"):
        AttentionBarrier(**RECOMMENDED).calibrate(model, batches, mask=torch.ones(2, 16))
    with pytest.raises(ll.LoraLiteError, match="1 masks for more than 1 batches"):
        AttentionBarrier(**RECOMMENDED).calibrate(model, batches, mask=[valid(batches[0])])


def test_auto_alpha_travels_with_the_state_and_with_the_copy_for_measuring():
    model, barrier = adapted(), AttentionBarrier(**RECOMMENDED)
    objective = barrier + ll.objectives.Gossip()
    before = objective.state_dict()
    objective.calibrate(model, [toy.inputs(3, 5, 8)])
    other = AttentionBarrier(**RECOMMENDED) + ll.objectives.Gossip(seed=3)
    other.load_state_dict(objective.state_dict())
    assert other.terms[0].strength == barrier.strength == barrier.evaluating().strength
    other.load_state_dict(before)
    with pytest.raises(ll.LoraLiteError, match="no alpha yet"):
        _ = other.terms[0].strength
    with pytest.raises(ll.LoraLiteError, match="The state belongs to other objectives"):
        AttentionBarrier().load_state_dict(barrier.state_dict())


def test_calibration_says_what_it_cannot_use():
    barrier = AttentionBarrier(alpha="auto")
    with pytest.raises(ll.LoraLiteError, match="no batches"):
        barrier.calibrate(stack(), [])
    with pytest.raises(ll.LoraLiteError, match="batches is a Tensor"):
        barrier.calibrate(stack(), toy.inputs(2, 5, 8))
    with pytest.raises(ll.LoraLiteError, match="95% quantile of the trace is 0 "):
        barrier.calibrate(stack(), [toy.inputs(2, 1, 8)])
    AttentionBarrier(alpha=0.1).calibrate(stack(), iter(()))  # a number is settled already


# --- charge="adapter" -------------------------------------------------------------------------------------------------


def test_charging_the_adapter_penalises_what_it_adds_to_the_trace_of_the_base():
    model, x = adapted(), toy.inputs(3, 5, 8)
    barrier = AttentionBarrier(alpha=0.1, charge="adapter")
    random_state = torch.get_rng_state()
    with ll.capture(model, barrier) as seen:
        model(x)
    got = barrier.value(seen)
    with torch.no_grad(), ll.disabled(model), attention.recorded(model) as calls:
        model(x)
    added = (dense(seen.calls[0]) - dense(calls[0])).clamp_min(0)
    assert 0.1 < float((added > 0).float().mean()) < 0.9
    assert relative(got.double(), -(1 - 0.1 * added).log().mean()) < 1e-5
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.no_grad(), ll.scale(model, 0.0):
        assert float(losses(barrier, model, x)[1]) == 0
    ll.detach(model)
    with pytest.raises(ll.LoraLiteError, match="The model has no adapter"), torch.no_grad():
        losses(barrier, model, x)


def test_charging_the_adapter_inside_the_block_records_no_pass_of_the_base():
    model, x = adapted(), toy.inputs(3, 5, 8)
    objective = AttentionBarrier(alpha=0.1, charge="adapter")
    with ll.capture(model, objective, accumulate=True) as seen:
        model(x)
        inside = objective(seen)
        model(x)
    assert [len(forward.calls) for forward in seen.forwards] == [2, 2]
    assert torch.equal(objective(seen), inside)


def test_the_pass_of_the_base_runs_under_the_autocast_of_the_forward():
    model, x = adapted(), toy.inputs(3, 5, 8)
    with ll.capture(model, {"attention"}) as seen, torch.autocast("cpu", dtype=torch.bfloat16):
        model(x)
    assert {call.q.dtype for call in seen.only.base_calls()} == {torch.bfloat16}


# --- options ----------------------------------------------------------------------------------------------------------


def test_soft_with_the_tiny_eps_of_the_hard_form_is_warned_of():
    with pytest.warns(ll.LoraLiteWarning, match=r"slope is alpha / eps, 1,000,000 alpha. eps=.01 is recommended"):
        AttentionBarrier(soft=True)
    with warnings.catch_warnings():
        AttentionBarrier(**RECOMMENDED)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -1.0}, "alpha is a finite number of at least 0"),
        ({"alpha": "automatic"}, "alpha: float or one of 'auto'"),
        ({"eps": 0.0}, "eps is between 0 and 1"),
        ({"cap": 0.0}, "cap is above 0"),
        ({"soft": True, "eps": 0.01, "cap": 5.0}, "cap is an option of the hard form"),
        ({"layers": ()}, "layers is"),
        ({"charge": "adapters"}, "one of 'model', 'adapter'"),
        ({"wieght": 1.0}, "Closest name: weight"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        AttentionBarrier(**fields)


def test_text_names_the_barrier():
    assert parse("barrier") == AttentionBarrier()
    assert parse("barrier:.1,alpha=auto,soft=true,eps=.01") == AttentionBarrier(**RECOMMENDED)
