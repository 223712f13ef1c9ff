"""python -m benchmarks.forecast.base: pre-train the small forecasting model on sums of two sinusoids (seconds) and store it.

600 steps of 16 x 3 series, AdamW at 2e-3 with linear warm-up over a tenth and linear decay to 0.
"""

import json
from typing import Any

import torch
from safetensors.torch import load_file, save

from benchmarks.common.places import FORECASTER
from benchmarks.common.records import environment, write_json
from benchmarks.forecast.data import sinusoids
from benchmarks.forecast.toto_like import TotoLike, forecasting_loss
from lora_lite.core.checkpoint import write_atomically

STEPS, BATCH, LR, SEED = 600, 16, 2e-3, 0


def pretrained(steps: int = STEPS) -> tuple[TotoLike, dict[str, Any]]:
    """(model, record), from SEED alone."""
    torch.manual_seed(SEED)
    model, generator = TotoLike(), torch.Generator().manual_seed(SEED)
    held_out = sinusoids(torch.Generator().manual_seed(SEED + 1), 256)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    rising = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / rising, (steps - i) / (steps - rising)))
    with torch.no_grad():
        before = forecasting_loss(model(held_out), held_out)
    for _ in range(steps):
        series = sinusoids(generator, BATCH)
        loss = forecasting_loss(model(series), series)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        after = forecasting_loss(model(held_out), held_out)
    return model.eval().requires_grad_(False), {
        "data": "sums of two sinusoids",
        "settings": {"steps": steps, "batch": BATCH, "lr": LR, "seed": SEED},
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_loss": {"start": float(before), "model": float(after)},
        "environment": environment(),
    }


def load_forecaster() -> TotoLike:
    """The stored model, frozen."""
    model = TotoLike()
    model.load_state_dict(load_file(FORECASTER / "model.safetensors"))
    return model.eval().requires_grad_(False)


def main() -> None:
    model, record = pretrained()
    FORECASTER.mkdir(exist_ok=True)
    write_atomically(FORECASTER / "model.safetensors", save(model.state_dict()))
    write_json(FORECASTER / "pretrain.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
