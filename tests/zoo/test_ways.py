"""An adapted model the other ways it is run: generating, checkpointed, in bfloat16, in PEFT."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.errors import LoraLiteWarning

from .models import ZOO, forward
from .row import Row
from .running import attached, demand_close, demand_equal, demand_moved, every, frozen, loss, over, strong, train


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


@pytest.mark.parametrize("name", ["mamba2", "falcon_h1"])
def test_layers_that_peft_refuses_in_state_space_models_are_not_exported(name, tmp_path):
    peft = pytest.importorskip("peft")
    row, model, _ = frozen(name)
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        peft.get_peft_model(row.build(), peft.LoraConfig(target_modules=["out_proj"]))
    with pytest.warns(LoraLiteWarning, match="out_proj.*: read in a branch: "):
        ll.attach(model, ll.config("lora", r=2, targets=["out_proj"]))
    with pytest.raises(ll.LoraLiteError, match=r"(?s)PEFT refuses adapters on out_proj.*exclude=\('out_proj',\)"):
        ll.export_peft(model, tmp_path)


def test_a_folder_for_torchs_encoder_says_how_peft_is_heard(tmp_path):
    _, model, _ = frozen("torch_encoder")
    strong(attached(model))
    assert "set_fastpath_enabled(False)" in str(ll.export_peft(model, tmp_path))
