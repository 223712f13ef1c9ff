"""Pretrain the embedded base: a 2.7 M parameter Qwen3 on real English technical prose, byte by byte.

    just pretrain-base            about 35 minutes on two cores that support bfloat16; resumes where it was stopped

Text    half the windows from the language reference and the standard library's docstrings, half from the docstrings of
        the pinned torch, transformers and numpy; paragraphs that stand in the held-out prose are removed from both.
Method  Muon on the hidden matrices, AdamW on embedding and norms, linear warm-up and decay, bfloat16 autocast.
Writes  benchmarks/base: model.safetensors (bfloat16), config.json, tokenizer files, pretrain.jsonl (the log),
        pretrain.json (recipe, versions, digests of the text, bits per byte beside zlib and lzma).
"""

import json
import lzma
import math
import zlib
from typing import Any

import numpy
import torch
import transformers
from rich.progress import track
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.common import text
from benchmarks.common.places import BASE, RUNS
from benchmarks.embedded.tokenizer import save_tokenizer

CHECKPOINT = RUNS / "pretrain.pt"
RECIPE: dict[str, Any] = dict(
    steps=4500, warmup=100, batch=16, window=256, lr_muon=1e-2, lr_adamw=2e-3, weight_decay=0.05, seed=0
)
LIBRARIES = ("torch", "transformers", "numpy")
LOG_EVERY = 50
CHECKPOINT_EVERY = 250


def architecture() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=256,  # a token is a byte
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def training_text() -> tuple[list[torch.Tensor], bytes]:
    """(two training streams of bytes, the held-out prose)."""
    held_out = text.prose(held_out=True)
    known: set[str] = set()
    text.without_paragraphs(held_out, known)
    sources = (text.prose(held_out=False), text.library_prose(LIBRARIES))
    streams = [text.joined(text.without_paragraphs(source, known)) for source in sources]
    return [torch.frombuffer(bytearray(s), dtype=torch.uint8) for s in streams], text.joined(held_out)


def draw(streams: list[torch.Tensor], step: int) -> torch.Tensor:
    """The windows of one step (batch, window): a function of seed and step alone, so a resumed run sees the same data."""
    generator = torch.Generator().manual_seed(RECIPE["seed"] * 1_000_003 + step)
    rows = []
    for row in range(RECIPE["batch"]):
        stream = streams[row % len(streams)]
        start = int(torch.randint(len(stream) - RECIPE["window"], (1,), generator=generator))
        rows.append(stream[start : start + RECIPE["window"]])
    return torch.stack(rows).long()


def bits_per_byte(model: torch.nn.Module, data: bytes, window: int) -> float:
    """Mean bits to predict each byte of `data` but the first, in windows that overlap by the one byte they condition on."""
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    nats, counted = 0.0, 0
    with torch.no_grad():
        for rows in tokens.unfold(0, window + 1, window).split(32):
            logits = model(input_ids=rows[:, :-1]).logits.float()
            nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            counted += rows[:, 1:].numel()
    return nats / counted / math.log(2)


def main() -> None:
    torch.manual_seed(RECIPE["seed"])
    streams, held_out = training_text()
    model = Qwen3ForCausalLM(architecture())
    hidden = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(hidden, lr=RECIPE["lr_muon"], weight_decay=RECIPE["weight_decay"], adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=RECIPE["lr_adamw"], betas=(0.9, 0.95), weight_decay=0.0),
    ]

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / RECIPE["warmup"]) * (1 - step / RECIPE["steps"])

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, factor) for optimizer in optimizers]
    stateful = [model, *optimizers, *schedules]
    first, log = 0, []
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT, weights_only=True)
        for part, state in zip(stateful, saved["states"], strict=True):
            part.load_state_dict(state)
        first, log = saved["step"], saved["log"]

    CHECKPOINT.parent.mkdir(parents=True, exist_ok=True)
    running = 0.0
    for step in track(range(first, RECIPE["steps"]), description=f"pretraining from step {first}"):
        rows = draw(streams, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        running += loss.item() / math.log(2)
        if (step + 1) % LOG_EVERY == 0:
            log.append({"step": step + 1, "train_bits_per_byte": round(running / LOG_EVERY, 4)})
            running = 0.0
        if (step + 1) % CHECKPOINT_EVERY == 0:
            partial = CHECKPOINT.with_suffix(".part")
            torch.save({"states": [p.state_dict() for p in stateful], "step": step + 1, "log": log}, partial)
            partial.replace(CHECKPOINT)

    model = model.bfloat16().float()  # what is committed is what is measured
    record = {
        "recipe": RECIPE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, numpy)},
        "text": {
            "training": [{"bytes": len(s), "sha256": text.digest(s.numpy().tobytes())} for s in streams],
            "held_out": {"bytes": len(held_out), "sha256": text.digest(held_out)},
        },
        "held_out_bits_per_byte": {
            "model": round(bits_per_byte(model, held_out, RECIPE["window"]), 4),
            "lzma -9e": round(8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out), 4),
            "zlib -9": round(8 * len(zlib.compress(held_out, 9)) / len(held_out), 4),
        },
    }
    model.bfloat16().save_pretrained(BASE)
    save_tokenizer(BASE)
    (BASE / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
    (BASE / "pretrain.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    CHECKPOINT.unlink(missing_ok=True)
    print(json.dumps(record["held_out_bits_per_byte"], indent=1))


if __name__ == "__main__":
    main()
