"""Targets, the handle, several adapters on one model, optimizer groups, and the models of the field."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.contract import registry
from lora_lite.contract.spec import ParamSpec
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, error, photograph
from tests.testing.test_planted_faults import Sound


@pytest.fixture
def qwen():
    """Qwen3 with random weights: the projections' usual names, an output head tied to the embedding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return toy.seeded(lambda: transformers.Qwen3ForCausalLM(config)).eval()


IDS = torch.arange(24).reshape(2, 12)


def test_all_linear_takes_the_seven_projections_of_every_block_and_not_the_head(qwen):
    before = photograph(qwen)
    found = ll.find_targets(qwen, ll.config("lora"))
    assert len(found) == 21
    assert not [path for path in found if "lm_head" in path]
    assert all(found[path] is qwen.get_submodule(path) for path in found)
    demand_same(qwen, before, "after find_targets")


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"targets": ("q_proj", "v_proj")}, 6),
        ({"targets": (r"re:[qk]_proj$",)}, 6),
        ({"targets": r"re:layers\.1\..*mlp"}, 3),
        ({"targets": "layers.1.mlp"}, 3),
        ({"targets": "layers.1-"}, 14),
        ({"targets": ("?_proj", "gate*")}, 15),
        ({"targets": ("o_proj",), "layers": (0, 2)}, 2),
        ({"layers": [1]}, 7),
        ({"exclude": ("lm_head", "mlp")}, 12),
        ({"roles": ("writer",)}, 6),
        ({"roles": ("reader",)}, 15),
    ],
)
def test_targets_exclude_layers_and_roles(qwen, fields, count):
    assert len(ll.find_targets(qwen, ll.config("lora", **fields))) == count


def test_rank_pattern_sets_the_rank_of_the_layers_it_matches(qwen):
    cfg = ll.config("lora", r=4, targets=("q_proj", "k_proj"), rank_pattern={"layers.0": 2, "layers.0.self_attn.k_proj": 3})
    handle = ll.attach(qwen, cfg)
    ranks = {path: a.A.shape[0] for path, a in handle.layers.items()}
    assert ranks == {
        f"model.layers.{n}.self_attn.{p}_proj": rank
        for n, own in ((0, (2, 3)), (1, (4, 4)), (2, (4, 4)))
        for p, rank in zip("qk", own)
    }


