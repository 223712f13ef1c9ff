"""ll.capture: what it records under eager, checkpointing, autocast and compile, and that the model is as it was."""

import copy
import threading

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, photograph
from tests.whole.test_engines import language_model

O = ll.objectives
IDS = toy.seeded(lambda: torch.randint(1, 64, (3, 8)), 4)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0] * 2 + [1] * 6])
EVERYTHING = O.HeadDiversity(weight=1) + O.Repulsion(weight=1) + O.L1(weight=1) + O.Gossip(tau=0.0) + O.DeltaNorm(weight=1e-3)


def adapted(model=None, name="lora"):
    """A small Qwen3 with perturbed adapters on every Linear of its blocks."""
    model = model or language_model()
    toy.perturb(ll.attach(model, ll.config(name)))
    return model


def gradients(model):
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def trained(model, objective=EVERYTHING, context=None, **options):
    """(loss, gradients) of one step with a fresh copy of the objective."""
    model.zero_grad()
    objective = objective.evaluating()
    with ll.capture(model, objective, **options) as seen:
        with context or torch.autocast("cpu", enabled=False):
            out = model(input_ids=IDS, attention_mask=MASK, labels=IDS)
    loss = out.loss + objective(seen)
    loss.backward()
    return float(loss.detach()), {key: grad.clone() for key, grad in gradients(model).items()}


def largest_gap(found, expected):
    assert found.keys() == expected.keys()
    return max(float((found[k] - expected[k]).norm() / (expected[k].norm() + 1e-12)) for k in expected)


def test_hidden_states_are_the_input_of_the_output_head():
    model = adapted()
    with torch.no_grad(), ll.capture(model, {"hidden", "mask"}) as seen:
        out = model(input_ids=IDS, attention_mask=MASK)
        expected = model.model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    assert torch.equal(seen.hidden[0], expected)
    assert torch.equal(model.lm_head(seen.hidden[0]), out.logits)
    assert torch.equal(seen.mask, MASK.bool())
    assert seen.mask_given


def test_layers_choose_outputs_of_blocks_and_modules():
    model = adapted()
    with torch.no_grad():
        states = model.model(input_ids=IDS, output_hidden_states=True).hidden_states
        for layers, expected in ((0, [states[1]]), ((0, "model.norm"), [states[1], states[2]])):
            with ll.capture(model, O.L1(), layers=layers) as seen:
                model(IDS)
            assert all(torch.equal(h, e) for h, e in zip(seen.hidden, expected))
            assert len(seen.hidden) == len(expected)
            assert not seen.mask_given
            assert seen.mask.all()
            assert float(O.L1().value(seen)) == pytest.approx(float(torch.stack([e.abs().mean() for e in expected]).mean()))


def test_the_mask_is_read_from_positions_keywords_and_the_argument():
    model = adapted()
    for mask, call in (
        (MASK, lambda: model(IDS, MASK)),
        (MASK, lambda: model(IDS, attention_mask=MASK)),
        (1 - MASK, lambda: model(IDS, attention_mask=MASK)),
    ):
        with torch.no_grad(), ll.capture(model, O.L1(), mask=None if mask is MASK else mask) as seen:
            call()
        assert torch.equal(seen.mask, mask.bool())
        assert len(seen.only.rows()[0]) == int(mask.sum())


def test_attention_maps_are_those_of_the_eager_model():
    """The recorded calls give what attn_implementation="eager" returns, on tokens; head similarity follows."""
    model = adapted()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        with ll.capture(model, O.HeadDiversity()) as seen:
            model(input_ids=IDS, attention_mask=MASK)
        maps = eager(input_ids=IDS, attention_mask=MASK, output_attentions=True).attentions
        expected = torch.cat([O.formulas.head_similarity(P, MASK) for P in maps]).mean()
        assert [call.layer for call in seen.calls] == [f"model.layers.{i}.self_attn" for i in (0, 1)]
        assert float(O.HeadDiversity().value(seen)) == pytest.approx(float(expected), abs=1e-6)


def test_the_model_is_as_it_was_also_after_an_exception_and_an_interrupt():
    model = adapted()
    before, tables = photograph(model), hooks(model)
    with torch.no_grad(), ll.capture(model, EVERYTHING):
        model(IDS)
        assert hooks(model) != tables
    assert hooks(model) == tables
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), ll.capture(model, EVERYTHING):
            raise error
        assert hooks(model) == tables
    demand_same(model, before, "after capturing")


def hooks(model):
    tables = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {(path, table): list(getattr(m, table).items()) for path, m in model.named_modules() for table in tables}


def test_capturing_changes_no_bit_of_the_output_and_no_random_number():
    model = adapted()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    with torch.no_grad():
        plain = model(IDS).logits
        with ll.capture(model, EVERYTHING) as seen:
            captured = model(IDS).logits
        EVERYTHING.evaluating()(seen)
    assert torch.equal(captured, plain)
    assert torch.equal(torch.get_rng_state(), before)


