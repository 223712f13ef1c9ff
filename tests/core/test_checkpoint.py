"""Checkpoints: atomic, strict, refused with a reason where they do not fit."""

import errno
import json
import os
import warnings

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import lora_lite as ll
from lora_lite.core.checkpoint import read, serialized, write_atomically
from lora_lite.core.fingerprint import WHOLE_BELOW, fingerprint
from lora_lite.testing import toy
from lora_lite.testing.checks import demand_same, photograph
from tests.core.test_messages import refusal
from tests.oracles.files import rewrite, rewrite_entry


@pytest.fixture
def saved(tmp_path):
    """(path, the model it was saved from)."""
    model = toy.toy()
    toy.perturb(
        ll.attach(model, ll.config("lora", r=4, targets=("q_proj", "down_proj"), rank_pattern={"down_proj": 2}), name="style")
    )
    path = tmp_path / "adapter.safetensors"
    ll.save(model, path)
    return path, model


def test_file_says_what_it_is(saved):
    path, _model = saved
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        keys = [f"style/blocks.{n}.{p}.{t}" for n in (0, 1) for p in ("down_proj", "q_proj") for t in "AB"]
        assert sorted(file.keys()) == keys
        assert file.get_tensor("style/blocks.0.down_proj.A").shape == (2, 48)
    assert set(header) == {"format", "version", "adapters", "base", "rest", "versions", "checksum", "seal"}
    assert (header["format"], header["version"]) == ("lora_lite", "4")
    ((name, said),) = json.loads(header["adapters"]).items()
    assert name == "style"
    assert set(said) == {"variant", "config", "layers", "groups", "lineage", "drawn"}
    assert said["variant"] == "lora"
    assert said["config"]["rank_pattern"] == {"down_proj": 2}
    assert said["layers"] == {
        f"blocks.{n}.{p}": {"rank": r, "experts": None, "transposed": False}
        for n in (0, 1)
        for p, r in (("q_proj", 4), ("down_proj", 2))
    }
    base = json.loads(header["base"])
    assert set(base) == set(said["layers"])
    assert set(base["blocks.0.q_proj"]) == {"shape", "dtype", "sha256", "bias"}
    assert base["blocks.0.q_proj"]["shape"] == [32, 24]
    assert json.loads(header["versions"])["torch"] == torch.__version__


def test_loads_under_its_own_name_or_another(saved):
    path, _model = saved
    fresh = toy.toy()
    assert ll.load(fresh, path).name == "style"
    assert ll.load(fresh, path, name="again").name == "again"
    refusal(lambda: ll.load(fresh, path), "There is an adapter 'style' already", model=fresh)


def test_truncated_file(saved):
    path, _ = saved
    whole = path.read_bytes()
    for length in (len(whole) - 10, 100, 4, 0):
        path.write_bytes(whole[:length])
        model = toy.toy()
        refusal(lambda model=model: ll.load(model, path), str(path), "cannot be read", model=model)


def test_missing_and_foreign_files(tmp_path):
    model = toy.toy()
    refusal(lambda: ll.load(model, tmp_path / "none.safetensors"), "cannot be read", model=model)
    safetensors.torch.save_file({"w": torch.zeros(1)}, tmp_path / "w.safetensors")
    refusal(lambda: ll.load(model, tmp_path / "w.safetensors"), "no lora_lite checkpoint", model=model)


def test_newer_format(saved):
    path, _ = saved
    rewrite(path, version="99")
    model = toy.toy()
    refusal(lambda: ll.load(model, path), "version 99", "pip install --upgrade", model=model)


