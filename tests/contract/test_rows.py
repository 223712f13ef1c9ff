"""Coefficients per sample and per token follow their rows, or are refused with a repair that keeps them."""

import re

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract import rows
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, photograph
from tests.core.test_messages import refusal

ZERO_ONE = torch.tensor([0.0, 1.0])
pytestmark = pytest.mark.filterwarnings("ignore:.*which no adapter reaches")
CHANGED = ["lora", "oft", "dora", "ia3", "hra", "antipasto"]


class Experts(nn.Module):
    """Each row through the expert that its gate chooses; the batch is flat where `flat`."""

    def __init__(self, router=True):
        super().__init__()
        self.gate = nn.Linear(8, 2) if router else nn.Linear(8, 3)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

    def forward(self, x):
        flat = x.reshape(-1, 8)
        out, top = torch.zeros_like(flat), self.gate(flat)[:, :2].argmax(-1)
        for i, expert in enumerate(self.experts):
            index = (top == i).nonzero()[:, 0]
            if len(index):
                out = out.index_add(0, index, expert(flat[index]))
        return out.reshape(x.shape)


@pytest.mark.parametrize("router", [True, False], ids=["a router of their number", "unknown to structure"])
@pytest.mark.parametrize("shape", [(2, 2, 8), (2, 3, 8), (2, 1, 8)])
def test_gathered_rows_never_take_the_coefficients_of_others(router, shape):
    model = toy.seeded(lambda: Experts(router))
    toy.perturb(ll.attach(model, ll.config("lora", r=2, targets=("experts",))), 1.0)
    ll.scale(model, ZERO_ONE)
    for seed in range(20):
        refusal(lambda seed=seed: model(toy.inputs(*shape, seed=seed)), "experts.", "")


def test_flat_rows_behind_a_router_are_refused():
    model = toy.seeded(Experts)
    toy.perturb(ll.attach(model, ll.config("lora", r=2, targets=("experts",))), 1.0)
    ll.scale(model, ZERO_ONE)
    for seed in range(20):
        refusal(lambda seed=seed: model(toy.inputs(2, 8, seed=seed)), "experts.", "")


def test_time_and_batch_of_one_size_are_refused_where_time_comes_first():
    layer = nn.TransformerEncoderLayer(32, 4, 48).eval()
    toy.perturb(ll.attach(layer, ll.config("lora", r=2, targets=("linear1", "linear2"))))
    with ll.scale(layer, torch.tensor([0.0, 0.5, 1.0])):
        refusal(lambda: layer(toy.inputs(3, 3, 32)), "which of their first two axes is the batch", "linear1")


def test_time_and_batch_of_one_size_are_told_apart_where_the_modules_say_that_the_batch_comes_first():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True).eval()
    toy.perturb(ll.attach(layer, ll.config("lora", r=2, targets=("linear1", "linear2"))))
    x = toy.inputs(3, 3, 32)
    adapted = layer(x)
    with ll.disabled(layer):
        base = layer(x)
    with ll.scale(layer, torch.tensor([0.0, 1.0, 0.0])):
        y = layer(x)
    assert torch.allclose(y, torch.stack([base[0], adapted[1], base[2]]), atol=1e-6)


def test_one_position_of_each_sample_is_known_to_be_the_batch():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.Linear(8, 8)

        def forward(self, x, gather=False):
            return self.pool(x.reshape(-1, 8)[: len(x)] if gather else x[:, 0])

    model = toy.seeded(Pooled)
    toy.perturb(ll.attach(model, ll.config("lora", r=2, targets=("pool",))))
    x = toy.inputs(2, 5, 8)
    adapted = model(x)
    with ll.disabled(model):
        base = model(x)
    ll.scale(model, ZERO_ONE)
    assert torch.equal(model(x)[0], base[0])
    assert torch.allclose(model(x)[1], adapted[1], atol=1e-6)
    refusal(lambda: model(x, gather=True), "pool is given rows (2, 8) that were gathered")


@pytest.mark.parametrize("variant", CHANGED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rows_at_zero_are_the_base_bit_for_bit_where_the_adapter_overflows(variant, dtype):
    model = toy.toy().to(dtype)
    handle = toy.attached(model, ll.get(variant), toy.small(ll.get(variant)))
    toy.perturb(handle)
    for parameter in handle.parameters():
        parameter.data.mul_(1e6)
    x = toy.inputs(2, 3, 24).to(dtype)
    layer = model.blocks[0].q_proj
    with ll.disabled(model):
        base = layer(x)
    with ll.scale(model, ZERO_ONE):
        y = layer(x)
    assert torch.equal(y[0].view(torch.uint8), base[0].view(torch.uint8))


def test_a_row_at_zero_that_overflows_leaves_the_gradient_alone():
    model = toy.toy().half()
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=2, targets=("blocks.0.q_proj",), dtype=torch.float16)))
    x = toy.inputs(2, 3, 24).half()
    x[0] = 60000.0
    with ll.scale(model, ZERO_ONE):
        model.blocks[0].q_proj(x)[1].float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in handle.parameters())