def test_weight_zero_captures_nothing_and_gives_the_same_bits():
    model = adapted()
    tables = hooks(model)
    off = O.HeadDiversity(weight=0) + O.Gossip(weight=0) + O.DeltaNorm(weight=0)
    with ll.capture(model, off) as seen:
        assert hooks(model) == tables
        out = model(input_ids=IDS, labels=IDS)
    assert seen.forwards == []
    assert torch.equal(out.loss + off(seen), out.loss)
    assert torch.equal(out.loss, model(input_ids=IDS, labels=IDS).loss)


def test_padding_changes_no_objective_of_a_model():
    model = adapted()
    longer = torch.nn.functional.pad(IDS, (0, 5), value=7), torch.nn.functional.pad(MASK, (0, 5))
    found = []
    for ids, mask in ((IDS, MASK), longer):
        objective = EVERYTHING.evaluating()
        with torch.no_grad(), ll.capture(model, objective) as seen:
            model(input_ids=ids, attention_mask=mask)
        objective(seen)
        found.append({name: float(value) for name, value in objective.parts.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["lora", "oft"])
def test_non_reentrant_checkpointing_gives_the_same_loss_and_gradients(name):
    model = adapted(name=name).train()
    loss, expected = trained(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again, found = trained(model)
    assert again == pytest.approx(loss, rel=1e-6)
    assert largest_gap(found, expected) < 1e-5


def test_backward_inside_the_block_records_nothing_twice():
    model = adapted().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    objective = O.HeadDiversity() + O.Gossip()
    with ll.capture(model, objective, layers=(0, 1)) as seen:
        out = model(input_ids=IDS, labels=IDS)
        (out.loss + objective(seen)).backward()
    assert len(seen.hidden) == len(seen.calls) == 2


def test_autocast_gives_values_in_float32_close_to_those_without():
    model = adapted()
    loss, expected = trained(model)
    again, found = trained(model, context=torch.autocast("cpu", dtype=torch.bfloat16))
    assert again == pytest.approx(loss, rel=0.02)
    assert largest_gap(found, expected) < 0.2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective = EVERYTHING.evaluating()
        with ll.capture(model, objective) as seen:
            model(IDS)
        objective(seen)
    assert {part.dtype for part in objective.parts.values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at it while it traces
@pytest.mark.parametrize("how", ["model", *(pytest.param(how, marks=pytest.mark.long) for how in ("in place", "blocks"))])
def test_compiled_models_record_what_eager_ones_do(how):
    """Also where the model was compiled and ran before the block, and after another block."""
    torch._dynamo.reset()
    model = ran = language_model(blocks=1)
    toy.perturb(ll.attach(model, ll.config("lora", targets=("q_proj",))))
    objective = EVERYTHING if how == "blocks" else O.L1(weight=1) + O.Gossip(tau=0.0)
    loss, expected = trained(model, objective)
    if how == "model":
        ran = torch.compile(model, backend="eager")
    else:
        for module in [model] if how == "in place" else model.model.layers:
            module.compile(backend="eager")
    for _ in range(2):
        with torch.autocast("cpu", enabled=False):  # as in `trained`, so that nothing but the block is new to the compiler
            ran(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        again, found = trained(ran, objective)
        found = {key.removeprefix("_orig_mod."): grad for key, grad in found.items()}
        assert again == pytest.approx(loss, rel=1e-5)
        assert largest_gap(found, expected) < 1e-4
    torch._dynamo.reset()


def test_accumulated_passes_are_averaged():
    model = adapted()
    objective = O.L1(weight=1)
    with torch.no_grad():
        singles = []
        for ids in (IDS, IDS[:1, :4]):
            with ll.capture(model, objective) as seen:
                model(ids)
            singles.append(float(objective(seen)))
        with ll.capture(model, objective, accumulate=True) as seen:
            model(IDS)
            model(IDS[:1, :4])
        assert float(objective(seen)) == pytest.approx(sum(singles) / 2)
    assert [forward.hidden[0].shape[0] for forward in seen.forwards] == [3, 1]


def test_a_decoder_has_its_own_mask():
    class Pair(toy.Toy):
        def forward(self, x, attention_mask=None, decoder_attention_mask=None):
            return super().forward(x)

    model, x = toy.seeded(Pair), toy.inputs(3, 8, 24)
    with torch.no_grad(), ll.capture(model, {"hidden", "mask"}, layers=1) as seen:
        model(x, attention_mask=torch.ones(3, 5), decoder_attention_mask=MASK)
    assert torch.equal(seen.mask, MASK.bool())


def test_a_set_of_needs_is_enough():
    model = adapted()
    with torch.no_grad(), ll.capture(model, {"hidden"}) as seen:
        model(IDS)
    assert seen.calls == []
    assert seen.hidden[0].shape == (3, 8, 32)


def test_plain_modules_with_hidden_states_of_any_leading_shape():
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora")))
    for shape in ((4, 24), (4, 5, 24)):
        with ll.capture(model, O.Gossip(tau=0.0), layers="blocks.1") as seen:
            model(toy.inputs(*shape))
        assert seen.mask.shape == shape[:-1]
        assert O.Gossip(tau=0.0)(seen).requires_grad


def test_the_same_values_through_a_wrapper():
    model = adapted()
    wrapper = torch.nn.DataParallel(model)
    with torch.no_grad(), ll.capture(wrapper, O.L1()) as seen:
        wrapper(IDS)
    assert seen.hidden[0].shape == (3, 8, 32)


@pytest.mark.parametrize("objective", [O.L1(weight=1), O.AttentionBarrier(alpha=0.1)], ids=lambda o: o.name)
def test_a_compiled_model_is_one_graph_inside_the_block_too(objective):
    torch._dynamo.reset()
    model = adapted(language_model(blocks=1)).train()
    loss, _ = trained(model, objective)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert trained(compiled, objective)[0] == pytest.approx(loss, rel=1e-5)
    torch._dynamo.reset()


def test_what_was_recorded_in_inference_mode_is_measured_in_it_and_behind_it():
    model = adapted().train()
    objective = EVERYTHING + O.AttentionBarrier(alpha=0.1)
    with torch.no_grad(), ll.capture(model, objective) as seen:
        model(IDS, MASK)
    expected = objective.evaluating()(seen)
    with torch.inference_mode(), ll.capture(model, objective) as seen:
        model(IDS, MASK)
        assert torch.equal(objective.evaluating()(seen), expected)
    assert float(objective.evaluating()(seen).detach()) == float(expected.detach())


def sequences_to_sequences():
    """A BART with random weights: an encoder, a decoder, and cross attention between sequences that may be of one length."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, use_cache=False, dropout=0.0,
    )  # fmt: skip
    return adapted(toy.seeded(lambda: transformers.BartForConditionalGeneration(config)))


@pytest.mark.parametrize("objective", [O.HeadDiversity(), O.AttentionBarrier(alpha=0.1)], ids=lambda o: o.name)
def test_of_an_encoder_and_a_decoder_the_decoder_s_attention_to_itself_counts(objective):
    model = sequences_to_sequences().train()
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "decoder_input_ids": IDS}
    with ll.capture(model, objective) as seen:
        model(**batch, decoder_attention_mask=MASK)
    assert len(seen.calls) == 3
    found = objective(seen)
    seen.only.calls = [call for call in seen.calls if call.layer.endswith("decoder.layers.0.self_attn")]
    assert torch.equal(objective(seen), found)


def test_hidden_states_of_an_encoder_need_its_mask_by_name():
    model, layers = sequences_to_sequences(), "model.encoder.layers.0"
    batch = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :5]}
    with pytest.raises(ll.LoraLiteError, match=r"model\.encoder\.layers\.0 belongs to the encoder.*\n.*mask=attention_mask"):
        with ll.capture(model, O.L1(), layers=layers):
            model(**batch)
    with torch.no_grad(), ll.capture(model, O.L1(), layers=layers, mask=MASK) as seen:
        model(**batch)
    assert float(O.L1().value(seen)) == pytest.approx(float(seen.hidden[0][MASK.bool()].abs().mean()))


@pytest.mark.parametrize(("objective", "layers"), [(EVERYTHING, None), (O.L1(weight=1), (0, "model.norm"))])
def test_passes_of_other_threads_are_not_recorded(objective, layers):
    """Another thread calls the model before, after and between any two modules of the pass that is recorded."""
    model, me, served = adapted(), threading.get_ident(), []

    def serve(*_):
        if threading.get_ident() == me:
            thread = threading.Thread(target=lambda: served.append(model(input_ids=IDS[:1, :4]).logits))
            thread.start()
            thread.join()

    want = trained(model, objective, layers=layers)
    handles = [module.register_forward_pre_hook(serve, prepend=True) for module in model.modules()]
    with torch.no_grad(), ll.capture(model, objective.needs | {"mask"}, layers=layers) as seen:
        serve()
        model(input_ids=IDS, attention_mask=MASK)
        serve()
    got = trained(model, objective, layers=layers)
    for handle in handles:
        handle.remove()
    assert len(served) > 20
    assert got[0] == want[0]
    assert all(torch.equal(got[1][key], want[1][key]) for key in want[1])
    assert torch.equal(seen.mask, MASK.bool())
    assert [h.shape[:2] for h in seen.hidden] == [IDS.shape] * (1 if layers is None else 2)


def test_a_compiled_model_is_recorded_in_the_thread_of_the_block_alone():
    model, x, outputs = toy.one(), toy.inputs(2, 3, 24), []
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), ll.capture(model, {"hidden"}, layers="o_proj", accumulate=True) as seen:
        for _ in range(2):
            compiled(x)
            thread = threading.Thread(target=lambda: outputs.append(compiled(x)))
            thread.start()
            thread.join()
    assert [len(forward.hidden) for forward in seen.forwards] == [1, 1]
    assert len(outputs) == 2