def test_real_model_trains_only_the_adapter_and_comes_back_exactly(qwen):
    before, wanted = photograph(qwen), qwen(input_ids=IDS).logits
    with ll.attach(qwen, ll.config("dora", r=4)) as handle:
        assert torch.equal(qwen(input_ids=IDS).logits, wanted)
        optimizer = torch.optim.AdamW(ll.param_groups(qwen, lr=1e-2))
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = qwen(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        trained = {name for name, p in qwen.named_parameters() if p.requires_grad}
        assert all(".default." in name for name in trained)
        assert len(list(handle.parameters())) == len(trained)
    demand_same(qwen, before, "after training and detach")


def test_gpt2_conv1d_is_a_linear_with_a_transposed_weight():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    model = toy.seeded(lambda: transformers.GPT2LMHeadModel(config)).eval()
    before = photograph(model)
    wanted = model(input_ids=IDS).logits
    for name in ("lora", "dora", "pissa", "antipasto"):
        handle = ll.attach(model, ll.config(name, r=8, targets=("c_attn", "c_proj")))
        assert torch.equal(model(input_ids=IDS).logits, wanted)
        toy.perturb(handle, 0.2)
        adapted = model(input_ids=IDS).logits
        assert error(adapted, wanted) > 1e-3
        assert ll.delta_weight(model, "transformer.h.0.attn.c_attn").shape == (96, 32)
        ll.merge(model)
        assert error(model(input_ids=IDS).logits, adapted) < 1e-5
        handle.detach()
        demand_same(model, before, f"after {name}")


def test_adapters_of_different_variants_and_sides_stack_in_any_mixture(tmp_path):
    """Each is disabled, scaled, saved and detached alone; the rest gives what it gives without it."""
    model, x = toy.toy(), toy.inputs(3, 5, toy.WIDTH)
    base = photograph(model)
    plan = {"turn": ll.config("oft", targets=("q_proj", "up_proj")), "low": ll.config("lora", r=4), "gain": ll.config("ia3")}
    for seed, (name, cfg) in enumerate(plan.items()):
        toy.perturb(ll.attach(model, cfg, name=name), seed=seed)
    everything = model(x)
    for name in plan:
        ll.save(model, tmp_path / f"{name}.safetensors", name=name)
        with ll.disabled(model, name):
            without = model(x)
        assert error(without, everything) > 1e-3
        fresh = toy.toy()
        for other in plan:
            if other != name:
                if not (tmp_path / f"{other}.safetensors").exists():
                    ll.save(model, tmp_path / f"{other}.safetensors", name=other)
                ll.load(fresh, tmp_path / f"{other}.safetensors")
        assert torch.equal(fresh(x), without)
    with ll.scale(model, 0.5, name="gain"):
        half = model(x)
    assert error(half, everything) > 1e-4
    assert torch.equal(model(x), everything)
    ll.merge(model)
    assert error(model(x), everything) < 1e-5
    ll.unmerge(model)
    ll.detach(model, "low")
    assert ll.status(model).layers[0].name == "turn"
    ll.detach(model)
    demand_same(model, base, "after all left")


def test_scale_sets_at_once_and_as_a_context_gives_the_old_value_back():
    model = toy.toy()
    handle = ll.attach(model, ll.config("lora"))
    ll.scale(model, 0.25)
    with handle.scale(2):
        assert {a.coeff for a in handle.layers.values()} == {2.0}
    assert {row.coeff for row in ll.status(model).layers} == {0.25}
    with pytest.raises(RuntimeError), handle.scale(3.0):
        raise RuntimeError
    assert {row.coeff for row in ll.status(model).layers} == {0.25}


def test_disabled_does_no_adapter_work():
    model = toy.toy()
    handle = ll.attach(model, ll.config("lora"))

    def explode(*_):
        raise AssertionError("the adapter ran")

    for adapter in handle.layers.values():
        adapter.forward = explode
    with ll.disabled(model):
        model(toy.inputs(2, 24))
    with pytest.raises(AssertionError, match="the adapter ran"):
        model(toy.inputs(2, 24))


def test_param_groups_take_each_config_s_rate_and_decay_where_declared():
    model = toy.toy()
    ll.attach(model, ll.config("dora", r=4, lr=3e-4), name="a")
    ll.attach(model, ll.config("ia3", lr=7e-3), name="b")
    groups = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in ll.param_groups(model, weight_decay=0.1)}
    assert groups == {(3e-4, 0.1): 16, (3e-4, 0.0): 8, (7e-3, 0.1): 8}
    assert {g["lr"] for g in ll.param_groups(model, lr=1.0)} == {1.0}
    torch.optim.AdamW(ll.param_groups(model))


def test_a_tensor_s_own_rate_goes_before_the_adapter_s():
    class TwoRates(Sound):
        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {**Sound.param_specs(d_in, d_out, cfg), "B": ParamSpec((d_out, cfg.r), lr=0.5)}

    model = toy.one()
    with registry.borrowed(TwoRates):
        adapter = ll.attach(model, TwoRates.Config(lr=1e-3)).layers["o_proj"]
    for lr, others in ((None, 1e-3), (1e-2, 1e-2)):
        groups = {g["lr"]: g["params"] for g in ll.param_groups(model, lr=lr)}
        assert groups.keys() == {others, 0.5}
        assert groups[others] == [adapter.A]
        assert groups[0.5] == [adapter.B]
    with pytest.raises(ll.LoraLiteError, match="learning rate above 0"):
        ParamSpec((3,), lr=0)


def test_attached_context_detaches_after_an_error():
    model = toy.toy()
    before = photograph(model)
    with pytest.raises(RuntimeError), ll.attach(model, ll.config("lora")):
        raise RuntimeError
    demand_same(model, before, "after an error inside the context")


def test_status_prints_a_table():
    model = toy.toy()
    assert str(ll.status(model)) == "no adapters"
    ll.attach(model, ll.config("antipasto", r=4), name="gain", calibration_data=None)
    text = str(ll.status(model))
    assert "not run yet" in text
    model(toy.inputs(2, 24))
    status = ll.status(model)
    lines = str(status).splitlines()
    assert [line.split()[1:3] for line in lines[1:5]] == [
        [f"blocks.*.{leaf}", "x2"] for leaf in ("q_proj", "o_proj", "up_proj", "down_proj")
    ]
    assert all("fired" in line for line in lines[1:5])
    assert lines[5].split()[:3] == ["total", "8", "layers"]
    assert lines[6] == f"{status.coverage:.1%} of the model's numbers are in adapted layers"
    assert len(lines) == 7
    every = status.long().splitlines()
    assert [line.split()[1] for line in every[1:9]] == [row.path for row in status.layers]
    assert every[9].split()[:3] == ["total", "8", "layers"]
    assert len(every) == 10
    ll.merge(model)
    assert "merged" in str(ll.status(model))


