"""Which layers are adapted: the grammar of patterns, structure before names, reasons, coverage, roles, blocks, and repairs
that end when they are followed to the letter."""

import re
import types
import warnings

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn.utils import prune

import lora_lite as ll
from lora_lite.contract.pattern import any_fits, fits, spellings
from lora_lite.core.roles import roles
from lora_lite.sites.model import block_lists, linears
from lora_lite.testing import toy

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


def llama():
    return T.LlamaForCausalLM(T.LlamaConfig(**LLAMA)).eval()


def bert(cls):
    return cls(T.BertConfig(**SMALL, intermediate_size=48)).eval()


def t5():
    return T.T5ForConditionalGeneration(
        T.T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=4, num_layers=2, num_heads=4)
    ).eval()


def rwkv():
    return T.RwkvForCausalLM(T.RwkvConfig(**{**SMALL, "hidden_size": 64}, intermediate_size=128, context_length=16)).eval()


def wavlm():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    conv = {"conv_dim": (16,), "conv_stride": (5,), "conv_kernel": (10,)}
    return T.WavLMModel(T.WavLMConfig(**sizes, **conv, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2))


def moe():
    cfg = {**LLAMA, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**cfg)).eval()


def leaves(handle):
    return {path.rpartition(".")[2] for path in handle.layers}


def quietly(model, cfg, **rest):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        return ll.attach(model, cfg, **rest)


class Deep(nn.Module):
    def __init__(self, n=12):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(4, 4), "qk_proj": nn.Linear(4, 4)}) for _ in range(n))

    def forward(self, x):
        for block in self.layers:
            x = block["qk_proj"](block["q_proj"](x))
        return x


# --- patterns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "path", "does"),
    [
        ("q", "decoder.block.0.q", True),
        ("q", "decoder.block.0.q_proj", False),
        ("layers.1", "model.layers.1.q_proj", True),
        ("layers.1", "model.layers.10.q_proj", False),
        ("layers.0-7", "layers.7.x", True),
        ("layers.0-7", "layers.8.x", False),
        ("layers.8-", "layers.80.x", True),
        ("*_proj", "layers.0.q_proj", True),
        ("*_proj", "layers.0.q_proj_2", False),
        ("layers.*.mlp", "layers.3.mlp.fc1", True),
        ("layers.*.fc1", "layers.3.mlp.fc1", False),
        (r"re:layers\.[0-3]\.", "layers.3.mlp", True),
        ("re:proj$", "layers.3.q_proj.x", False),
    ],
)
def test_a_pattern_is_whole_names_ranges_and_letters_or_an_expression(pattern, path, does):
    assert fits(pattern, path) is does


@pytest.mark.parametrize("field", ["targets", "exclude", "rank_pattern"])
@pytest.mark.parametrize("pattern", [r"q_proj$", "(q|v)_proj", r"layers\.0", "a..b", "", "[qv]_proj", "re:(", "^fc"])
def test_other_letters_are_refused_with_both_spellings(field, pattern):
    value = {pattern: 2} if field == "rank_pattern" else (pattern,)
    with pytest.raises(ll.LoraLiteError, match=field) as refused:
        ll.config("lora", **{field: value})
    assert "re:" in str(refused.value)
    names, regular = re.search(r"('[^']*')  # .* ('re:.*')$", spellings(pattern)).groups()
    for said in (eval(names), eval(regular)):
        ll.config("lora", targets=(said,))  # what the error proposes is lawful


def test_ranks_take_the_longest_pattern_and_equal_ones_that_disagree_are_refused():
    cfg = ll.config("lora", r=2, rank_pattern={"q_proj": 3, "layers.1": 4, "layers.1.q_proj": 1})
    handle = ll.attach(Deep(), cfg)
    rank = {path: adapter.cfg.r for path, adapter in handle.layers.items()}
    assert (rank["layers.0.q_proj"], rank["layers.1.qk_proj"], rank["layers.1.q_proj"], rank["layers.10.qk_proj"]) == (
        3,
        4,
        1,
        2,
    )
    with pytest.raises(ll.LoraLiteError, match="equally long") as refused:
        ll.attach(Deep(), ll.config("lora", r=2, rank_pattern={"layers.1": 3, "layers.?": 4}))
    repaired = {"layers.1": 3, "layers.?": 4, **eval(re.search(r"\{.*\}", str(refused.value))[0])}
    assert repaired.keys() > {"layers.1"}


