"""The CPU tier of the sequential suite: a causal model of 74,784 numbers that reads words, knows the formats and no fact.

    just pretrain-tier     half a minute on one core; writes benchmarks/tier: model.safetensors (float16), pretrain.json

It is trained on lines of all eight forms whose clans, labels and values are drawn independently of one another.
"""

import json
import random
from typing import Any, NamedTuple

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.common.places import TIER
from benchmarks.sequential import tasks
from benchmarks.sequential.data import Words, batch

RECIPE: dict[str, Any] = dict(steps=800, batch=32, lr=3e-3, warmup=50, seed=0, held_out_lines=512)
WIDTH, HEADS, BLOCKS, INNER, POSITIONS = 48, 4, 2, 192, 96


class Output(NamedTuple):
    """logits (B, T, V); loss: mean over the labels that are not -100, None without labels."""

    logits: Tensor
    loss: Tensor | None


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up_proj, self.down_proj = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm1(x)
        q, k, v = (w(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.q_proj, self.k_proj, self.v_proj))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up_proj(self.norm2(x))))


class Tier(nn.Module):
    """Pre-norm, learned positions, untied head. Padding must stand on the right: what is causal never reads it."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        for embedding in (self.embed, self.positions):
            nn.init.normal_(embedding.weight, std=0.1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Output:
        x = self.embed(input_ids) + self.positions.weight[: input_ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.norm(x))
        return Output(
            logits, None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )


# --- pretraining ------------------------------------------------------------------------------------------------------


def formal_line(draw: random.Random) -> str:
    """A line of one of the eight forms; every clan, label, value and number is drawn by itself."""
    label, clan = tasks.label(draw.randrange(10_000)), draw.choice(tasks.WORDS)[0]
    form = draw.choice(list(tasks.LINES))
    if form in tasks.LEDGERS:
        values = tuple(draw.choice(words) for words in tasks.LEDGERS[form])
        return tasks.unit(label, form, values, 10 + draw.randrange(80), 2 + draw.randrange(18))
    if form == "N_neutral":
        return tasks.relic(label, *(draw.choice(words) for words in tasks.NEUTRAL))
    words = tuple(draw.choice(column) for column in zip(*tasks.WORDS))
    return tasks.FORMS[form](label, clan, words)


def line_loss(model: nn.Module, lines: list[str]) -> float:
    """Nats per token."""
    with torch.no_grad():
        return float(model(**batch(Words(), lines)).loss)


def pretrained() -> tuple[Tier, dict[str, Any]]:
    """(the model, its record), made anew."""
    torch.manual_seed(RECIPE["seed"])
    draw, tokens = random.Random(RECIPE["seed"]), Words()
    model = Tier(len(tokens.vocabulary))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"])
    steps, warmup = RECIPE["steps"], RECIPE["warmup"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, (s + 1) / warmup) * (1 - s / steps))
    for _ in track(range(steps), description="pretraining the CPU tier", transient=True):
        loss = model(**batch(tokens, [formal_line(draw) for _ in range(RECIPE["batch"])])).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model = model.half().float()  # what is committed is what is measured
    others = [formal_line(draw) for _ in range(RECIPE["held_out_lines"])]
    return model, {
        "recipe": RECIPE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"torch": torch.__version__},
        "held_out_nats_per_token": round(line_loss(model, others), 4),
    }


def tier() -> Tier:
    """The committed model, frozen, in eval mode."""
    model = Tier(len(Words().vocabulary))
    model.load_state_dict({key: tensor.float() for key, tensor in load_file(TIER / "model.safetensors").items()})
    return model.eval().requires_grad_(False)


def main() -> None:
    model, record = pretrained()
    TIER.mkdir(exist_ok=True)
    save_file({key: tensor.half().contiguous() for key, tensor in model.state_dict().items()}, TIER / "model.safetensors")
    (TIER / "pretrain.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
