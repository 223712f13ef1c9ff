"""Which layers the default takes, what it says of the others, and that both are right."""

import dataclasses

import pytest
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .entry import entry, read
from .models import FAMILY, ZOO
from .running import DAILY, attached, every, frozen, loss, over, train


@over(ZOO)
def test_the_default_takes_what_is_written(name):
    assert entry(name) == read()[name]


def test_every_architecture_is_written():
    assert read().keys() == ZOO.keys()
    assert set(DAILY) <= set(ZOO)
    assert len(ZOO) >= 60
    assert {FAMILY[name] for name in DAILY} == set(FAMILY.values()) - {"other libraries"}


@pytest.mark.parametrize("row", [row for row in ZOO.values() if row.head], ids=lambda row: row.name)
def test_no_size_is_misspelt(row):
    """Configs take any keyword; what they do not declare would be ignored, and the model be as large as its default."""
    config = CONFIG_MAPPING[row.kind]
    declared = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map) | GENERAL
    assert set(row.sizes) <= declared


GENERAL = {"num_labels", "bos_token_id", "decoder_start_token_id", "max_position_embeddings"}


@every
def test_what_is_read_and_not_called_is_known_by_its_gradient(name):
    """A weight that gets a gradient though its layer is not called is read: no adapter there, and nothing else is called so."""
    row = ZOO[name]
    model, batch = row.build(), row.batch()
    called: set[str] = set()
    linears = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    hooks = [m.register_forward_hook(lambda *_, path=path: called.add(path)) for path, m in linears.items()]
    train(model)
    loss(model, batch).backward()
    for hook in hooks:
        hook.remove()
    read = {path for path, m in linears.items() if m.weight.grad is not None and path not in called}
    handle = attached(model)
    assert not read & handle.layers.keys()
    assert not called & {path for path, why in handle.skipped.items() if why.startswith("read, not called")}


@every
def test_coverage_counts_every_parameter_once(name):
    _, model, _ = frozen(name)
    sizes = {id(parameter): parameter.numel() for parameter in model.parameters()}
    handle = attached(model)
    inside = {id(p) for path in handle.layers for p in model.get_submodule(path).parameters(recurse=False)}
    assert handle.coverage == pytest.approx(sum(sizes[key] for key in inside) / sum(sizes.values()), rel=1e-9)