def test_targets_are_names_and_not_pieces_of_names():
    assert leaves(ll.attach(t5(), ll.config("lora", r=2, targets=("q", "k", "v", "o")))) == {"q", "k", "v", "o"}
    handle = ll.attach(Deep(), ll.config("lora", r=2, targets="layers.1"))
    assert set(handle.layers) == {"layers.1.q_proj", "layers.1.qk_proj"}
    assert "layers.10.q_proj" in ll.find_targets(Deep(), ll.config("lora", r=2, exclude="layers.1"))


# --- all-linear by structure ----------------------------------------------------------------------------------------------


def test_nothing_is_left_out_for_a_name_that_holds_embed_or_head():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedder = bert(T.BertModel)
            self.time_embedding = nn.Linear(32, 32)
            self.head = nn.Linear(32, 8)

    handle = ll.attach(Wrapped(), ll.config("lora", r=2))
    assert {"query", "time_embedding", "head"} <= leaves(handle)
    assert handle.skipped == {}


@pytest.mark.parametrize(
    ("model", "path", "reason"),
    [
        (llama, "lm_head", "output embedding"),
        (t5, "lm_head", "output embedding, tied"),
        (lambda: bert(T.BertForMaskedLM), "cls.predictions.decoder", "output embedding, tied"),
        (lambda: bert(T.BertForMaskedLM), "cls.predictions.transform.dense", "head"),
        (lambda: bert(T.BertForSequenceClassification), "classifier", "head"),
        (lambda: T.LlamaForSequenceClassification(T.LlamaConfig(**LLAMA, num_labels=3)), "score", "head"),
        (rwkv, "head", "output embedding"),
    ],
)
def test_output_layers_and_heads_are_skipped_with_a_reason(model, path, reason):
    handle = ll.attach(model(), ll.config("lora", r=2))
    assert handle.skipped[path].startswith(reason)
    assert path not in handle.layers


def test_what_is_a_head_can_be_asked_for_by_name():
    model = bert(T.BertForSequenceClassification)
    assert "classifier" in ll.attach(model, ll.config("lora", r=1, targets=("query", "classifier"))).layers


def router(experts):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.shared_expert_gate = nn.Linear(16, 4), nn.Linear(16, 1)
            self.experts = experts()
            self.out = nn.Linear(16, 16)

    return nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])})


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_experts = 4
        self.up = nn.Parameter(torch.randn(4, 8, 16))


@pytest.mark.parametrize(
    "experts",
    [
        lambda: nn.ModuleList(nn.Linear(16, 16) for _ in range(4)),
        lambda: nn.ModuleDict({f"expert_{i}": nn.Linear(16, 16) for i in range(4)}),
        Fused,
    ],
    ids=["list", "dict", "fused"],
)
def test_routers_are_found_by_the_experts_beside_them_and_a_shared_expert_s_gate_is_none(experts):
    handle = quietly(router(experts), ll.config("lora", r=2))
    assert {p for p, why in handle.skipped.items() if why.startswith("router")} == {"layers.0.gate", "layers.1.gate"}
    assert handle.skipped["layers.0.shared_expert_gate"].startswith("narrow")
    assert "layers.0.out" in handle.layers


def test_a_linear_with_as_many_outputs_as_blocks_is_no_router():
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]), "classes": nn.Linear(8, 2)})
    assert "classes" in ll.find_targets(model, ll.config("lora", r=2))


# --- what cannot be adapted -----------------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) / self.in_features**0.5


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