def test_random_starts_depend_on_seed_and_path_only():
    """Not on the order of layers, not on the global generator, and they leave it alone."""
    cfg = ll.config("lora", r=4)
    model, alone = toy.toy(), toy.toy()
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    whole = ll.attach(model, cfg).layers
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(2)
    part = ll.attach(alone, ll.config("lora", r=4, targets=("blocks.1.up_proj",))).layers
    assert torch.equal(part["blocks.1.up_proj"].A, whole["blocks.1.up_proj"].A)
    assert not torch.equal(whole["blocks.0.up_proj"].A, whole["blocks.1.up_proj"].A)
    other = ll.attach(toy.toy(), ll.config("lora", r=4, seed=1)).layers
    assert not torch.equal(other["blocks.1.up_proj"].A, whole["blocks.1.up_proj"].A)


def test_autocast_around_attach_changes_nothing():
    plain = ll.attach(toy.toy(), ll.config("pissa", r=4)).layers
    with torch.autocast("cpu", torch.bfloat16):
        inside = ll.attach(toy.toy(), ll.config("pissa", r=4)).layers
    for path, adapter in plain.items():
        assert all(torch.equal(t, inside[path].state_dict()[k]) for k, t in adapter.state_dict().items())


def test_float64_base_starts_and_merges_in_float64():
    model = toy.one(24, 32, dtype=torch.float64)
    handle = toy.perturb(ll.attach(model, ll.config("pissa", r=4, dtype=torch.float64)))
    x = toy.inputs(5, 24, dtype=torch.float64)
    wanted = model(x)
    ll.merge(model)
    assert error(model(x), wanted) < 1e-12
    handle.detach()


def test_merge_that_fails_half_way_leaves_nothing_merged(monkeypatch):
    import sys

    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora")))
    before = photograph(model)
    module = sys.modules["lora_lite.core.merge"]
    swap, calls = module.swap, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        swap(*arguments)

    monkeypatch.setattr(module, "swap", failing)
    with pytest.raises(KeyboardInterrupt):
        ll.merge(model)
    demand_same(model, before, "after an interrupted merge")
    assert not any(row.merged for row in ll.status(model).layers)


def test_merge_in_bfloat16_is_one_rounding_of_the_effective_weight():
    model = toy.toy().to(torch.bfloat16)
    toy.perturb(ll.attach(model, ll.config("lora", r=4)), 0.05)
    layer = model.blocks[0].q_proj
    wanted = (layer.weight.double() + ll.delta_weight(model, "blocks.0.q_proj").double()).to(torch.bfloat16)
    ll.merge(model)
    assert torch.equal(layer.weight, wanted)
    ll.unmerge(model)


def test_deepcopy_of_a_stack_detaches_on_its_own():
    model = toy.toy()
    before = photograph(model)
    ll.attach(model, ll.config("lora"), name="a")
    ll.attach(model, ll.config("hra", r=4), name="b")
    twin = copy.deepcopy(model)
    ll.detach(twin, "a")
    assert {row.name for row in ll.status(model).layers} == {"a", "b"}
    ll.detach(twin)
    demand_same(twin, before, "after detach of the copy")


def test_state_dict_keeps_the_base_keys_in_place():
    model = toy.toy()
    keys = list(model.state_dict())
    ll.attach(model, ll.config("lora"), name="style")
    assert [k for k in model.state_dict() if ".style." not in k] == keys


