"""python -m lora_lite export, import, merge and inspect, on model folders that transformers wrote."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import lora_lite as ll
from lora_lite.cli.main import main
from tests.oracles.compat_peft import TOLERANCE, perturb
from tests.oracles.peft_cases import NAMES, distance, gpt2, in_peft, logits, peft, quietly, qwen, saved, transformers


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """base and base_gpt2: model folders; a, b: checkpoints on them; peft: an IA3 folder of both sides."""
    here = tmp_path_factory.mktemp("commands")
    for base, name in ((qwen, "base"), (gpt2, "base_gpt2")):
        base().save_pretrained(here / name)
    (here / "base" / "tokenizer.json").write_text("{}")
    model = qwen()
    handle = ll.attach(model, ll.config("pissa", r=4, targets=NAMES[qwen]))
    perturb(handle)
    handle.save(here / "a.safetensors")
    want = {"a": logits(model)}
    model = gpt2()
    handle = ll.attach(model, ll.config("road", group_size=16, targets=NAMES[gpt2]))
    perturb(handle)
    handle.save(here / "b.safetensors")
    want["b"] = logits(model)
    config = peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])
    want["peft"] = saved(qwen, config, here / "peft")
    return here, want


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command line."""
    monkeypatch.setattr(sys, "argv", ["lora_lite", *map(str, arguments)])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    capsys.readouterr()
    code = 0
    try:
        quietly(main)
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr()
    return code, said.out, said.err


def test_export_writes_what_peft_loads_and_states_the_errors(place, tmp_path, monkeypatch, capsys):
    here, want = place
    code, out, err = run(monkeypatch, capsys, "export", here / "a.safetensors", tmp_path / "a", "--base", here / "base")
    assert (code, err) == (0, "")
    assert "plain LoRA of rank 8, scale 1, exact" in out
    assert distance(in_peft(qwen, tmp_path / "a"), want["a"]) < TOLERANCE
    cut = ("export", here / "a.safetensors", tmp_path / "cut", "--base", here / "base", "--rank", "3")
    code, out, err = run(monkeypatch, capsys, *cut)
    assert (code, out) == (2, "")
    assert err.startswith("error: rank=3 cuts off")
    assert not (tmp_path / "cut").exists()
    code, out, _ = run(monkeypatch, capsys, *cut, "--limit", "0.9")
    assert code == 0
    assert out.count("e-01") == 6


def test_import_writes_one_checkpoint_per_variant(place, tmp_path, monkeypatch, capsys):
    here, want = place
    command = ("import", here / "peft", tmp_path / "style.safetensors", "--base", here / "base", "--name", "style")
    code, out, _ = run(monkeypatch, capsys, *command)
    assert code == 0
    assert [line.split(": ")[0] for line in out.splitlines()] == [str(tmp_path / f"style{n}.safetensors") for n in ("", "_2")]
    model = transformers.AutoModelForCausalLM.from_pretrained(here / "base")
    for file in ("style", "style_2"):
        assert ll.load(model, tmp_path / f"{file}.safetensors").name == file
    assert distance(logits(model.eval()), want["peft"]) < TOLERANCE
    code, _, err = run(monkeypatch, capsys, *command)
    assert code == 2
    assert "Nothing is written over" in err


@pytest.mark.parametrize(("adapter", "base"), [("a.safetensors", "base"), ("b.safetensors", "base_gpt2"), ("peft", "base")])
def test_merge_writes_a_model_that_needs_no_adapter(adapter, base, place, tmp_path, monkeypatch, capsys):
    here, want = place
    code, _, err = run(monkeypatch, capsys, "merge", here / adapter, tmp_path / "merged", "--base", here / base)
    assert (code, err) == (0, "")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert distance(logits(merged), want[adapter.partition(".")[0]]) < TOLERANCE
    assert (tmp_path / "merged" / "tokenizer.json").exists() == (here / base / "tokenizer.json").exists()
    assert merged.dtype == torch.float32


def test_merge_follows_no_link_out_of_the_base(place, tmp_path, monkeypatch, capsys):
    here, _ = place
    (tmp_path / "secret").write_text("secret")
    shutil.copytree(here / "base", tmp_path / "base")
    (tmp_path / "base" / "notes.txt").symlink_to(tmp_path / "secret")
    code, _, err = run(monkeypatch, capsys, "merge", here / "a.safetensors", tmp_path / "new", "--base", tmp_path / "base")
    assert code == 2
    assert "notes.txt is a link to" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "secret"]