@pytest.fixture(scope="module")
def generator():
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = toy.seeded(lambda: transformers.Qwen3ForCausalLM(config)).eval()
    toy.perturb(ll.attach(model, ll.config("lora", r=2)), 1.0)
    return model


def generated(model, ids, **options):
    torch.manual_seed(0)
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, **{"do_sample": False, **options}
    )


@pytest.mark.parametrize(
    ("coeff", "options"),
    [
        (torch.tensor([1.0, 0.0]), {"num_beams": 2}),
        (torch.tensor([1.0, 0.0]), {"num_return_sequences": 3, "do_sample": True}),
        (torch.ones(2, 6) * torch.tensor([[1.0], [0.0]]), {}),
        (torch.ones(2, 6) * torch.tensor([[1.0], [0.0]]), {"num_beams": 2}),
        (torch.ones(2, 6) * torch.tensor([[1.0], [0.0]]), {"use_cache": False}),
    ],
    ids=["beams", "several sequences", "per token", "per token and beams", "per token without a cache"],
)
def test_generate_is_refused_before_the_first_token_and_the_repair_works(generator, coeff, options):
    ids = toy.seeded(lambda: torch.randint(1, 64, (2, 6)))
    forwards = []
    watching = generator.model.layers[0].register_forward_hook(lambda *call: forwards.append(1))
    with ll.scale(generator, coeff), pytest.raises(ll.LoraLiteError) as caught:
        generated(generator, ids, **options)
    watching.remove()
    assert not forwards
    repair = str(caught.value).partition("\n")[2].strip()
    assert re.match(r"ll\.scale\(model, coeff", repair)
    exec(repair, {"ll": ll, "model": generator, "coeff": coeff})
    found = generated(generator, ids, **options)
    ll.scale(generator, 0.0)
    base = generated(generator, ids[1:], **{**options, "do_sample": False}) if not options.get("do_sample") else None
    ll.scale(generator, 1.0)
    if base is not None:
        assert torch.equal(found[1:], base)


def test_a_repair_of_beams_in_an_encoder_decoder_works():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=None,
    )  # fmt: skip
    model = toy.seeded(lambda: transformers.T5ForConditionalGeneration(config)).eval()
    toy.perturb(ll.attach(model, ll.config("lora", r=2)))
    input_ids = toy.seeded(lambda: torch.randint(1, 64, (2, 6)))
    attention_mask, coeff = torch.ones_like(input_ids), torch.tensor([1.0, 0.0])
    ll.scale(model, coeff)
    with pytest.raises(ll.LoraLiteError) as caught:
        generated(model, input_ids, num_beams=2)
    repair = "\n".join(line.strip() for line in str(caught.value).partition("\n")[2].splitlines())
    end = "encoded, attention_mask=attention_mask"
    repair = repair.replace(end, f"{end}, num_beams=2, max_new_tokens=3")
    exec(repair, {"ll": ll, "model": model, "coeff": coeff, "input_ids": input_ids, "attention_mask": attention_mask})


def test_another_number_of_samples_is_refused_at_the_entry(generator):
    ids = torch.ones(3, 4, dtype=torch.long)
    for coeff, words in ((torch.ones(5), "ll.scale(model, coeff[:3])"), (torch.ones(2), "model(x[:2])")):
        with ll.scale(generator, coeff):
            refusal(lambda: generator(input_ids=ids), "this call 3 samples", words)
    assert rows.HERE.call is None


def test_a_call_that_fails_inside_leaves_no_trace(generator):
    with ll.scale(generator, torch.tensor([1.0, 0.0])):
        hook = generator.model.layers[0].register_forward_hook(lambda *call: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            generator(input_ids=torch.ones(2, 4, dtype=torch.long))
        hook.remove()
    assert rows.HERE.call is None


def test_detach_takes_the_entry_off():
    model = toy.toy()
    before = photograph(model)
    handle = ll.attach(model, ll.config("lora", r=2))
    ll.scale(model, torch.ones(2))
    model(toy.inputs(2, 3, 24))
    handle.detach()
    demand_same(model, before, "detach")


def test_scale_inside_disabled_does_not_switch_the_adapter_on():
    model, x = toy.toy(), toy.inputs(2, 3, 24)
    base = model(x)
    toy.perturb(ll.attach(model, ll.config("lora", r=2)))
    with ll.disabled(model):
        ll.scale(model, 0.5)
        assert torch.equal(model(x), base)
        with ll.scale(model, torch.ones(2)), ll.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert {row.coeff for row in ll.status(model).layers} == {0.5}
    assert not torch.equal(model(x), base)
