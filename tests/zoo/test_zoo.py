"""Every promise of an attach, a training and a detach on every architecture of the zoo.

Every day on one architecture of each kind (DAILY), on all of them in the long suite. Outputs are compared with a base that
requires no gradient: torch multiplies inputs that are not contiguous in another order where a weight requires one.
"""

from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .entry import REFUSED, default, entry, read
from .models import FAMILY, ZOO, forward, tensors
from .row import Row

DAILY = {
    "qwen3": "tied head, norms on queries and keys",
    "gpt2": "Conv1D",
    "qwen3_moe": "experts as 3-D parameters",
    "phimoe": "a router that is a Linear and returns a tuple",
    "switch_transformers": "experts in a list, an encoder-decoder",
    "mamba": "a Linear whose weight is read",
    "qwen3_next": "linear attention, a gate of one output",
    "bart": "encoder-decoder",
    "bert": "a head called decoder, tied to the embedding",
    "roberta": "a task head outside the base model",
    "vit": "pixels",
    "whisper": "a head called proj_out, audio",
    "wavlm": "attention that reads the weights of its projections",
    "gemma3": "vision and language, nn.MultiheadAttention in a pooler",
    "time_series_transformer": "heads of one output",
    "torch_encoder": "nn.MultiheadAttention",
}


def over(names: Iterable[str]) -> pytest.MarkDecorator:
    """One test for each architecture, marked `long` where another of its kind is run every day."""
    return pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in DAILY else pytest.mark.long) for n in names])


every = over(name for name, text in read().items() if not text.startswith(REFUSED))


def frozen(name: str) -> tuple[Row, nn.Module, Mapping[str, Tensor]]:
    row = ZOO[name]
    return row, row.build().requires_grad_(False), row.batch()


def attached(model: nn.Module) -> ll.Attached:
    return default(model)[0]


def strong(handle: ll.Attached, std: float = 0.1) -> ll.Attached:
    """Every trainable tensor drawn anew: an adapter that is far from its start."""
    draw = torch.Generator().manual_seed(1)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=std, generator=draw)
    return handle


def demand_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    differing = {
        key: float((found[key] - wanted[key]).abs().max()) for key in wanted if not torch.equal(found[key], wanted[key])
    }
    assert differing == {}