def test_merge_follows_links_to_the_blobs_of_a_hub_cache(place, tmp_path, monkeypatch, capsys):
    here, want = place
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0", tmp_path / "models--a--b" / "blobs"
    shutil.copytree(here / "base", snapshot)
    blobs.mkdir()
    for n, file in enumerate(list(snapshot.iterdir())):
        file.rename(blobs / f"{n}")
        file.symlink_to(Path("..") / ".." / "blobs" / f"{n}")
    code, _, err = run(monkeypatch, capsys, "merge", here / "a.safetensors", tmp_path / "new", "--base", snapshot)
    assert (code, err) == (0, "")
    assert (tmp_path / "new" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "new" / "tokenizer.json").is_symlink()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    assert distance(logits(merged), want["a"]) < TOLERANCE


def test_merge_runs_no_code_of_the_base(place, tmp_path, monkeypatch, capsys):
    """Not even where the terminal would be asked, and answered yes."""
    here, _ = place
    shutil.copytree(here / "base", tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    (tmp_path / "base" / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    code, _, err = run(monkeypatch, capsys, "merge", here / "a.safetensors", tmp_path / "new", "--base", tmp_path / "base")
    assert code == 2
    assert "transformers cannot load" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base"]


def test_merge_keeps_the_dtype_of_the_base(place, tmp_path, monkeypatch, capsys):
    here, want = place
    qwen().bfloat16().save_pretrained(tmp_path / "base")
    merge = ("merge", here / "a.safetensors", tmp_path / "merged", "--base", tmp_path / "base")
    code, _, err = run(monkeypatch, capsys, *merge)
    assert code == 2
    assert "another base" in err
    assert not (tmp_path / "merged").exists()
    assert run(monkeypatch, capsys, *merge, "--any-base")[0] == 0
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.dtype == torch.bfloat16
    assert distance(logits(merged.float()), want["a"]) < 0.1


def test_a_bias_that_the_architecture_lacks_is_refused(place, tmp_path, monkeypatch, capsys):
    from lora_lite.cli import folders as on_folders

    here, _ = place
    model, handle = on_folders.base_model(here / "base", "auto"), None
    handle = ll.attach(model, ll.config("lora", r=2, targets=("down_proj",)))
    layer = next(iter(handle.layers))

    def growing(model, limit):
        assert limit is None
        ll.merge(model)
        model.get_submodule(layer).bias = torch.nn.Parameter(torch.ones(32), requires_grad=False)

    monkeypatch.setattr(on_folders, "merge", growing)
    with pytest.raises(ll.LoraLiteError, match="has no bias, and this adapter moves it"):
        on_folders.fold(model)


def test_inspect_shows_a_folder_and_what_reads_it(place, monkeypatch, capsys):
    here, _ = place
    code, out, _ = run(monkeypatch, capsys, "inspect", here / "peft")
    assert code == 0
    assert out.splitlines()[:2] == ["peft_type  IA3", "here       ia3, ia3_ff"]
    assert "model.layers.0.mlp.down_proj.ia3_l  (1, 48)  float32" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("export", "a.safetensors", "new/er", "--base", "base"), "the folder around it does not exist"),
        (("export", "none.safetensors", "new", "--base", "base"), "does not exist"),
        (("export", "a.safetensors", "base", "--base", "base"), "Nothing is written over"),
        (("export", "a.safetensors", "new", "--base", "peft"), "has no config.json"),
        (("export", "a.safetensors", "new", "--base", "broken"), "transformers cannot load"),
        (("export", "a.safetensors", "new", "--base", "base", "--dtype", "floaty"), "no dtype"),
        (("export", "a.safetensors", "new", "--base", "base_gpt2"), "belongs to another model"),
        (("import", "base", "new.safetensors", "--base", "base"), "has no adapter_config.json"),
        (("import", "peft", "new.safetensors", "--base", "base_gpt2"), "has no Linear"),
        (("merge", "peft", "base", "--base", "base"), "Nothing is written over"),
        (("inspect", "base"), "has no adapter_config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_errors_are_one_line_and_write_nothing(arguments, word, place, monkeypatch, capsys):
    here, _ = place
    monkeypatch.chdir(here)
    Path("broken").mkdir(exist_ok=True)
    Path("broken/config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    before = sorted(p.name for p in here.iterdir())
    code, out, err = run(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert word in err
    assert sorted(p.name for p in here.iterdir()) == before
