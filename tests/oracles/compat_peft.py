"""Two columns of the compatibility table: may a variant leave for PEFT, and may it come back?"""

import dataclasses
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

import lora_lite as ll
from lora_lite.peft.layout import layouts
from lora_lite.testing import toy
from tests.oracles.peft_cases import NAMES, TOKENS, distance, in_peft, logits, peft, quietly, qwen, randomise

SQUARE = ("q_proj", "o_proj")  # layers of one width: PEFT has one block size for all
TOLERANCE = 1e-5


def attached(variant: str, base: Any = qwen, targets: tuple[str, ...] | None = None, **fields: Any) -> tuple[Any, Any]:
    """(model, handle) at random parameters; numbers are added with a positive sign, so that no range is left at its end."""
    cls = ll.get(variant)
    cfg = dataclasses.replace(toy.small(cls), targets=targets or NAMES[base], **fields)
    batches = [{"input_ids": (TOKENS + 5 * k) % 64, "labels": (TOKENS + 5 * k) % 64} for k in range(6)]
    needs = cls.needs(cfg)
    labelled = {"positive": batches[:3], "negative": batches[3:]} if any(":" in name for name in needs) else batches
    model = base()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ll.LoraLiteWarning)
        handle = ll.attach(model, cfg, labelled if needs else None)
    perturb(handle)
    return model, handle


@torch.no_grad()
def perturb(handle: Any) -> None:
    for seed, parameter in enumerate(handle.parameters()):
        scale = float(parameter.abs().mean()) or 1.0
        parameter.add_(0.5 * scale * toy.inputs(*parameter.shape, seed=40 + seed).abs())


def check_export(variant: str, base: Any = qwen) -> str:
    """ "yes": in PEFT's own form; "yes, as LoRA": exactly; else the reason why only a chosen rank is possible."""
    model, _ = attached(variant, base, SQUARE if base is qwen else None)
    want = logits(model)
    with ll.disabled(model):
        assert distance(logits(model), want) > 0.02, "the adapter changes nothing"
    with tempfile.TemporaryDirectory() as parent:
        folder, refusal = Path(parent) / "adapter", ""
        try:
            written = ll.export_peft(model, folder)
            verdict = "yes" if written.rank is None else "yes, as LoRA"
        except ll.LoraLiteError as error:
            refusal, verdict = str(error), "as LoRA of a chosen rank"
        if refusal:
            assert "no bound" in refusal, refusal
            assert not list(Path(parent).iterdir()), "a refused export left something"
            written = ll.export_peft(model, folder, rank=128)
        assert written.worst < 1e-6
        assert distance(in_peft(base, folder), want) < TOLERANCE
    return verdict


def check_import(variant: str) -> str:
    """ "yes": PEFT's own folder of it, random parameters, gives equal outputs here."""
    if variant not in layouts():
        return "refused: no form of PEFT's own"
    model, _ = attached(variant, targets=SQUARE, **layouts()[variant].only)
    with tempfile.TemporaryDirectory() as parent:
        ours, theirs = Path(parent) / "ours", Path(parent) / "theirs"
        ll.export_peft(model, ours)
        other = quietly(peft.PeftModel.from_pretrained, qwen(), ours, is_trainable=True).eval()
        randomise(other, 0.1)
        quietly(other.save_pretrained, theirs)
        fresh = qwen()
        ll.load_peft(fresh, theirs)
        want = logits(other)
    assert distance(logits(model), want) > 0.02, "PEFT's parameters are those of the export"
    assert distance(logits(fresh), want) < TOLERANCE
    return "yes"
