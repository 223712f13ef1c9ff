"""Bad input of objectives and capture: an error that names the objective and the repair; the model stays as it was."""

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing import toy
from tests.core.test_messages import refusal
from tests.observe.test_capture import IDS, MASK, adapted, hooks
from tests.whole.test_engines import language_model

O = ll.objectives


def captured(model, objective, *, call=None, **options):
    """A forward pass of a small language model in a capture block."""
    with ll.capture(model, objective, **options) as seen:
        (call or (lambda model: model(input_ids=IDS, attention_mask=MASK)))(model)
    return seen


def test_unknown_objectives_in_text_name_the_nearest_and_list_the_known():
    refusal(
        lambda: O.parse("gosip:5"), "no objective 'gosip'", "Closest name: gossip", "Known:", "repulsion", "gossip:5,tau=.5"
    )
    refusal(lambda: O.parse("l1+zzz"), "no objective 'zzz'", "Known:", "diversity")


def test_text_that_is_no_objective():
    refusal(lambda: O.parse("gossip,tua=.5"), "Gossip has no field 'tua'", "Closest name: tau", "lora_lite.objectives.Gossip")
    refusal(lambda: O.parse("gossip:much"), "weight='much'", "float")
    refusal(lambda: O.parse("gossip:"), "weight=''", "float")
    refusal(lambda: O.parse("gossip,tau"), "'tau' is no field of 'gossip'", "field=value")
    refusal(lambda: O.parse("gossip,k=2.5"), "k=2.5", "int")
    refusal(lambda: O.parse("gossip,draw=square"), "draw='square'", "'uniform'", "'ring'")
    refusal(lambda: O.parse("combined:2"), "'combined' is a whole", "diversity:.01+repulsion:.01+l1:.0002")
    refusal(lambda: O.parse("gossip++l1"), "is no objective", "name:weight")
    refusal(lambda: O.parse(5), "5 is no text", "gossip:5")
    refusal(lambda: O.parse("gossip:5,weight=3"), "'gossip:5,weight=3' gives a field twice", "gossip:5,tau=.5")
    refusal(lambda: O.parse("l1+gossip,tau=.5,tau=.6"), "'gossip,tau=.5,tau=.6' gives a field twice")


def test_values_out_of_range():
    for make, word in (
        (lambda: O.Gossip(tau=1.5), "tau=1.5"),
        (lambda: O.Gossip(k=0), "k=0"),
        (lambda: O.Repulsion(max_vectors=1), "max_vectors=1"),
        (lambda: O.L1(weight=float("nan")), "weight=nan"),
        (lambda: O.L1(weight="much"), "weight='much'"),
        (lambda: O.L1(seed=3), "L1 has no field 'seed'"),
        (lambda: O.Gossip(seed=2**64), "seed=18446744073709551616"),
        (lambda: O.AttentionBarrier(layers=("q", "(")), r"layers='('"),
        (lambda: O.DeltaCosine(against=()), "against=()"),
        (lambda: O.DeltaCosine(against="a"), "against='a'"),
    ):
        refusal(make, word)