def test_configs_are_frozen_equal_and_exported():
    assert ll.LoRAConfig(r=4) == ll.config("lora", r=4)
    for name in ll.names():
        assert getattr(ll, ll.get(name).Config.__name__) is ll.get(name).Config
    with pytest.raises(AttributeError):
        ll.LoRAConfig().r = 3
    with pytest.raises(AttributeError, match="Closest name: LoRAConfig"):
        ll.LoraConfig  # noqa: B018
    assert ll.LoRAConfig(dtype="bfloat16").dtype is torch.bfloat16
    assert ll.LoRAConfig.from_json(ll.LoRAConfig(targets="q_proj", layers=[1, 2]).to_json()).layers == (1, 2)


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda ns: ns.pop("param_specs"), "param_specs is missing"),
        (lambda ns: ns.pop("forward"), "neither forward nor forward_input"),
        (lambda ns: ns.update(forward=lambda self, x, y: y), "Missing: base"),
        (lambda ns: ns.update(Config=dict), "Config is"),
        (lambda ns: ns.update(needs=staticmethod(lambda cfg: ("n",))), "no group_init"),
        (lambda ns: ns.update(init=lambda self: None), "init(self, W)"),
    ],
)
def test_registration_refuses_what_breaks_the_contract(break_it, word):
    from tests.testing.test_planted_faults import Sound, SoundConfig

    space = {"Config": SoundConfig, "param_specs": Sound.__dict__["param_specs"], "forward": Sound.forward}
    break_it(space)
    names = ll.names()
    with pytest.raises(ll.LoraLiteError, match=word.replace("(", r"\(").replace(")", r"\)")):
        ll.register(type("Broken", (ll.Adapter,), space))
    assert ll.names() == names


def test_registration_refuses_a_config_of_another_variant_and_swapped_arguments():
    """The config tells which variant is meant: with a shared one the parent would run in silence."""
    from tests.testing.test_planted_faults import Sound, SoundConfig

    with pytest.raises(ll.LoraLiteError, match="LoRAConfig belongs to 'lora'"):
        ll.register(type("MyLoRA", (ll.get("lora"),), {}))
    swapped = {"Config": SoundConfig, "param_specs": staticmethod(lambda d_out, d_in, cfg: {}), "forward": Sound.forward}
    with pytest.raises(ll.LoraLiteError, match=r"param_specs\(d_in, d_out, cfg\)"):
        ll.register(type("Swapped", (ll.Adapter,), swapped))


def test_random_starts_leave_the_accelerators_generators_alone(monkeypatch):
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("torch.manual_seed reseeds accelerators"))
    ll.attach(toy.toy(), ll.config("lora"))


def test_attach_and_detach_take_one_and_the_same_module(tmp_path):
    """Names and requires_grad flags belong to the module that was attached to."""
    for first, second in ((lambda m: m.blocks[0], lambda m: m), (lambda m: m, lambda m: m.blocks[0])):
        model = toy.toy()
        before = photograph(model)
        ll.attach(first(model), ll.config("lora"), name="a")
        other = second(model)
        for call, *arguments in (
            (ll.attach, other, ll.config("oft")),
            (ll.detach, other),
            (ll.save, other, tmp_path / "a.safetensors"),
        ):
            with pytest.raises(ll.LoraLiteError, match="was attached through another module"):
                call(*arguments)
        ll.detach(first(model))
        demand_same(model, before, "after detach through the module of the attach")


@pytest.mark.parametrize("wrap", ["whole", "block", "checkpoint"])
def test_wrapping_after_attach_keeps_paths_flags_and_files(wrap, tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = toy.toy()
    flags = {k: p.requires_grad for k, p in model.named_parameters()}
    toy.perturb(ll.attach(model, ll.config("lora")))
    wanted, wrapped = model(toy.inputs(2, 3, 24)), model
    if wrap == "whole":
        wrapped = torch.compile(model, backend="eager")
    else:
        block = model.blocks[0]
        model.blocks[0] = torch.compile(block, backend="eager") if wrap == "block" else checkpoint_wrapper(block)
    assert ll.status(wrapped).layers[0].path == "blocks.0.q_proj"
    ll.save(wrapped, tmp_path / "a.safetensors")
    fresh = toy.toy()
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(toy.inputs(2, 3, 24)), wanted)
    ll.detach(wrapped)
    model.blocks[0] = getattr(
        model.blocks[0], "_orig_mod", getattr(model.blocks[0], "_checkpoint_wrapped_module", model.blocks[0])
    )
    assert {k: p.requires_grad for k, p in model.named_parameters()} == flags
    torch.compiler.reset()


