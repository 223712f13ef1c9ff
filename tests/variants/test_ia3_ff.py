"""IA3 on inputs against the paper's feed-forward formula in dense float64 and against PEFT."""

import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted, check_dense


def dense(a, W, b, c):
    return W * (1 + c * a.g), b


def test_output_and_gradients_equal_the_dense_form():
    check_dense(ll.IA3FFConfig(), dense)


def test_columns_are_those_of_the_weight_times_their_gain_and_the_bias_is_untouched():
    model, adapter = adapted(ll.IA3FFConfig(), size=1.0)
    for coeff in (1.0, -0.7):
        with ll.scale(model, coeff):
            changed = model.o_proj.weight + ll.delta_weight(model, "o_proj")
            zero = model(torch.zeros(2, 24, dtype=torch.float64))
        for j in (0, 11, 23):
            assert error(changed[:, j], model.o_proj.weight[:, j] * (1 + coeff * adapter.g[j])) < 1e-6
        assert torch.equal(zero, model.o_proj.bias.expand(2, -1))


def test_base_layer_receives_the_input_itself_at_the_start_and_the_gated_one_after():
    model, adapter = adapted(ll.IA3FFConfig(), size=0)
    seen = []
    model.o_proj.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    x = toy.inputs(5, 24, dtype=torch.float64)
    model(x)
    with torch.no_grad():
        adapter.g.fill_(0.5)
    model(x)
    assert torch.equal(seen[0], x)
    assert error(seen[1], 1.5 * x) < T64


class GatedBlock(nn.Module):
    """W_2 (gelu(W_g x) * W_1 x), the feed-forward part of T5 1.1 and of the llama family."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(24, 48, bias=False), nn.Linear(24, 48, bias=False)
        self.down_proj = nn.Linear(48, 24, bias=False)

    def forward(self, x):
        return self.down_proj(torch.nn.functional.gelu(self.gate_proj(x)) * self.up_proj(x))


def test_gain_on_the_second_matrix_equals_the_papers_gain_on_the_activations():
    block, x = toy.seeded(GatedBlock).double(), toy.inputs(5, 24, dtype=torch.float64)
    adapter = toy.perturb(ll.attach(block, ll.IA3FFConfig(targets="down_proj", dtype=torch.float64))).layers["down_proj"]
    inner = torch.nn.functional.gelu(block.gate_proj(x)) * block.up_proj(x)
    want = ((1 + adapter.g) * inner) @ block.down_proj.weight.T
    assert error(block(x), want) < T64


def test_authors_code_scales_the_up_projection_of_a_gated_block_which_is_the_same():
    x, outputs = toy.inputs(5, 24, dtype=torch.float64), []
    for cfg in (ll.IA3FFConfig(targets="down_proj", dtype=torch.float64), ll.IA3Config(targets="up_proj", dtype=torch.float64)):
        block = toy.seeded(GatedBlock).double()
        toy.perturb(ll.attach(block, cfg))
        outputs.append(block(x))
    assert error(*outputs) < T64
    assert error(outputs[0], toy.seeded(GatedBlock).double()(x)) > 1e-3


def test_float32_gains_reach_a_bfloat16_layer_with_one_rounding():
    model = toy.one(dtype=torch.bfloat16)
    x = toy.inputs(64, 24, dtype=torch.bfloat16)
    adapter = toy.perturb(ll.attach(model, ll.IA3FFConfig())).layers["o_proj"]
    gated = (x.double() * (1 + adapter.g.double())).bfloat16()
    assert torch.equal(model(x), toy.one(dtype=torch.bfloat16)(gated))
