"""Checkpoints and pickles hold all there is, and are read strictly."""

import io
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from ...contract.config import AdapterConfig
from ...core.checkpoint import checksum, read, serialized, write_atomically
from ...core.detach import detach
from ...core.handle import Attached
from ...core.load import load
from ...core.save import save
from ...errors import LoraLiteError
from .. import toy
from .judging import Variant, demand, demand_same, perturbed, photograph


def check_save_load_is_exact(cls: Variant, cfg: AdapterConfig) -> None:
    """Loaded on a fresh model: the same bits, tensors, flags and file; no init, factorization, data or random number."""
    model, attached = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    wanted = model(x)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        save(model, first)
        fresh = toy.toy()
        state = torch.random.get_rng_state()
        with forbidden(cls):
            handle = load(fresh, first)
        demand(torch.equal(state, torch.random.get_rng_state()), "load draws random numbers")
        demand(torch.equal(fresh(x), wanted), "the loaded adapter gives another output: some state was not saved")
        demand(isinstance(handle, Attached) and handle.config == attached.config, "the config changed")
        demand(all(p.requires_grad for p in handle.parameters()), "a loaded parameter is frozen")
        save(fresh, second)
        demand(read(first)[0] == read(second)[0], "the header changed by load and save")
        demand(
            all(torch.equal(t, read(second)[1][k]) for k, t in read(first)[1].items()),
            "tensors changed by load and save",
        )
        fresh.zero_grad()


def forbidden(cls: Variant) -> Any:
    """Inside, starting and factorizing raise."""
    stack = ExitStack()
    refuse = mock.Mock(side_effect=AssertionError("load must not start: init, group_init or a factorization was called"))
    for owner, name in ((cls, "init"), (cls, "group_init"), *((torch.linalg, n) for n in ("svd", "eigh", "qr"))):
        stack.enter_context(mock.patch.object(owner, name, refuse))
    return stack


def check_load_is_strict(cls: Variant, cfg: AdapterConfig) -> None:
    """A missing, extra or misshaped tensor and another base raise, name the key, and leave the model as it was."""
    model, _ = perturbed(cls, cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save(model, path)
        header, tensors = read(path)
        key = next(iter(tensors))
        name = key.partition("/")[2]
        damaged = {
            name: {k: t for k, t in tensors.items() if k != key},
            "stray.tensor": {**tensors, f"{key.partition('/')[0]}/stray.tensor": torch.zeros(1)},
            f"{name} has shape": {**tensors, key: torch.zeros(*tensors[key].shape, 1)},
        }
        for named, content in damaged.items():
            write_atomically(path, serialized(content, {**header, "checksum": checksum(content)}))
            refused(path, toy.toy(), named)
        write_atomically(path, serialized(tensors, header))  # tensors may map the old file
        other = toy.toy()
        with torch.no_grad():
            other.get_parameter("blocks.1.down_proj.weight")[0, 0] += 1
        if any("blocks.1.down_proj" in k for k in tensors):
            refused(path, other, "blocks.1.down_proj")


def refused(path: Path, model: nn.Module, named: str) -> None:
    before = photograph(model)
    try:
        load(model, path)
    except LoraLiteError as refusal:
        demand(named in str(refusal), f"the error does not name {named}: {refusal}")
    else:
        raise AssertionError(f"load accepted a file with a fault at {named}")
    demand_same(model, before, "after a refused load")


def check_pickles(cls: Variant, cfg: AdapterConfig) -> None:
    """torch.save of the whole model and back: equal output, exact detach."""
    model, _ = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    demand(torch.equal(again(x), model(x)), "a pickled model gives another output")
    detach(again)
    demand_same(again, photograph(toy.toy()), "after detach of an unpickled model")
