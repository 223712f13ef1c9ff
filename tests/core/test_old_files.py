"""Files of formats 1 to 3 load as before: ranks from shapes, patterns kept and never searched, drawn tensors drawn again."""

from pathlib import Path

import pytest
import safetensors
import torch

import lora_lite as ll
from lora_lite.core.checkpoint import contents
from lora_lite.testing import toy

FILES = Path(__file__).parent / "files"


def recorded(name):
    with safetensors.safe_open(str(FILES / f"{name}_output.safetensors"), framework="pt") as file:
        return file.get_tensor("y")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_file_of_an_earlier_version_loads_on_its_base_and_on_no_other(version):
    path, model = FILES / f"version{version}.safetensors", toy.one(8, 8)
    assert contents(path).version == version
    handle = ll.load(model, path)
    assert handle.name == "style"
    assert handle.config.targets == (r"re:o_pr.j$",)
    assert next(handle.parameters()).detach().abs().max() > 0
    other = toy.one(8, 8)
    with torch.no_grad():
        other.o_proj.weight[0, 0] += 1
    with pytest.raises(ll.LoraLiteError, match="another base"):
        ll.load(other, path)


@pytest.mark.parametrize("name", ["ranks", "drawn"])
def test_outputs_are_those_of_the_version_that_wrote_it(name):
    model = toy.toy()
    ll.load(model, FILES / f"{name}.safetensors")
    torch.testing.assert_close(model(toy.inputs(3, 5, 24)), recorded(name), rtol=1e-6, atol=1e-6)


def test_ranks_come_from_shapes_and_patterns_are_kept_unsearched(tmp_path):
    """The exclude of this file would take a search longer than anyone waits."""
    model = toy.toy()
    handle = ll.load(model, FILES / "ranks.safetensors")
    assert {path: adapter.cfg.r for path, adapter in handle.layers.items()} == {
        "blocks.0.q_proj": 3,
        "blocks.0.o_proj": 2,
        "blocks.1.q_proj": 2,
    }
    assert handle.config.exclude == ("re:(.+.+)+!",)
    ll.save(model, tmp_path / "new.safetensors")
    again = toy.toy()
    ll.load(again, tmp_path / "new.safetensors")
    x = toy.inputs(3, 5, 24)
    assert torch.equal(again(x), model(x))
    ll.snapshot(model)