def test_attention_maps_of_a_model_that_makes_no_attention_calls():
    eager = adapted()
    eager.set_attn_implementation("eager")
    refusal(
        lambda: captured(eager, O.HeadDiversity() + O.L1()),
        "objective 'diversity' needs attention maps", "Eager attention", 'set_attn_implementation("sdpa")', model=eager,
    )  # fmt: skip

    class Classic(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(24, 2, batch_first=True)
            self.o_proj = nn.Linear(24, 24)

        def forward(self, x):
            return self.o_proj(self.attention(x, x, x)[0])

    model = toy.seeded(Classic)
    ll.attach(model, ll.config("lora", targets=("o_proj",), exclude=("attention",)))
    x = toy.inputs(2, 5, 24)
    refusal(
        lambda: captured(model, O.HeadDiversity(), call=lambda m: m(x)), "'diversity'", "nn.MultiheadAttention", model=model
    )


def test_masks_of_the_wrong_shape_or_content():
    model = adapted()
    objective = O.Gossip()
    refusal(lambda: captured(model, objective, mask=MASK[:, :5]), "(3, 5)", "(3, 8)", "mask=mask", model=model)
    refusal(lambda: captured(model, objective, mask=MASK[None]), "shape (1, 3, 8)", "(batch, time)", model=model)
    refusal(lambda: captured(model, objective, mask=MASK * 0.5), "other numbers than 0 and 1", model=model)
    refusal(lambda: captured(model, objective, mask=[1, 0]), "a list", "(batch, time)", model=model)
    four = torch.ones(3, 1, 8, 8, dtype=torch.bool)
    refusal(
        lambda: captured(model, objective, call=lambda m: m(input_ids=IDS, attention_mask=four)), "(3, 1, 8, 8)", model=model
    )
    last = lambda m: m(input_ids=IDS, attention_mask=MASK, logits_to_keep=1)  # noqa: E731
    refusal(lambda: captured(model, objective, call=last), "(3, 8)", "(3, 1)", model=model)
    refusal(lambda: O.HeadDiversity()(captured(model, O.HeadDiversity(), mask=MASK[:, :5])), "attention maps", "(3, 5)")


def test_too_few_valid_tokens_name_the_objective_and_the_count():
    """One short sequence beside others is lawful; a batch without two tokens is not."""
    model = adapted()
    one = torch.zeros_like(MASK)
    one[0, 0] = 1
    for objective in (O.Repulsion(), O.Gossip()):
        refusal(lambda o=objective: o(captured(model, o, mask=one)), repr(objective.name), "1 valid token", "At least 2")
    refusal(lambda: O.L1()(captured(model, O.L1(), mask=one * 0)), "'l1'", "0 valid tokens", "At least 1")
    refusal(lambda: O.HeadDiversity()(captured(model, O.HeadDiversity(), mask=one)), "'diversity'", "longest sequence has 1")
    one[1, :2] = 1
    for objective in (O.Repulsion(), O.Gossip(tau=-1), O.HeadDiversity()):
        assert objective(captured(model, objective, mask=one)) > 0


def test_no_forward_pass_and_a_second_one():
    model = adapted()
    refusal(lambda: captured(model, O.Gossip(), call=lambda m: None), "'gossip' needs a forward pass", "none", model=model)
    refusal(lambda: captured(model, O.Gossip(), call=lambda m: m.model(IDS)), "needs a forward pass", model=model)
    twice = lambda m: (m(IDS), m(IDS))  # noqa: E731
    refusal(lambda: captured(model, O.Gossip(), call=twice), "A second forward pass", "accumulate=True", model=model)
    with torch.no_grad():
        seen = captured(model, O.Gossip(), call=twice, accumulate=True)
    refusal(lambda: seen.hidden, "2 forward passes", "seen.forwards")


def test_reentrant_checkpointing_is_refused_by_name():
    model = adapted().train()
    model.enable_input_require_grads()
    model.activation_checkpointing_enable({"use_reentrant": True})
    for objective, options in ((O.HeadDiversity(), {}), (O.Gossip(), {"layers": "model.layers.0.mlp"})):
        before = hooks(model)
        with pytest.raises(
            ll.LoraLiteError, match=f"{objective.name}(?s:.)*Reentrant checkpointing(?s:.)*use_reentrant.: False"
        ):
            captured(model, objective, **options)
        assert hooks(model) == before
    for layers in (None, 0):  # in front of the head and behind a block there is a gradient
        assert captured(model, O.Gossip(), layers=layers).hidden[0].requires_grad


def test_nothing_trained_in_front_of_what_was_recorded():
    model = language_model().requires_grad_(False)
    refusal(lambda: captured(model, O.Gossip()), "'gossip'", "without a gradient", "torch.no_grad()", model=model)
    with torch.no_grad():
        captured(model, O.Gossip())
    ll.attach(model, ll.config("lora", layers=(1,)))
    refusal(lambda: captured(model, O.Gossip(), layers=0), "without a gradient", model=model)


def test_lost_hooks_and_merged_adapters():
    model = adapted()
    ll.merge(model)
    refusal(lambda: captured(model, O.Gossip()), "merged", "ll.unmerge(model)", model=model)
    refusal(lambda: captured(model, O.DeltaNorm(), call=lambda m: None), "merged", "ll.unmerge(model)", model=model)
    with torch.no_grad():
        captured(model, O.Gossip())
    ll.unmerge(model)
    for module in model.modules():
        module._forward_hooks.clear()
    refusal(lambda: captured(model, O.Gossip()), "hooks of adapter 'default' are gone", "ll.repair(model)", model=model)
    ll.repair(model)

    def removing(model):
        model(IDS)
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()

    refusal(lambda: captured(model, O.Gossip(), call=removing), "are gone", "ll.repair(model)")


def test_hidden_states_that_nothing_shows():
    model = toy.toy()
    ll.attach(model, ll.config("lora"))
    x = toy.inputs(2, 5, 24)
    run = {"call": lambda m: m(x)}
    refusal(
        lambda: captured(model, O.L1(), **run), "'l1'", "Toy names no output head", "Blocks: 0, 1", "layers=(1,)", model=model
    )
    refusal(lambda: captured(model, O.L1(), layers=7, **run), "no block 7", "0, 1", model=model)
    refusal(lambda: captured(model, O.L1(), layers="blocks.11", **run), "no module 'blocks.11'", "blocks.1", model=model)
    refusal(lambda: captured(model, O.L1(), layers=(), **run), "layers=()", model=model)
    refusal(lambda: captured(model, O.DeltaNorm(), layers=0, **run), "layers=0 selects hidden states", model=model)
    model.idle = nn.Linear(2, 2)
    refusal(lambda: captured(model, O.L1(), layers="idle", **run), "'l1'", "not called", model=model)


def test_hidden_states_that_the_model_writes_over_afterwards():
    class Writes(toy.Toy):
        def forward(self, x):
            return super().forward(x).mul_(2)

    model, x = toy.seeded(Writes), toy.inputs(2, 5, 24)
    toy.perturb(ll.attach(model, ll.config("lora")))
    run = {"call": lambda m: m(x)}
    refusal(lambda: captured(model, O.L1(), layers=1, **run), "'l1'", "in place", model=model)
    captured(model, O.L1(), layers=0, **run)


def test_what_is_no_objective():
    model = adapted()
    refusal(lambda: captured(model, "gossip"), "'gossip' is nothing to capture", "ll.objectives.parse('gossip')")
    refusal(lambda: captured(model, {"hiden"}), "no need 'hiden'", "Closest name: hidden")
    refusal(lambda: captured(model, model), "A Qwen3ForCausalLM is nothing to capture", "An objective")


def test_an_objective_called_on_what_was_captured_for_another():
    model = adapted()
    seen = captured(model, O.L1())
    refusal(lambda: O.HeadDiversity()(seen), "'diversity' needs attention", "hidden, mask", "ll.capture(model, objective)")
    refusal(lambda: O.DeltaNorm()(captured(model, O.L1(weight=0))), "'delta_norm' needs delta", "nothing")


def test_states_of_other_objectives():
    refusal(lambda: O.Gossip().load_state_dict({}), "other objectives: []", "['gossip']")


def test_delta_objectives_without_a_weight_change():
    model = language_model()
    with ll.capture(model, {"delta"}) as seen:
        pass
    refusal(lambda: O.DeltaNorm()(seen), "'delta_norm'", "no adapter", "ll.attach")
    ll.attach(model, ll.config("lora", targets=("q_proj",)))
    start = ll.snapshot(model)
    refusal(lambda: O.DeltaCosine(against=start)(seen), "'delta_cosine' has nothing to compare with", "No change of weight")
    refusal(lambda: O.DeltaNorm(adapter="skil")(seen), "'delta_norm'", "'skil'", "default")
    other = ll.attach(model, ll.config("lora", targets=("o_proj",)), name="other")
    toy.perturb(other)
    taken = ll.snapshot(model, "other")
    objective = O.DeltaCosine(against=taken, adapter="default")
    refusal(lambda: objective(seen), "'delta_cosine' compares layers that adapter 'default' does not have", "o_proj", "q_proj")
    refusal(lambda: O.DeltaCosine(against=[start, taken]), "one training", "DeltaCosine(against=a) + DeltaCosine(against=b)")
    refusal(lambda: O.DeltaCosine(against=taken)(seen), "2 adapters")
    with ll.scale(model, torch.ones(3), name="other"):
        refusal(lambda: O.DeltaNorm()(seen), "'delta_norm'", "coefficient per sample")
    with torch.no_grad():
        next(iter(other.layers.values())).B.fill_(torch.inf)
    refusal(lambda: O.DeltaNorm()(seen), "Adapter 'other'", "holds numbers that are not finite", "not finite")


def test_of_many_modules_some_are_named():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(60)))
    refusal(lambda: captured(model, O.L1(), layers="zzz"), "no module 'zzz'. Known: 0, 1, 10", "and 20 more")