def test_merge_refuses_what_it_could_not_undo():
    computed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    ll.attach(computed, ll.config("lora"))
    with pytest.raises(ll.LoraLiteError, match="computed, by a parametrization"):
        ll.merge(computed)
    half = toy.one(8, 8).half()
    with torch.no_grad():
        half.o_proj.weight.fill_(6e4)
    handle = ll.attach(half, ll.config("ia3"))
    with torch.no_grad():
        handle.layers["o_proj"].g.fill_(0.5)
    with pytest.raises(ll.LoraLiteError, match="o_proj overflows"):
        ll.merge(half)
    assert half.o_proj.weight.isfinite().all()


def test_merged_layers_follow_the_model_and_refuse_what_needs_the_base(tmp_path):
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("ia3"), name="gain"))
    ll.save(model, tmp_path / "a.safetensors")
    ll.merge(model)
    for call in (
        lambda: ll.delta_weight(model, "blocks.0.q_proj"),
        lambda: ll.attach(model, ll.config("lora")),
        lambda: ll.load(model, tmp_path / "a.safetensors", name="again"),
        lambda: ll.disabled(model).__enter__(),
    ):
        with pytest.raises(ll.LoraLiteError, match="merged") as refused:
            call()
        assert "ll.unmerge(model)" in str(refused.value)
    model.to(torch.bfloat16)
    ll.unmerge(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model(toy.inputs(2, 24, dtype=torch.bfloat16))


def test_adapters_on_different_layers_merge_one_by_one():
    model, x = toy.toy(), toy.inputs(3, 5, 24)
    toy.perturb(ll.attach(model, ll.config("lora", targets=("q_proj",)), name="a"))
    toy.perturb(ll.attach(model, ll.config("lora", targets=("down_proj",)), name="b"), seed=5)
    wanted = model(x)
    ll.merge(model, "a")
    ll.merge(model, "b")
    assert error(model(x), wanted) < 1e-5
    ll.unmerge(model)
    assert torch.equal(model(x), wanted)


def test_handle_of_a_detached_adapter_touches_no_other():
    model = toy.toy()
    with ll.attach(model, ll.config("lora")) as old:
        old.detach()
    ll.attach(model, ll.config("lora"))
    for call in (old.detach, lambda: old.scale(0.5), lambda: old.save("a.safetensors")):
        with pytest.raises(ll.LoraLiteError, match="was detached"):
            call()


def test_error_inside_the_context_is_not_hidden_by_an_earlier_detach():
    handle = ll.attach(toy.toy(), ll.config("lora"))

    def work():
        with handle:
            handle.detach()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()


def test_scaling_can_be_entered_again():
    model = toy.toy()
    handle = ll.attach(model, ll.config("lora"))
    half = ll.scale(model, 0.5)
    for _ in range(2):
        with half:
            assert {a.coeff for a in handle.layers.values()} == {0.5}
        assert {a.coeff for a in handle.layers.values()} == {1.0}


def test_coefficient_that_is_trained_gets_its_gradient():
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora")))
    for shape in ((), (3,)):
        coeff = torch.full(shape, 0.5, requires_grad=True)
        with ll.scale(model, coeff):
            model(toy.inputs(3, 5, 24)).sum().backward()
        assert coeff.grad is not None
        assert coeff.grad.all()


def test_find_targets_on_thousands_of_layers_is_linear_in_their_number():
    """Counts attribute look-ups, not seconds: every module's weight is looked at a fixed number of times."""
    looks = []

    class Counting(nn.Linear):
        def __getattr__(self, name):
            if name == "weight":
                looks.append(1)
            return super().__getattr__(name)

    counts = []
    for n in (20, 40):
        looks.clear()
        ll.find_targets(nn.Sequential(*(Counting(2, 2) for _ in range(n))), ll.config("lora"))
        counts.append(len(looks))
    assert counts[1] <= 2.2 * counts[0]


def test_registration_refuses_a_name_in_use_and_a_class_that_is_no_adapter():
    from tests.testing.test_planted_faults import Sound

    with pytest.raises(ll.LoraLiteError, match="has that name"):
        ll.register(name="lora")(type("Other", (Sound,), {}))
    with pytest.raises(ll.LoraLiteError, match="subclass of"):
        ll.register(nn.Linear)


def test_param_specs_that_cannot_be():
    from lora_lite.contract.spec import ParamSpec

    for fields, word in (
        ({"shape": ()}, r"\(1,\)"),
        ({"shape": (0, 2)}, "at least 1"),
        ({"shape": (2,), "start": "zeros"}, "function of the shape"),
        ({"shape": (2,), "decay": True}, "identity is 0"),
        ({"shape": (2,), "decay": True, "identity": 1.0}, "identity is 0"),
    ):
        with pytest.raises(ll.LoraLiteError, match=word):
            ParamSpec(**fields)


class ByTrace(Sound):
    """Ranks by the size of a layer's inputs: none for the smallest, two for the largest."""

    @staticmethod
    def needs(cfg):
        return ("x_tr",)

    @staticmethod
    def ranks(adapters, stats, cfg):
        order = sorted(adapters, key=lambda path: float(stats["x_tr"][path]))
        return {path: cfg.r for path in adapters} | {order[0]: 0, order[-1]: 2}

    @staticmethod
    def group_init(adapters, stats, cfg):
        for path, adapter in adapters.items():
            adapter.A.copy_(stats["weight"][path][: adapter.cfg.r])


@pytest.mark.parametrize("name", ["lora", "olora"])
def test_only_methods_that_read_the_weight_at_their_start_get_its_numbers(name, monkeypatch):
    cls, seen = ll.get(name), []
    monkeypatch.setattr(cls, "init", lambda self, W: seen.append(W))
    ll.attach(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), ll.config(name, r=2))
    assert [tuple(W.shape) for W in seen] == [(4, 3), (4, 4)]
    assert [W.is_meta for W in seen] == [not cls.claims.reads_weight] * 2
    assert cls.claims.reads_weight == (name != "lora")


