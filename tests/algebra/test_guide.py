"""docs/guide/algebra.md: its blocks run, in order, in one namespace."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import toy
from tests.oracles.guide import blocks

PAGE = blocks("algebra")


def test_the_blocks_of_the_page_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, x = toy.toy(), toy.inputs(4, toy.WIDTH)
    seeds = iter(range(100))

    def train(model):
        with torch.no_grad():
            generator = torch.Generator().manual_seed(next(seeds))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def train_and(take, model):
        train(model)
        return take(model)

    def score(data):
        return -float(model(data).detach().square().mean())

    base = model(x)
    space = {
        "ll": ll,
        "model": model,
        "train": train,
        "train_and": train_and,
        "serve": lambda model: model(x),
        "score": score,
        "validation": x[:2],
        "test": x[2:],
    }
    for block in PAGE:
        exec(block, space)
    assert space["dW"].shape == (32, 24)
    assert 0 < space["worst"] < 1
    assert space["found"].gains.keys() == {"blocks.0", "blocks.1"}
    assert "{'blocks.0':" in capsys.readouterr().out
    for key, tensor in space["same"].tensors.items():
        assert torch.allclose(tensor, ll.compose({space[k]: w for k, w in zip("abc", (0.1, 0.65, 0.25))}).tensors[key])
    ll.detach(model)
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("block", PAGE)
def test_every_block_is_short(block):
    assert len(block.splitlines()) < 15