def test_unknown_and_other_variants(saved):
    path, _ = saved
    model = toy.toy()
    rewrite_entry(path, variant="lorra")
    refusal(lambda: ll.load(model, path), "no variant 'lorra'", "Closest name: lora", model=model)
    rewrite_entry(path, variant="dora")
    refusal(lambda: ll.load(model, path), "has no field 'init'", model=model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "x"}, ("damaged header", "version")),
        ({"adapters": "["}, ("damaged header",)),
        ({"adapters": "[]"}, ("damaged header", "adapters is no table")),
        ({"adapters": "{}"}, ("damaged header", "holds no adapter")),
        ({"adapters": '{"style": []}'}, ("damaged header", "variant of adapter 'style' is no str")),
        ({"adapters": "[" * 100_000}, ("damaged header",)),
        ({"base": "{}"}, ("damaged header", "of adapter 'style' has no fingerprint")),
        ({"base": "[]"}, ("damaged header", "base is no table")),
        ({"base": "{"}, ("damaged header",)),
        ({"versions": "3"}, ("damaged header", "versions is no table")),
        ({"checksum": "00"}, ("is damaged", "not those that were written")),
    ],
    ids=lambda value: next(iter(value.items()))[1][:12] if isinstance(value, dict) else "",
)
def test_damaged_headers(saved, changes, words):
    path, _ = saved
    rewrite(path, **changes)
    model = toy.toy()
    refusal(lambda: ll.load(model, path), str(path), *words, model=model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"config": {"r": 4}}, ("leaves out", "alpha", "full config")),
        ({"config": []}, ("config of adapter 'style' is no dict",)),
        ({"layers": []}, ("layers of adapter 'style' is no dict",)),
        ({"layers": {}}, ("adapter 'style' has no layers",)),
        ({"layers": {"nowhere": {"rank": 4}}}, ("nowhere of adapter 'style'",)),
        ({"layers": {"blocks.0.q_proj": {"rank": "4"}}}, ("blocks.0.q_proj of adapter 'style'",)),
        ({"layers": {"blocks.0.q_proj": 4}}, ("blocks.0.q_proj of adapter 'style'",)),
        ({"lineage": {"id": "x", "step": 0, "more": 1}}, ("lineage has more than id and step",)),
        ({"drawn": []}, ("drawn of adapter 'style' is no dict",)),
    ],
)
def test_damaged_entries_of_an_adapter(saved, changes, words):
    path, _ = saved
    rewrite_entry(path, **changes)
    model = toy.toy()
    refusal(lambda: ll.load(model, path), str(path), *words, model=model)


@pytest.mark.parametrize("entry", ["version", "adapters", "base", "rest", "versions", "checksum"])
def test_header_without_an_entry(saved, entry):
    path, _ = saved
    rewrite(path, without=(entry,))
    model = toy.toy()
    words = ("damaged header", "version") if entry == "version" else ("incomplete header", entry)
    refusal(lambda: ll.load(model, path), *words, model=model)


@pytest.mark.parametrize("entry", ["variant", "config", "layers", "groups", "lineage", "drawn"])
def test_adapter_without_an_entry(saved, entry):
    path, _ = saved
    rewrite_entry(path, without=(entry,))
    model = toy.toy()
    refusal(lambda: ll.load(model, path), "damaged header", f"{entry} of adapter 'style'", model=model)


@pytest.mark.parametrize(("damage", "word"), [(lambda t: t.int(), "is int32"), (lambda t: t * torch.nan, "is not finite")])
def test_tensors_that_are_no_finite_numbers(saved, damage, word):
    path, _ = saved
    tensors, key = read(path)[1], "blocks.1.q_proj.A"
    rewrite(path, tensors | {f"style/{key}": damage(tensors[f"style/{key}"])})
    model = toy.toy()
    refusal(lambda: ll.load(model, path), f"{key} {word}", model=model)


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t | {"style/blocks.1.q_proj.A": t["style/blocks.1.q_proj.A"] + 1e-6},
        lambda t: t | {"style/more": torch.zeros(1)},
        lambda t: {key: value for key, value in t.items() if key != "style/blocks.0.q_proj.B"},
        lambda t: t | {"style/blocks.0.q_proj.B": t["style/blocks.1.q_proj.B"]},
        lambda t: t | {"style/blocks.0.q_proj.B": t["style/blocks.0.q_proj.B"].double()},
        lambda t: t | {"style/blocks.0.q_proj.B": t["style/blocks.0.q_proj.B"].reshape(4, 32)},
    ],
    ids=["a number", "one more", "one less", "another's", "another dtype", "another shape"],
)
def test_tensors_other_than_those_written_are_told_by_their_checksum(saved, damage):
    path, _ = saved
    header, tensors = read(path)
    write_atomically(path, serialized(damage(tensors), header))
    model = toy.toy()
    refusal(lambda: ll.load(model, path), str(path), "is damaged", "checksum", model=model)


def test_tensors_of_no_adapter_are_refused(saved):
    path, _ = saved
    rewrite(path, read(path)[1] | {"other/blocks.0.q_proj.A": torch.zeros(4, 24)})
    model = toy.toy()
    refusal(lambda: ll.load(model, path), "other/blocks.0.q_proj.A of no adapter", "style", model=model)


def test_another_base_names_the_layers(saved):
    path, _ = saved
    model = toy.toy()
    with torch.no_grad():
        model.blocks[1].q_proj.weight[3, 3] += 1e-3
    refusal(lambda: ll.load(model, path), "another base", "blocks.1.q_proj (content)", "strict_base=False", model=model)
    ll.load(model, path, strict_base=False)
    half = toy.toy().to(torch.bfloat16)
    refusal(lambda: ll.load(half, path), "another base", "blocks.0.q_proj (content)", model=half)