def test_ranks_from_data_build_the_tensors_and_stand_in_the_config(tmp_path):
    model, fresh = toy.toy(), toy.toy()
    with registry.borrowed(ByTrace):
        cfg = ByTrace.Config(r=4, targets=("q_proj", "down_proj"))
        handle = ll.attach(model, cfg, toy.batches())
        ranks = {path: adapter.A.shape[0] for path, adapter in handle.layers.items()}
        assert sorted(ranks.values()) == [2, 4, 4]
        assert handle.skipped == {path: "rank 0" for path in set(ll.find_targets(toy.toy(), cfg)) - set(ranks)}
        assert handle.config == dataclasses.replace(cfg, rank_pattern=handle.config.rank_pattern)
        handle.save(tmp_path / "a.safetensors")
        loaded = ll.load(fresh, tmp_path / "a.safetensors")
        assert {path: adapter.A.shape[0] for path, adapter in loaded.layers.items()} == ranks
        assert loaded.config == handle.config
        every = set(ll.find_targets(toy.toy(), ll.LoRAConfig()))
        assert loaded.skipped == {path: "not in the file" for path in every - set(ranks)}
        # a given pattern is taken as it is: the same ranks again, whatever the data says
        again = ll.attach(toy.toy(), handle.config, [toy.inputs(4, 6, 24) * 100])
        assert again.config == handle.config


def test_layers_of_rank_zero_are_left_out():
    model = toy.toy()
    handle = ll.attach(model, ll.LoRAConfig(r=4, rank_pattern={"blocks.0": 0, "q_proj": 2}))
    assert {path: adapter.cfg.r for path, adapter in handle.layers.items()} == {
        "blocks.1.q_proj": 2, "blocks.1.o_proj": 4, "blocks.1.up_proj": 4, "blocks.1.down_proj": 4,
    }  # fmt: skip
    assert set(handle.skipped) == {f"blocks.0.{leaf}" for leaf in ("q_proj", "o_proj", "up_proj", "down_proj")}
    with pytest.raises(ll.LoraLiteError, match=r"together select no Linear .*down_proj x2: rank 0"):
        ll.find_targets(toy.toy(), ll.LoRAConfig(rank_pattern={"blocks": 0}))
    with pytest.raises(ll.LoraLiteError, match=r"rank_pattern\['q_proj'\]=-1"):
        ll.LoRAConfig(rank_pattern={"q_proj": -1})


def test_an_adapter_whose_start_is_a_closure_goes_through_pickle():
    model = nn.Sequential(nn.Linear(8, 6))
    handle = ll.attach(model, ll.config("lora", r=2, init="gaussian"))
    back = pickle.loads(pickle.dumps(model))
    assert back[0].default.specs().keys() == handle.layers["0"].specs().keys()
