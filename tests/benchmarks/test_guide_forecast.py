"""docs/guide/forecast.md: its blocks run, in order, in one namespace, on the model with Toto's shapes."""

import pytest
import torch

import lora_lite as ll
from tests.oracles.guide import blocks

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks.forecast.base import load_forecaster
from benchmarks.forecast.data import sawtooths
from benchmarks.forecast.toto_like import forecasting_loss


def test_the_blocks_of_the_page_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, generator = load_forecaster(), torch.Generator().manual_seed(0)
    space = {
        "ll": ll,
        "torch": torch,
        "model": model,
        "forecasting_loss": forecasting_loss,
        "batches": [sawtooths(generator, 8) for _ in range(12)],
        "held_out": sawtooths(generator, 8),
    }
    with torch.no_grad():
        before = forecasting_loss(model(space["held_out"]), space["held_out"])
    for block in blocks("forecast"):
        exec(block, space)
    with torch.no_grad():
        assert forecasting_loss(model(space["held_out"]), space["held_out"]) < before - 1
    assert len(ll.status(model).layers) == 16
    assert space["again"].strength == space["barrier"].strength > 0
    assert space["trace"].shape == (24, 4, 16)
    assert space["weights"].shape == (24, 4, 16, 16)
    assert "'beyond': 0.0" in capsys.readouterr().out
    assert space["valid"](space["padded"][0]).shape == (24, 16)
    without, alpha = space["alphas"]
    assert without / alpha == pytest.approx(1.2, abs=0.05)