def demand_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Equal up to a share of the largest number of each tensor; one of nothing but rounding is held against the largest."""
    assert found.keys() == wanted.keys()
    least = 1e-4 * max(float(z.abs().max()) for z in wanted.values())
    far = {key: float((found[key] - z).abs().max() / z.abs().max().clamp_min(least)) for key, z in wanted.items()}
    assert {key: error for key, error in far.items() if not error < tolerance} == {}


def demand_moved(found: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    assert any(not torch.equal(found[key], base[key]) for key in base)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}


@over(ZOO)
def test_the_default_takes_what_is_written(name):
    assert entry(name) == read()[name]


def test_every_architecture_is_written():
    assert read().keys() == ZOO.keys()
    assert set(DAILY) <= set(ZOO)
    assert len(ZOO) >= 60
    assert {FAMILY[name] for name in DAILY} == set(FAMILY.values())


@every
def test_coverage_counts_every_parameter_once(name):
    _, model, _ = frozen(name)
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    handle = attached(model)
    inside = {id(p) for path in handle.layers for p in model.get_submodule(path).parameters(recurse=False)}
    assert handle.coverage == pytest.approx(sum(sizes[key] for key in inside) / sum(sizes.values()), rel=1e-9)


@every
def test_the_start_is_the_base_bit_for_bit(name):
    _, model, batch = frozen(name)
    base = forward(model, batch)
    attached(model)
    demand_equal(forward(model, batch), base)


@every
def test_three_steps_move_the_output_and_not_the_base(name):
    _, model, batch = frozen(name)
    before, base = state(model), forward(model, batch)
    handle = attached(model)
    start = {path: [p.detach().clone() for p in adapter.parameters()] for path, adapter in handle.layers.items()}
    train(model)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    for _ in range(3):
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    model.eval()
    demand_moved(forward(model, batch), base)
    moved = {
        path for path, a in handle.layers.items() if any(not torch.equal(p, q) for p, q in zip(a.parameters(), start[path]))
    }
    assert moved >= handle.layers.keys() - set(ll.status(model).dead) - WITHOUT_GRADIENT.get(name, set())
    with ll.disabled(model):
        demand_equal(forward(model, batch), base)
    after = state(model)
    demand_equal({key: after[key] for key in before}, before)


def train(model: nn.Module) -> None:
    """Training mode, in which the statistics of the base stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of everything that the model puts out, each tensor with its own weights, so that norms and means hide nothing."""
    outputs = tensors(model(**batch))
    draw = torch.Generator().manual_seed(2)
    return sum(((z.float() * torch.randn(z.shape, generator=draw)).sum() for z in outputs.values()), torch.zeros(()))


POOLER = {"model.vision_tower.head.mlp.fc1", "model.vision_tower.head.mlp.fc2"}
CLIPPED = {f"model.layers.{i}.altup.correction_coefs" for i in (0, 1)}
WITHOUT_GRADIENT = {"fnet": {"fnet.pooler.dense"}, "gemma3": POOLER, "paligemma": POOLER, "gemma3n_text": CLIPPED}
"""Layers that change nothing of what the model puts out, and those whose weight is read in training and called in use."""


@every
def test_a_file_brings_the_output_back_bit_for_bit(name, tmp_path):
    row, model, batch = frozen(name)
    strong(attached(model)).save(tmp_path / "a.safetensors")
    fresh = row.build().requires_grad_(False)
    base = forward(fresh, batch)
    ll.load(fresh, tmp_path / "a.safetensors")
    wanted = forward(model, batch)
    demand_moved(wanted, base)
    demand_equal(forward(fresh, batch), wanted)


@every
def test_merge_holds_the_change_and_unmerge_every_bit(name):
    _, model, batch = frozen(name)
    strong(attached(model))
    before, wanted = state(model), forward(model, batch)
    ll.merge(model)
    demand_close(forward(model, batch), wanted, 1e-4)
    ll.unmerge(model)
    demand_equal(state(model), before)
    demand_equal(forward(model, batch), wanted)


@every
def test_detach_leaves_nothing(name):
    row = ZOO[name]
    model, batch = row.build(), row.batch()
    next(model.parameters()).requires_grad_(False)
    before, base = state(model), forward(model, batch)
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    modules, hooks = [key for key, _ in model.named_modules()], hook_counts(model)
    handle = strong(attached(model))
    assert not any(p.requires_grad for key, p in model.named_parameters() if key in flags)
    forward(model, batch)
    handle.detach()
    after = state(model)
    assert [*after] == [*before]
    demand_equal(after, before)
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    assert [key for key, _ in model.named_modules()] == modules
    assert hook_counts(model) == hooks
    assert not any(module.training for module in model.modules())
    demand_equal(forward(model, batch), base)


def hook_counts(model: nn.Module) -> list[tuple[int, int]]:
    return [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]


@over(name for name, row in ZOO.items() if row.generates)
def test_generate_and_one_pass_agree(name):
    """With the adapter, the cache of generation leads to the same logits as one pass over the whole text."""
    row, model, batch = frozen(name)
    base = step_by_step(row, model, batch)
    handle = attached(model)
    with handle.scale(0.0):
        assert torch.equal(step_by_step(row, model, batch)[0], base[0])
    assert torch.equal(step_by_step(row, model, batch)[0], base[0])
    strong(handle)
    stepped, whole = step_by_step(row, model, batch)
    assert not torch.equal(stepped, base[0])
    if name not in OTHERWISE_IN_ONE_PASS:
        demand_close({"logits": stepped}, {"logits": whole}, 1e-4)


OTHERWISE_IN_ONE_PASS = {
    "paligemma": "attends both ways inside what it is given, so that text means something else when it is given as a whole",
    "rwkv": "transformers 5 loses its state between the steps of generate, without adapters too",
}


@torch.no_grad()
def step_by_step(row: Row, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of three new tokens (2, 3, V): as generate sees them, and from one pass over what it wrote."""
    prompt = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    out = model.generate(
        **prompt,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        num_beams=1,
        return_dict_in_generate=True,
        output_logits=True,
    )
    text = out.sequences[:, :-1]
    if model.config.is_encoder_decoder:
        again = {**prompt, "decoder_input_ids": text}
    else:
        more = text.shape[1] - prompt["input_ids"].shape[1]
        longer = {
            key: nn.functional.pad(value, (0, more), value=int(key == "attention_mask"))
            for key, value in prompt.items()
            if key in ("attention_mask", "token_type_ids", "mm_token_type_ids")
        }
        again = {**prompt, "input_ids": text, **longer}
    return torch.stack(out.logits, dim=1), model(**again).logits[:, -3:]


