"""Files of formats 1 to 3 load as before: ranks from shapes, patterns kept and never searched, drawn tensors drawn again."""

import json
from pathlib import Path

import pytest
import safetensors
import torch

import lora_lite as ll
from lora_lite.core.checkpoint import contents, read
from lora_lite.testing import toy
from lora_lite.testing.checks import error
from tests.core.test_messages import refusal
from tests.oracles.files import rewrite

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


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return toy.seeded(lambda: torch.nn.Sequential(Conv1D(12, 24), torch.nn.Tanh(), Conv1D(24, 12)))


KINDS = {
    "bfloat16": (lambda: toy.toy().bfloat16(), {"blocks.0.q_proj": 2, "blocks.1.q_proj": 2}),
    "conv1d": (conv1d, {"0": 3, "2": 2}),
    "width": (toy.toy, {"blocks.1.q_proj": 2, "blocks.1.o_proj": 24}),
    "tie": (toy.toy, {"blocks.0.q_proj": 3, "blocks.1.q_proj": 5}),
    "scales": (toy.toy, {"blocks.0.q_proj": 2, "blocks.1.q_proj": 2, "blocks.1.up_proj": 4}),
    "older_options": (toy.toy, dict.fromkeys([f"blocks.0.{p}_proj" for p in ("q", "o", "up", "down")], 4)),
    "outputs": (toy.toy, {"blocks.0.q_proj": None, "blocks.1.q_proj": None}),
}
"""{name: (base, ranks)}: a base in bfloat16; Conv1D; a rank that is also a width; ranks that tensors do not tell; a scale that
follows the rank; options that came later; adapters side by side, whose own ranks stand in their configs."""


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_gives_what_the_version_gave_that_wrote_it(name, tmp_path):
    make, ranks = KINDS[name]
    model, wanted = make(), recorded(name)
    handle = ll.load(model, FILES / f"{name}.safetensors")
    x, tolerance = toy.inputs(2, 3, 24).to(wanted.dtype), 4 * torch.finfo(wanted.dtype).eps
    assert error(model(x), wanted) < tolerance
    assert error(make()(x), wanted) > 10 * tolerance
    assert {path: adapter.cfg.r for path, adapter in handle.layers.items()} == ranks
    ll.save(model, tmp_path / "new.safetensors")
    assert contents(tmp_path / "new.safetensors").version == 4
    again = make()
    ll.load(again, tmp_path / "new.safetensors")
    assert torch.equal(again(x), model(x))


HOSTILE = "(.+.+)+!"


def with_patterns(name, path, **changes):
    """The old file with other patterns in its config."""
    (path / "a").write_bytes((FILES / f"{name}.safetensors").read_bytes())
    config = json.loads(read(path / "a")[0]["config"])
    rewrite(path / "a", config=json.dumps(config | changes))
    return path / "a"


@pytest.mark.parametrize("name", ["width", "scales", "drawn"])
def test_patterns_that_would_take_forever_are_never_searched(name, tmp_path):
    path = with_patterns(name, tmp_path, targets=[HOSTILE], exclude=[HOSTILE], rank_pattern={HOSTILE: 24, "q_p(": 2, "": 2})
    model, plain = toy.toy(), toy.toy()
    ll.load(model, path)
    ll.load(plain, FILES / f"{name}.safetensors")
    x = toy.inputs(2, 3, 24)
    assert torch.equal(model(x), plain(x))
    taken = ll.snapshot(model)
    ll.save(model, tmp_path / "b")
    ll.detach(model)
    ll.load(model, tmp_path / "b").detach()
    for composed in (taken, ll.compose({taken: 1.0}, space="output"), ll.compose({taken: 0.5}, space="output")):
        ll.apply(model, composed, name="again").detach()


@pytest.mark.parametrize("pattern", [HOSTILE, "(|)" * 60 + "!", "((a*)*)*b"])
def test_where_tensors_do_not_tell_the_rank_a_pattern_takes_no_longer_than_it_is(pattern, tmp_path):
    handle = ll.load(toy.toy(), with_patterns("tie", tmp_path, rank_pattern={"0.q_": 3, "1.q_": 5, pattern: 5}))
    assert {path: adapter.cfg.r for path, adapter in handle.layers.items()} == {"blocks.0.q_proj": 3, "blocks.1.q_proj": 5}


@pytest.mark.parametrize("pattern", [r"(o)\1", "(?i)Q_", "("])
def test_where_tensors_do_not_tell_the_rank_a_pattern_that_is_not_searched_is_refused(pattern, tmp_path):
    path = with_patterns("tie", tmp_path, rank_pattern={"0.q_": 3, pattern: 5})
    model = toy.toy()
    refusal(lambda: ll.load(model, path), "blocks.1.q_proj: its rank", repr(f"re:{pattern}"), "is not searched", model=model)


def test_an_option_that_older_files_lack_has_the_value_they_mean_and_no_other_may_lack(tmp_path):
    assert ll.load(toy.toy(), FILES / "older_options.safetensors").config.cap == "block"
    (tmp_path / "a").write_bytes((FILES / "older_options.safetensors").read_bytes())
    config = json.loads(read(tmp_path / "a")[0]["config"])
    assert not {"cap", "theta_init", "winsorize"} & config.keys()
    del config["max_angle"]
    rewrite(tmp_path / "a", config=json.dumps(config))
    model = toy.toy()
    refusal(lambda: ll.load(model, tmp_path / "a"), "leaves out max_angle of AntiPaSTORotConfig", model=model)


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