class Plain(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Counting(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class InSequences(nn.Linear):
    def forward(self, x):
        return super().forward(x) if x.ndim == 2 else super().forward(x).flip(-2)


class OnRowsAlone(nn.Linear):
    def forward(self, x):
        n, _ = x.shape
        return super().forward(x).view(n, -1)


class Dropping(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


def on_the_instance(forward):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].forward = types.MethodType(forward, model[1])
    return model


def hooked(hook=None, before=None, **rest):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if hook is not None:
        model[1].register_forward_hook(hook, **rest)
    if before is not None:
        model[1].register_forward_pre_hook(before, **rest)
    return model


def beside(layer):
    return nn.ModuleDict({"0": nn.Linear(8, 8), "1": layer})


class QuantLinear(nn.Module):
    pass


class Reader(nn.Module):
    """Reads one projection and calls the other."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.o_proj(nn.functional.linear(x, self.q_proj.weight, self.q_proj.bias))


@pytest.mark.parametrize(
    ("model", "path", "reason"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), Scaled(8, 8)), "1", "forward"),
        (lambda: nn.Sequential(nn.Linear(8, 8), Pair(8, 8)), "1", "forward"),
        (lambda: nn.Sequential(nn.Linear(8, 8), InSequences(8, 8)), "1", "forward"),
        (lambda: on_the_instance(lambda self, x: nn.Linear.forward(self, x) * 2), "1", "forward"),
        (lambda: hooked(lambda m, args, y: y * 2), "1", "forward: a hook"),
        (lambda: hooked(lambda m, args, y: y.mul_(2).shape and None), "1", "forward"),
        (lambda: hooked(lambda m, args, kwargs, y: y * 2, with_kwargs=True), "1", "forward: a hook"),
        (lambda: hooked(before=lambda m, args: args[0] * 2), "1", "forward: a hook"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), "1", "narrow"),
        (lambda: beside(nn.Linear(8, 8, dtype=torch.complex64)), "1", "complex"),
        (lambda: beside(torch.jit.script(nn.Linear(8, 8))), "1", "TorchScript"),
        (lambda: beside(torch.jit.trace(nn.Sequential(nn.Linear(8, 8)), torch.ones(1, 8))), "1", "TorchScript"),
        (lambda: nn.Sequential(nn.Linear(8, 8), QuantLinear()), "1", "unknown kind"),
        (Reader, "q_proj", "read, not called"),
        (lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), "self_attn.out_proj", "read, not called"),
        (moe, "model.layers.0.mlp.experts.down_proj", "experts"),
        (wavlm, "encoder.layers.0.attention.q_proj", "read, not called"),
    ],
)
@pytest.mark.filterwarnings("ignore:Casting complex values", "ignore:.torch.jit:DeprecationWarning")
def test_it_is_skipped_under_all_linear_and_refused_by_name(model, path, reason):
    handle = quietly(model(), ll.config("lora", r=2))
    assert handle.skipped[path].startswith(reason)
    assert path not in handle.layers
    with pytest.raises(ll.LoraLiteError, match=reason.partition(",")[0]):
        ll.find_targets(model(), ll.config("lora", r=2, targets=(path,)))


def test_a_forward_of_its_own_that_is_w_x_plus_b_is_adapted_and_looking_leaves_no_trace():
    model = nn.Sequential(Plain(8, 8), Counting(8, 8))
    state = torch.random.get_rng_state()
    handle = ll.attach(model, ll.config("lora", r=2))
    assert set(handle.layers) == {"0", "1"}
    assert model[1].calls == 0
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [OnRowsAlone, Dropping])
def test_a_forward_that_takes_one_form_or_draws_in_train_mode_is_measured_in_eval_mode(kind, training):
    model = nn.Sequential(nn.Linear(8, 8), kind(8, 8)).train(training)
    assert set(ll.find_targets(model, ll.config("lora", r=2))) == {"0", "1"}
    assert model[1].training is training


class Noting:
    def __init__(self):
        self.calls, self.sums, self.n = {"y": []}, torch.zeros(8), 0

    def __call__(self, module, args, y):
        self.calls["y"].append(y)
        self.calls[len(self.calls)] = y
        self.sums += y.detach().sum((0, 1)) if y.ndim == 3 else y.detach().sum(0)
        self.n += 1
        module.called = True


def test_hooks_that_record_draw_or_raise_are_left_as_they_were_and_their_layers_are_adapted():
    def refusing(module, args, y):
        raise AssertionError("not in this test")

    seen, noting = [], Noting()
    model = hooked(lambda m, args, y: seen.append(y))
    model[0].register_forward_hook(noting)
    model[0].register_forward_hook(lambda m, args, y: torch.rand(1) and None)
    model.append(nn.Linear(8, 8))[2].register_forward_hook(refusing)
    state = torch.random.get_rng_state()
    assert set(ll.find_targets(model, ll.config("lora", r=2))) == {"0", "1", "2"}
    assert torch.equal(state, torch.random.get_rng_state())
    ll.attach(model, ll.config("lora", r=2))
    assert (seen, noting.calls, noting.n) == ([], {"y": []}, 0)
    assert not noting.sums.any()
    handle = ll.attach(model, ll.config("lora", r=2), name="second")
    assert set(handle.layers) == {"0", "1", "2"}
    assert not any(adapter.fired for adapter in handle.layers.values())


def test_what_moves_tensors_or_computes_the_weight_around_a_call_is_no_obstacle():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    accelerate.hooks.add_hook_to_module(model[1], accelerate.hooks.AlignDevicesHook(torch.device("cpu")))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[2])
    assert set(ll.find_targets(model, ll.config("lora", r=2))) == {"0", "1", "2"}
    model[1]._old_forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, model[1])
    model[1].forward = model[1]._old_forward
    assert set(ll.find_targets(model, ll.config("lora", r=2))) == {"0", "2"}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_layer_without_a_shape_is_named_and_a_root_of_torch_jit_is_refused():
    model = beside(nn.LazyLinear(8))
    assert list(ll.find_targets(model, ll.config("lora", r=2))) == ["0"]
    with pytest.raises(ll.LoraLiteError, match=r"1\.weight, 1\.bias: no shape[\s\S]*model\(batch\)"):
        ll.attach(model, ll.config("lora", r=2))
    model["1"](torch.ones(1, 8))
    assert set(ll.attach(model, ll.config("lora", r=2)).layers) == {"0", "1"}
    for call in (ll.find_targets, ll.attach):
        with pytest.raises(ll.LoraLiteError, match=r"torch\.jit"):
            call(torch.jit.script(nn.Sequential(nn.Linear(8, 8))), ll.config("lora", r=2))


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 8), Scaled(8, 8)), "forward"),
        (lambda: hooked(lambda m, args, y: y * 2), "forward: a hook"),
        (lambda: SharingRows(), "tied"),
        (lambda: SharingLayers(), "tied"),
    ],
)
@pytest.mark.parametrize("strict_base", [True, False])
def test_a_file_is_not_loaded_onto_a_layer_that_cannot_be_adapted(tmp_path, other, why, strict_base):
    trained, model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), other()
    trained.load_state_dict(model.state_dict(), strict=False)
    ll.attach(trained, ll.config("lora", r=2, targets=("1",)))
    ll.save(trained, tmp_path / "a")
    with pytest.raises(ll.LoraLiteError, match=f"1: {why}"):
        ll.load(model, tmp_path / "a", strict_base=strict_base)
    assert not any("default" in name for name, _ in model.named_modules())


class SharingRows(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self.rows = nn.Embedding(8, 8)
        self.rows.weight = self[1].weight


class SharingLayers(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8))
        self[0].weight = self[1].weight


def test_a_name_that_is_a_parameter_is_answered_as_such():
    with pytest.raises(ll.LoraLiteError, match=r"gate_up_proj.*experts: a parameter of shape \(4, 48, 32\)"):
        ll.find_targets(moe(), ll.config("lora", targets=("gate_up_proj",)))


def test_a_narrow_layer_takes_the_largest_lawful_rank_or_block_and_a_named_one_is_refused():
    def model():
        return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 2))

    handle = ll.attach(model(), ll.config("pissa", r=8))
    assert handle.lowered == {"1": "r=2"}
    assert "r=2" in repr(handle)
    assert [a.cfg.r for a in handle.layers.values()] == [8, 2]
    blocks = ll.attach(nn.Sequential(nn.Linear(12, 12), nn.Linear(10, 12)), ll.config("oft", block_size=4))
    assert blocks.lowered == {"1": "block_size=2"}
    assert "1" not in ll.attach(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 1)), ll.config("hra", r=4)).layers
    with pytest.raises(ll.LoraLiteError, match=r"1 \(d_in=12, d_out=2\): r=8 is larger"):
        ll.attach(model(), ll.config("pissa", r=8, targets=("0", "1")))


@pytest.mark.parametrize("name", ["pissa", "oft"])
def test_what_was_lowered_comes_back_from_a_file(tmp_path, name):
    def model():
        return toy.seeded(lambda: nn.Sequential(nn.Linear(12, 12), nn.Linear(10, 12) if name == "oft" else nn.Linear(12, 2)))

    one = model()
    toy.perturb(ll.attach(one, ll.config(name, **({"block_size": 4} if name == "oft" else {"r": 8}))))
    ll.save(one, tmp_path / "a")
    other = model()
    ll.load(other, tmp_path / "a")
    x = toy.inputs(3, one[1].in_features)
    assert torch.equal(one[1](x), other[1](x))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_peft_s_adapters_are_refused_with_peft_s_ways_out():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ll.LoraLiteError, match=r"adapter of PEFT[\s\S]*merge_and_unload\(\)[\s\S]*load_peft"):
        ll.attach(model, ll.config("lora"))
    assert any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)


def test_layers_that_share_a_weight_are_adapted_together_or_not_at_all():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
            self.b.weight = self.a.weight

    assert set(ll.find_targets(Tied(), ll.config("lora", r=2))) == {"a", "b", "c"}
    assert "tied" in ll.attach(Tied(), ll.config("lora", r=2, exclude=("b",))).skipped["a"]
    with pytest.raises(ll.LoraLiteError, match="a: tied: shares its weight with b"):
        ll.find_targets(Tied(), ll.config("lora", r=2, targets=("a", "c")))


# --- coverage -------------------------------------------------------------------------------------------------------------


def test_coverage_counts_every_number_once_and_says_what_lies_outside():
    model = moe()
    total = sum(p.numel() for p in model.parameters())
    with pytest.warns(ll.LoraLiteWarning, match=r"mlp.experts.gate_up_proj.*parameters of experts.*% of the model"):
        handle = ll.attach(model, ll.config("lora", r=2))
    inside = sum(
        p.numel() for path in handle.layers for n, p in model.get_submodule(path).named_parameters() if "default" not in n
    )
    assert handle.coverage == pytest.approx(inside / total, rel=1e-12)
    assert ll.status(model).coverage == handle.coverage
    assert sum(n for n, _ in handle.covered.outside.values()) == total - inside
    assert handle.covered.outside["experts"][0] == sum(p.numel() for p in model.parameters() if p.ndim == 3)
    tied = bert(T.BertForMaskedLM)
    n = sum(p.numel() for p in tied.parameters())  # named once by torch
    covered = ll.attach(tied, ll.config("lora", r=2)).covered
    assert sum(m for m, _ in covered.outside.values()) / (1 - covered.share) == pytest.approx(n)


def test_eighty_layers_fit_a_screen():
    model = T.LlamaForCausalLM(T.LlamaConfig(**{**LLAMA, "num_hidden_layers": 80}))
    handle = ll.attach(model, ll.config("lora", r=2))
    for shown in (repr(handle), str(ll.status(model))):
        assert len(shown.splitlines()) <= 24
        assert len(shown) < 2500
        assert "x80" in shown
        assert "%" in shown
    assert len(ll.status(model).long().splitlines()) == 562


# --- blocks and roles -----------------------------------------------------------------------------------------------------


def test_layers_count_blocks_of_the_list_and_not_the_first_number_of_a_path():
    inner = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"query": nn.Linear(4, 4)}) for _ in range(4)])})
    model = nn.Sequential(nn.ModuleDict({"encoder": inner}))
    assert list(ll.find_targets(model, ll.config("lora", r=2, layers=(2,)))) == ["0.encoder.layer.2.query"]


def test_several_lists_of_blocks_are_asked_about_and_the_repair_chooses():
    with pytest.raises(ll.LoraLiteError, match=r"encoder\.block or of decoder\.block") as refused:
        ll.find_targets(t5(), ll.config("lora", r=2, layers=(0,)))
    cfg = follow(refused.value)
    assert {path.split(".")[0] for path in ll.find_targets(t5(), cfg)} == {"encoder"}
    chosen = ll.find_targets(t5(), ll.config("lora", r=2, layers=(1,), targets=("decoder",)))
    assert all(path.startswith("decoder.block.1.") for path in chosen)


def test_roles_follow_widths_and_names_where_both_sides_are_equal():
    of = {}
    for model in (
        t5(),
        bert(T.BertModel),
        T.GPTNeoXForCausalLM(T.GPTNeoXConfig(**SMALL, intermediate_size=64)),
        rwkv(),
    ):
        layers = linears(model)
        found = roles(model, layers, block_lists(model))
        of[type(model).__name__] = {".".join(p.split(".")[-2:]): role for p, role in found.items()}
    assert of["T5ForConditionalGeneration"]["SelfAttention.q"] == "reader"
    assert of["T5ForConditionalGeneration"]["SelfAttention.o"] == "writer"
    assert of["BertModel"]["output.dense"] == "writer"
    assert of["BertModel"]["self.query"] == "reader"
    assert of["BertModel"]["intermediate.dense"] == "reader"
    assert of["GPTNeoXForCausalLM"]["attention.query_key_value"] == "reader"
    assert of["GPTNeoXForCausalLM"]["attention.dense"] == "writer"
    assert of["RwkvForCausalLM"]["feed_forward.value"] == "writer"
    assert of["RwkvForCausalLM"]["feed_forward.key"] == "reader"


def test_a_low_rank_projection_s_factors_are_told_apart():
    cfg = T.DeepseekV3Config(
        **SMALL, intermediate_size=64, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    )  # fmt: skip
    model = T.DeepseekV3ForCausalLM(cfg)
    chosen = ll.find_targets(model, ll.config("lora", r=2, roles=("writer",)))
    assert {path.rpartition(".")[2] for path in chosen} <= {"o_proj", "down_proj"}


# --- dead layers ----------------------------------------------------------------------------------------------------------


def test_layers_that_never_run_are_dead_after_the_model_s_own_run_also_where_all_are(tmp_path):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = Idle()
    ll.attach(model, ll.config("lora", r=2, targets=("spare",)))
    assert ll.status(model).dead == []
    model(torch.randn(2, 8))
    assert ll.status(model).dead == ["spare"]
    with pytest.warns(ll.LoraLiteWarning, match="spare never ran"):
        ll.save(model, tmp_path / "a")


# --- repairs --------------------------------------------------------------------------------------------------------------


def follow(error):
    """The config that an error's repair makes, run as the code that it is."""
    code = str(error).split("\n    ", 1)[1]
    space = {"ll": ll}
    exec(code, space)
    return space["cfg"]


def hopeless(model, cfg, error):
    """Whether an error rightly proposes nothing: none of what was asked for can be adapted."""
    said = "Nothing that targets names can be" in error
    assert said is ("\n" not in error)
    return said and not any(any_fits(cfg.targets, path) for path in ll.find_targets(model, ll.config("lora", r=2)))


class Sharing(nn.Module):
    """One module under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.b = self.a
        self.c = nn.Linear(8, 8)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


WRONG = [
    {"targets": ("qproj",)},
    {"targets": ("q_proj", "nothing")},
    {"targets": ("q_proj",), "exclude": ("q_proj",)},
    {"exclude": ("nowhere",)},
    {"exclude": ("lm_haed", "nowhere")},
    {"layers": (99,)},
    {"layers": (0,)},
    {"layers": (0, 99), "targets": ("query", "q_proj", "q", "in_proj", "c_attn", "linear1", "0", "gate")},
    {"rank_pattern": {"nothing": 2}},
    {"rank_pattern": {"re:.": 0}},
    {"targets": ("re:.",)},
    {"targets": ("lm_head", "classifier", "gate")},
    {"targets": ("all-linear",)},
    {"targets": "all_linear"},
    {"targets": "q_proj", "exclude": "q_proj"},
    {"targets": ("q_proj", "out_proj", "gate", "0", "1", "2"), "exclude": ("b",)},
    {"targets": "b", "rank_pattern": {"b": 3, "?": 4}},
    {"rank_pattern": {"layers.1": 3, "layers.?": 1, "layer.1": 3, "layer.?": 1}},
]
MODELS = {
    "llama": llama,
    "bert": lambda: bert(T.BertForMaskedLM),
    "classifier": lambda: bert(T.BertForSequenceClassification),
    "t5": t5,
    "moe": moe,
    "gpt2": lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)),
    "encoder": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 3),
    "odd": lambda: nn.Sequential(nn.Linear(8, 8), Scaled(8, 8), Pair(8, 8), nn.Linear(8, 1)),
    "router": lambda: router(lambda: nn.ModuleList(nn.Linear(16, 16) for _ in range(4))),
    "wavlm": wavlm,
    "sharing": Sharing,
}


@pytest.mark.parametrize("options", WRONG, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_repair_that_is_followed_to_the_letter_ends_in_an_attach(name, options):
    model, cfg = MODELS[name](), ll.config("lora", r=2, **options)
    tried = []
    while cfg not in tried:
        tried.append(cfg)
        try:
            handle = quietly(model, cfg)
            break
        except ll.LoraLiteError as error:
            if hopeless(model, cfg, str(error)):
                return
            cfg = follow(error)
    else:
        pytest.fail(f"the repairs go in a circle: {tried}")
    assert handle.layers


@pytest.mark.parametrize(
    ("model", "options", "words", "left"),
    [
        (llama, {"targets": "all_linear"}, ("alone and not in a tuple",), {"targets": "all-linear"}),
        (llama, {"targets": ("q_proj", "qk", "v_prj")}, ("'qk' selects no Linear",), {"targets": ("q_proj", "v_proj")}),
        (llama, {"targets": "q_proj", "exclude": "q_proj"}, ("select no Linear",), {"targets": ("q_proj",), "exclude": ()}),
        (moe, {"targets": "gate"}, ("mlp.gate.weight x2: router: a parameter of shape (4, 32)", "Nothing that targets"), None),
        (moe, {"targets": ("gate", "q_proj", "gate_up_proj")}, ("router",), {"targets": ("q_proj",)}),
        (wavlm, {"targets": ("q_proj", "v_proj")}, ("read, not called", "Nothing that targets names can be"), None),
        (wavlm, {"targets": ("q_proj", "intermediate_dense")}, ("read, not called",), {"targets": ("intermediate_dense",)}),
        (Sharing, {"exclude": "b"}, ("'b' is 'a', one module of two names",), {"exclude": ("a",)}),
        (Sharing, {"targets": ("b", "c")}, ("'b' is 'a'",), {"targets": ("a", "c")}),
        (Sharing, {"rank_pattern": {"b": 3}}, ("'b' is 'a'",), {"rank_pattern": {"a": 3}}),
        (llama, {"alpha": 4, "rank_pattern": {"layers.1": 3, "layers.?": 4}}, ("equally long",), {"alpha": 4.0}),
    ],
    ids=lambda one: getattr(one, "__name__", None) or str(one),
)
def test_one_repair_holds_what_was_asked_for_and_can_be(model, options, words, left):
    with pytest.raises(ll.LoraLiteError) as refused:
        quietly(model(), ll.config("lora", r=2, **options))
    for word in words:
        assert word in str(refused.value)
    assert ("\n" in str(refused.value)) is (left is not None)
    if left is not None:
        cfg = follow(refused.value)
        assert {field: getattr(cfg, field) for field in left} == left
        assert quietly(model(), cfg).layers


@pytest.mark.parametrize(
    ("there", "here", "paths"),
    [
        ("", "model.", {"": "model"}),
        ("model.", "", {"model": ""}),
        ("a.", "b.inner.", {"a": "b.inner"}),
    ],
)
def test_a_file_of_layers_under_another_start_is_loaded_with_the_paths_that_the_error_says(tmp_path, there, here, paths):
    def under(start):
        model = nn.ModuleDict({name: toy.seeded(lambda: nn.Linear(8, 8)) for name in ("q", "v")})
        for name in reversed(start.split(".")[:-1]):
            model = nn.ModuleDict({name: model})
        return model

    trained, model = under(there), under(here)
    ll.save(ll.attach(trained, ll.config("lora", r=2)).model, tmp_path / "a")
    with pytest.raises(ll.LoraLiteError, match="another model") as refused:
        ll.load(model, tmp_path / "a")
    assert f"paths={paths})" in str(refused.value)
    eval(str(refused.value).split("\n    ")[1], {"ll": ll, "model": model, "path": tmp_path / "a"})
    assert {name for name, m in model.named_modules() if name.endswith("default")}
    with pytest.raises(ll.LoraLiteError, match="model: as it was saved from"):
        ll.load(nn.Sequential(nn.Linear(8, 8)), tmp_path / "a")