def test_large_weights_are_compared_by_a_sample_that_sees_every_training_step():
    layer = torch.nn.Linear(1024, 1024)
    assert layer.weight.numel() > WHOLE_BELOW
    before = fingerprint(layer)
    assert fingerprint(layer) == before
    with torch.no_grad():
        layer.weight.add_(1e-4)
    assert fingerprint(layer) != before


def counted(rows: int = 512, columns: int = 640) -> torch.nn.Linear:
    """A layer too large to be hashed entirely, with the numbers 0, 1, 2, ..."""
    layer = torch.nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(torch.arange(float(rows * columns)).view(rows, columns))
    return layer


def test_fingerprints_of_large_weights_are_those_of_earlier_releases():
    assert fingerprint(counted(), version=1)["sha256"] == "9ab77def5fa1af8ac2112805dde64e04"
    assert fingerprint(counted(), version=2)["sha256"] == "f17d33450d315756c0a21cc2b2d8778b"
    assert fingerprint(counted(), version=3)["sha256"] == "ee1fc3b000c10f8600c939b187778b13"


def test_sample_of_a_large_weight_has_a_number_of_every_row():
    layer = counted(512, 600)
    before = fingerprint(layer)
    for row in (0, 1, 257, 511):
        with torch.no_grad():
            layer.weight[row] += 0.5
        assert fingerprint(layer) != before
        before = fingerprint(layer)


def test_another_architecture(saved):
    path, _ = saved
    model = toy.one()
    refusal(lambda: ll.load(model, path), "another model", "blocks.0.q_proj", "o_proj", model=model)


def test_a_save_that_fails_leaves_the_old_file_and_no_other(saved, monkeypatch):
    path, model = saved
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    refusal(lambda: ll.save(model, path), str(path), "the disk is full", "untouched", "df -h")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_folder_that_is_not_there(saved, tmp_path):
    _, model = saved
    refusal(lambda: ll.save(model, tmp_path / "no" / "a.safetensors"), "does not exist", "mkdir", model=model)
    refusal(lambda: ll.save(model, tmp_path), "is a folder", "adapter.safetensors", model=model)


def test_layers_that_never_ran_are_named_at_save(tmp_path):
    model = toy.toy()
    model.spare_proj = torch.nn.Linear(24, 24)
    ll.attach(model, ll.config("lora"))
    model(toy.inputs(2, 3, 24))
    assert ll.status(model).dead == ["spare_proj"]
    with pytest.warns(ll.LoraLiteWarning, match="spare_proj never ran"):
        ll.save(model, tmp_path / "a.safetensors")


def test_hooks_that_somebody_removed_are_noticed(tmp_path):
    model = toy.toy()
    ll.attach(model, ll.config("lora"))
    model.blocks[0].q_proj._forward_hooks.clear()
    (row,) = (r for r in ll.status(model).layers if not r.hooked)
    assert row.path == "blocks.0.q_proj"
    assert "hook_lost" in str(ll.status(model))
    refusal(lambda: ll.save(model, tmp_path / "a.safetensors"), "gone from blocks.0.q_proj")


def test_merged_adapters_are_not_saved(saved):
    path, model = saved
    ll.merge(model)
    refusal(lambda: ll.save(model, path), "merged", "ll.unmerge(model)")
    refusal(lambda: ll.scale(model, 0.5), "merged", "ll.unmerge(model)")
    refusal(lambda: ll.merge(model), "merged already")
    ll.unmerge(model)
    ll.save(model, path)


def test_loaded_adapter_trains_and_detaches_exactly(saved):
    path, _ = saved
    model = toy.toy()
    before = photograph(model)
    with ll.load(model, path) as handle:
        model(toy.inputs(2, 3, 24)).sum().backward()
        assert all(p.grad is not None for p in handle.parameters())
    demand_same(model, before, "after load and detach")


def test_weights_outside_the_adapted_layers_are_compared_under_renamed_paths_as_well(tmp_path):
    handle = toy.perturb(ll.attach(toy.toy(), ll.config("lora", r=2, targets=("q_proj",))))
    handle.save(tmp_path / "a")
    wrapped = nn.ModuleDict({"inner": toy.toy()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ll.load(wrapped, tmp_path / "a", paths={"": "inner"})
    other = nn.ModuleDict({"inner": toy.toy()})
    with torch.no_grad():
        next(p for name, p in other.named_parameters() if "q_proj" not in name).add_(1)
    with pytest.warns(ll.LoraLiteWarning, match="outside the adapted layers"):
        ll.load(other, tmp_path / "a", paths={"": "inner"})
    with pytest.raises(ll.LoraLiteError, match=r"(?s)no layer in .* begins with modle.*paths=\{'blocks': 'x'\}"):
        ll.load(toy.toy(), tmp_path / "a", paths={"modle": "x"})
