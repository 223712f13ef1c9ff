"""Loops, engines and other people's hooks in one process; the guide's own code is what runs."""

import collections
import copy
import sys

import pytest
import torch

import lora_lite as ll
from lora_lite.core import finding
from lora_lite.core.checkpoint import contents
from lora_lite.mathematics.maps import box
from lora_lite.sites import quantised
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, error, photograph
from tests.core.test_messages import refusal
from tests.oracles import guide

DISTRIBUTED = ("DistributedDataParallel", "FSDP2")  # run inside two processes by tests/whole/test_distributed.py


def language_model(blocks=2):
    """A Qwen3 with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return toy.seeded(lambda: transformers.Qwen3ForCausalLM(config)).eval()


def rows(count=12, seed=3):
    ids = toy.seeded(lambda: torch.randint(64, (count, 8)), seed)
    return [{"input_ids": row, "labels": row} for row in ids]


def batches():
    dataset = rows()
    return [{key: torch.stack([row[key] for row in dataset[i : i + 4]]) for key in dataset[0]} for i in range(0, 12, 4)]


def namespace(model):
    """What the blocks of the guide may use."""
    loader = torch.utils.data.DataLoader(rows(), batch_size=4)  # type: ignore[arg-type]
    x = {"input_ids": batches()[0]["input_ids"]}
    return {
        "ll": ll, "torch": torch, "copy": copy, "model": model,
        "batches": batches(), "loader": loader, "dataset": rows(), "x": x,
    }  # fmt: skip


def run(block, model=None):
    names = namespace(model or language_model())
    exec(block, names)
    return names


def tensors(model):
    return {key: p.detach() for key, p in model.named_parameters() if p.requires_grad}


def plain_loop(model):
    (block,) = guide.sections("training")["Plain PyTorch"]
    return run(block, model)["model"]


TRAINING = [(h, i) for h, of in guide.sections("training").items() if h not in DISTRIBUTED for i in range(len(of))]


@pytest.mark.parametrize(("heading", "index"), TRAINING, ids=str)
def test_blocks_of_the_training_page_run_and_leave_the_base_alone(heading, index, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(guide.sections("training")[heading][index])
    model, base = names["model"], language_model().state_dict()
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in base.items())
    assert all(p.dtype is torch.float32 for p in model.parameters())
    if "checkpointing" in heading:
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    elif "optimizer" in names:
        start = language_model()
        ll.attach(start, ll.config("lora", r=4))
        assert any(not torch.equal(tensor, tensors(model)[key]) for key, tensor in tensors(start).items())
    if (tmp_path / "adapter.safetensors").exists():
        fresh = language_model()
        ll.load(fresh, "adapter.safetensors")
        assert torch.equal(fresh(**names["x"]).logits, model.eval()(**names["x"]).logits)


def test_blocks_of_the_page_on_several_adapters_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in guide.blocks("several"):
        names = run(block)
    assert names["ll"].status(names["model"]).lost == []
    assert list(contents("style.safetensors").adapters) == ["style"]


def test_accelerate_and_trainer_train_the_adapter_of_the_plain_loop(tmp_path, monkeypatch):
    """The same batches in the same order, no decay, one rate: the same numbers."""
    monkeypatch.chdir(tmp_path)
    code = guide.sections("training")
    wanted = run(code["Plain PyTorch"][0].replace("weight_decay=0.01", "weight_decay=0.0"))["model"]
    accelerated = run(code["Accelerate"][0])["model"]
    for key, tensor in tensors(wanted).items():
        assert error(tensors(accelerated)[key], tensor) < 1e-6
    steady = code["transformers' Trainer"][0].replace(
        "max_steps=3",
        'max_steps=3, per_device_train_batch_size=4, lr_scheduler_type="constant", train_sampling_strategy="sequential"',
    )
    trainer = run(steady)
    for key, tensor in tensors(wanted).items():
        assert error(tensors(trainer["model"])[key], tensor) < 1e-6


@pytest.mark.parametrize("name", ["lora", "vera"])
def test_trainer_goes_on_from_its_own_checkpoint(name, tmp_path, monkeypatch):
    """Also where all layers share tensors, of which save_pretrained could write no views."""
    monkeypatch.chdir(tmp_path)
    (code,) = guide.sections("training")["transformers' Trainer"]
    code = code.replace('"lora"', f'"{name}"')
    whole = run(code)
    resumed = run(code.replace("train()", 'train(resume_from_checkpoint="runs/checkpoint-2")'))
    assert resumed["trainer"].state.global_step == 3
    for key, tensor in tensors(whole["model"]).items():
        assert torch.equal(tensors(resumed["model"])[key], tensor)


@pytest.mark.parametrize("name", ["lora", "vera"])
def test_save_pretrained_writes_base_and_adapter(name, tmp_path):
    model = language_model()
    toy.perturb(ll.attach(model, ll.config(name, r=4)))
    model.save_pretrained(tmp_path)
    fresh = language_model()
    ll.attach(fresh, ll.config(name, r=4))
    import safetensors.torch

    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    missing, unexpected = fresh.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"]  # tied to the embedding
    assert not unexpected
    x = namespace(model)["x"]
    assert torch.equal(fresh(**x).logits, model(**x).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_gradients_of_the_plain_backward(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = language_model().train()
        toy.perturb(ll.attach(model, ll.config("lora", r=4)))
        if checkpointed:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model(**batches()[0]).loss.backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(error(gradients[1][key], gradient) < 1e-6 for key, gradient in gradients[0].items())


def test_a_strength_out_of_its_bounds_takes_from_each_part_of_a_batch_what_points_inwards():
    """So accumulation and data parallel differ from one large batch there, as the guide says."""
    strength = torch.tensor([1.5], requires_grad=True)
    parts = [torch.tensor([-1.0]), torch.tensor([0.25])]  # the first pushes further out
    gradients = []
    for batch in (parts, [torch.cat(parts)]):
        strength.grad = None
        for part in batch:
            (box(strength, 0, 1) * part).sum().backward()
        gradients.append(strength.grad.item())
    assert gradients == [0.25, 0.0]


def test_masters_come_back_from_a_cast_as_float32(tmp_path):
    """load builds what the config says; the bfloat16 numbers are kept exactly."""
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora", r=4)))
    model.to(torch.bfloat16)
    ll.save(model, tmp_path / "a.safetensors")
    fresh = toy.toy().to(torch.bfloat16)
    ll.load(fresh, tmp_path / "a.safetensors")
    assert {p.dtype for p in tensors(fresh).values()} == {torch.float32}
    assert all(torch.equal(tensors(fresh)[key].bfloat16(), tensor) for key, tensor in tensors(model).items())


# --- several adapters -------------------------------------------------------------------------------------------------

PAIRS = [("lora", "hra"), ("dora", "vera"), ("hra", "ia3_ff"), ("antipasto", "dora")]


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_a_mixed_batch_equals_the_separate_runs(pair, tmp_path):
    """Each row routed to its own adapter by per-sample coefficients; adapters from files, in either order."""
    x, alone = toy.inputs(4, 5, 24), {}
    for name in pair:
        model = toy.toy()
        toy.perturb(toy.attached(model, ll.get(name), toy.small(ll.get(name)), name=f"my_{name}"))
        alone[name] = model(x)
        ll.save(model, tmp_path / name)
    task = torch.tensor([0, 1, 1, 0])
    wanted = torch.where((task == 0)[:, None, None], alone[pair[0]], alone[pair[1]])
    for order in (pair, pair[::-1]):
        model = toy.toy()
        for name in order:
            ll.load(model, tmp_path / name)
        for index, name in enumerate(pair):
            ll.scale(model, (task == index).float(), name=f"my_{name}")
        assert error(model(x), wanted) < 1e-5
        assert not torch.equal(alone[pair[0]], alone[pair[1]])


# --- hooks of others --------------------------------------------------------------------------------------------------


def stacked():
    """The toy with three adapters of both sides on every layer, and its first layer."""
    model = toy.toy()
    layer = model.blocks[0].q_proj
    for name in ("hra", "lora", "dora"):
        toy.perturb(ll.attach(model, ll.config(name, r=4), name=name))
    return model, layer


def pop(layer):
    """The output hook of the first adapter that has one."""
    layer._forward_hooks.popitem(last=False)


def clear(layer):
    layer._forward_pre_hooks.clear()
    layer._forward_hooks.clear()


def replace(layer):
    """Both tables by new ones, while somebody keeps the old ones alive."""
    layer.kept = layer._forward_pre_hooks, layer._forward_hooks
    layer._forward_pre_hooks, layer._forward_hooks = collections.OrderedDict(), collections.OrderedDict()


@pytest.mark.parametrize("strip", [pop, clear, replace])
def test_lost_hooks_are_reported_and_repaired_to_the_bit(strip, tmp_path):
    model, layer = stacked()
    x = toy.inputs(2, 3, 24)
    wanted = model(x)
    strip(layer)
    assert not torch.equal(model(x), wanted)
    assert set(ll.status(model).lost) == {"blocks.0.q_proj"}
    assert "hook_lost" in str(ll.status(model))
    lost = {row.name for row in ll.status(model).layers if row.state == "hook_lost"}
    assert lost == ({"lora"} if strip is pop else {"hra", "lora", "dora"})
    for call in (
        lambda: ll.save(model, tmp_path / "a", name="lora"),
        lambda: ll.snapshot(model, "lora"),
        lambda: ll.export_peft(model, tmp_path / "a"),
        lambda: ll.merge(model),
    ):
        refusal(call, "gone from blocks.0.q_proj", "ll.repair(model)", model=model)
    assert not list(tmp_path.iterdir())
    assert ll.repair(model) == ["blocks.0.q_proj"]
    assert torch.equal(model(x), wanted)
    assert ll.repair(model) == []
    ll.save(model, tmp_path / "a", name="lora")
    ll.detach(model)
    assert torch.equal(model(x), toy.toy()(x))


def test_hooks_that_belong_to_the_adapter_of_another_copy_do_not_count():
    model, layer = stacked()
    twin = copy.deepcopy(model)
    assert ll.status(twin).lost == []
    twin.blocks[0].q_proj._forward_hooks = layer._forward_hooks
    assert set(ll.status(twin).lost) == {"blocks.0.q_proj"}
    assert ll.status(model).lost == []


@pytest.mark.parametrize("strip", [pop, clear, replace])
def test_detach_after_a_loss_is_exact(strip):
    before = photograph(toy.toy())
    model, layer = stacked()
    strip(layer)
    ll.detach(model)
    vars(layer).pop("kept", None)
    demand_same(model, before, "after detach")


def test_repair_restores_gradients_of_adapters_and_nothing_of_the_base():
    model, _ = stacked()
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    model.requires_grad_(False).eval()
    assert all("grad_off" in row.state for row in ll.status(model).layers)
    ll.repair(model)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert "grad_off" not in str(ll.status(model))
    assert not model.training


def test_repair_brings_back_the_hooks_that_keep_quantised_layers_trainable(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = toy.toy()
    layer = model.blocks[1].up_proj
    setattr(layer, quantised.REPACKS, True)  # as on a layer that bitsandbytes repacks in eval mode
    before = photograph(model)
    ll.attach(model, ll.config("lora", targets=("q_proj",)))
    layer._forward_pre_hooks.clear()
    ll.repair(model)
    ll.repair(model)
    assert list(layer._forward_pre_hooks.values()) == [quantised.trainable_again]
    ll.detach(model)
    demand_same(model, before, "after repair and detach")


def test_a_replaced_layer_is_reported_and_not_saved(tmp_path):
    model, layer = stacked()
    model.blocks[0].q_proj = copy.deepcopy(toy.toy().blocks[0].q_proj)
    gone = [row for row in ll.status(model).layers if row.replaced]
    assert {(row.name, row.path, row.state) for row in gone} == {
        (name, "blocks.0.q_proj", "replaced") for name in ("hra", "lora", "dora")
    }
    assert set(ll.status(model).lost) == {"blocks.0.q_proj"}
    refusal(lambda: ll.save(model, tmp_path / "a", name="lora"), "gone from blocks.0.q_proj", "replaced the layer", model=model)
    model.blocks[0].q_proj = layer
    assert ll.status(model).lost == []
    ll.detach(model)
    assert str(ll.status(model)) == "no adapters"


def test_a_part_of_the_model_looks_whole_from_inside():
    """Seen from a block, the layers of other blocks are elsewhere, not replaced."""
    model, _ = stacked()
    assert ll.status(model.blocks[0]).lost == []
    assert ll.status(copy.deepcopy(model.blocks[1])).lost == []


def test_hooks_of_the_user_stay_in_their_places():
    model, calls = toy.toy(), []
    layer = model.blocks[0].q_proj
    layer.register_forward_hook(lambda m, args, y: calls.append(("before", y.clone())))
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=4)))
    layer.register_forward_hook(lambda m, args, y: calls.append(("after", y.clone())))
    layer.register_full_backward_hook(lambda m, grad_in, grad_out: calls.append(("backward", grad_out[0])))
    x = toy.inputs(2, 3, 24).requires_grad_()
    model(x).sum().backward()
    assert [name for name, _ in calls] == ["before", "after", "backward"]
    assert torch.equal(calls[0][1], toy.toy().blocks[0].q_proj(x))
    assert not torch.equal(calls[0][1], calls[1][1])
    calls.clear()
    handle.detach()
    model(x).sum().backward()
    assert [name for name, _ in calls] == ["before", "after", "backward"]
    assert torch.equal(calls[0][1], calls[1][1])


@pytest.mark.parametrize("first", ["adapter", "device hook"])
@pytest.mark.parametrize("name", ["lora", "dora", "hra", "vera"])
def test_device_hooks_of_accelerate_and_adapters_work_together(name, first):
    accelerate = pytest.importorskip("accelerate")
    x, model, plain = toy.inputs(2, 3, 24), toy.toy(), toy.toy()
    cls = ll.get(name)
    toy.perturb(toy.attached(plain, cls, toy.small(cls)))

    def dispatch():
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)

    if first == "device hook":
        dispatch()
    handle = toy.perturb(toy.attached(model, cls, toy.small(cls)))
    if first == "adapter":
        dispatch()
    assert torch.equal(model(x), plain(x))
    assert ll.status(model).lost == []
    accelerate.hooks.remove_hook_from_submodules(model)
    assert torch.equal(model(x), plain(x))
    handle.detach()
    assert torch.equal(model(x), toy.toy()(x))


def test_offloaded_layers_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model = toy.toy()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ll.LoraLiteError, match="meta device"):
        ll.attach(model, ll.config("lora"))


def test_a_module_at_two_places_is_adapted_once(tmp_path):
    model = toy.toy()
    model.blocks.append(model.blocks[0])
    handle = toy.perturb(ll.attach(model, ll.config("lora", r=4)))
    assert [path for path in handle.layers if path.startswith("blocks.2")] == []
    ll.save(model, tmp_path / "a")
    fresh = toy.toy()
    fresh.blocks.append(fresh.blocks[0])
    ll.load(fresh, tmp_path / "a")
    x = toy.inputs(2, 24)
    assert torch.equal(fresh(x), model(x))
    assert finding.adapters(model)[0].path == "blocks.0.q_proj"