@every
def test_checkpointing_changes_no_gradient(name):
    _, model, batch = frozen(name)
    if not getattr(model, "supports_gradient_checkpointing", False) or name in NO_CHECKPOINTING:
        pytest.skip(NO_CHECKPOINTING.get(name, "has no gradient checkpointing"))
    handle = strong(attached(model))
    train(model)
    plain = gradients(model, handle, batch)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    demand_close(gradients(model, handle, batch), plain, 1e-4)


NO_CHECKPOINTING = {"git": "writes into its own embeddings, which checkpointing lets require a gradient"}


def gradients(model: nn.Module, handle: ll.Attached, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    loss(model, batch).backward()
    return {
        f"{path}.{key}": torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for path, adapter in handle.layers.items()
        for key, p in adapter.named_parameters()
    }


@every
def test_bfloat16(name):
    _, model, batch = frozen(name)
    model = model.bfloat16()
    batch = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    if name in NOT_IN_BFLOAT16:
        with pytest.raises(RuntimeError):
            forward(model, batch)
        pytest.skip("the base itself does not run in bfloat16")
    base = forward(model, batch)
    handle = attached(model)
    demand_equal(forward(model, batch), base)
    found = forward(strong(handle, 0.1).model, batch)
    demand_moved(found, base)
    assert {key: z.dtype for key, z in found.items()} == {key: z.dtype for key, z in base.items()}
    assert all(z.isfinite().all() for z in found.values())


NOT_IN_BFLOAT16 = {"autoformer", "fnet"}


@pytest.mark.long
@every
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in PEFT itself
def test_peft_runs_what_is_exported_or_it_is_refused(name, tmp_path):
    peft = pytest.importorskip("peft")
    row, model, batch = frozen(name)
    strong(attached(model))
    wanted = forward(model, batch)
    try:
        ll.export_peft(model, tmp_path)
    except ll.LoraLiteError:
        assert name in NOT_TO_PEFT
        return
    assert name not in NOT_TO_PEFT
    if name in PEFT_REFUSES:
        with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
            peft.PeftModel.from_pretrained(row.build(), tmp_path)
        return
    theirs = peft.PeftModel.from_pretrained(row.build().requires_grad_(False), tmp_path).eval()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's encoder layers pass PEFT's modules by where it is on
    try:
        demand_close(forward(theirs, batch), wanted, 1e-4)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


NOT_TO_PEFT = {
    "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "glm4_moe", "hunyuan_v1_moe", "jamba", "lfm2_moe", "llama4_text",
    "qwen2_moe", "qwen3_next",
}  # fmt: skip
"""Where PEFT would put the file's layers on the experts."""

PEFT_REFUSES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2"}
"""Where PEFT wants no adapter on out_proj, whose kernels read the weight where they are installed."""
