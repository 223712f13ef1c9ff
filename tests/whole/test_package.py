"""The package as users get it: import cost, runtime dependencies, wheel, command line, plugins."""

import json
import subprocess
import sys
import zipfile

import pytest

import lora_lite as ll
from lora_lite.cli.main import main
from lora_lite.contract.registry import CARD_FIELDS
from lora_lite.testing import checks
from tests import ROOT

ALLOWED = {"torch", "safetensors", "einops", "jaxtyping", "lora_lite"}


def python(*arguments, cwd=None, path=None):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(path or ""), "PYTHONWARNINGS": "ignore"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def test_import_pulls_in_nothing_beyond_the_four_dependencies():
    """What torch, safetensors, einops and jaxtyping import themselves is theirs; the rest must be the standard library."""
    code = """
import json, sys
import torch, safetensors.torch, einops, jaxtyping
before = set(sys.modules)
import lora_lite
lora_lite.names()
print(json.dumps(sorted({m.partition(".")[0] for m in set(sys.modules) - before})))
"""
    found = python("-c", code)
    assert found.returncode == 0, found.stderr
    new = set(json.loads(found.stdout)) - set(sys.stdlib_module_names)
    assert new <= ALLOWED, new


def test_numpy_is_not_needed(tmp_path):
    """torch runs without it, and it is none of the four."""
    code = """
import sys
sys.modules["numpy"] = None
import torch, lora_lite as ll
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
for name in ("lora", "pissa", "hra"):
    handle = ll.attach(model, ll.config(name, r=2))
    ll.save(model, "a.safetensors")
    ll.export_peft(model, name)
    handle.detach()
    ll.load(model, "a.safetensors").detach()
    ll.load_peft(model, name).detach()
"""
    ran = python("-c", code, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_declared_dependencies_are_the_four():
    tomllib = pytest.importorskip("tomllib")

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {d.partition(">")[0] for d in project["dependencies"]} == ALLOWED - {"lora_lite"}


def test_wheel_holds_the_package_and_runs_the_quickstart(tmp_path):
    built = python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(ROOT))
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert "lora_lite/py.typed" in names
        assert "lora_lite/templates/variant.py.txt" in names
        assert not [n for n in names if n.startswith(("tests/", "benchmarks/"))]
        archive.extractall(tmp_path / "site")
    code = """
import torch, lora_lite as ll
assert "site" in ll.__file__
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
ll.attach(model, ll.config("lora", r=2))
ll.save(model, "a.safetensors")
ll.load(torch.nn.Sequential(torch.nn.Linear(8, 8)), "a.safetensors", strict_base=False)
print(len(ll.names()))
"""
    ran = python("-c", code, cwd=tmp_path, path=tmp_path / "site")
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) == len(ll.names())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    from lora_lite.testing import toy

    path = tmp_path_factory.mktemp("cli") / "a.safetensors"
    model = toy.toy()
    ll.attach(model, ll.config("lora", r=2))
    ll.save(model, path)
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """(exit code, stdout, stderr) of `python -m lora_lite` with these words, run in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["lora_lite", *words])
        with pytest.raises(SystemExit) as ended:
            sys.exit(main())
        return (ended.value.code or 0, *capsys.readouterr())

    return run


def test_command_line_lists_shows_and_inspects(checkpoint, command):
    listed = python("-m", "lora_lite", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ll.names()
    _, shown, _ = command("show", "lora")
    assert "y' = y + c s B A x" in shown
    assert "alpha            16.0" in shown
    _, inspected, _ = command("inspect", str(checkpoint))
    assert "blocks.0.q_proj.A  (2, 24)  float32" in inspected


def test_command_line_errors_are_short(checkpoint, command):
    for words, word in ((("show", "lroa"), "Closest name: lora"), (("inspect", str(checkpoint) + "x"), "cannot be read")):
        code, _, said = command(*words)
        assert code == 2
        assert word in said
        assert "Traceback" not in said
    assert python("-m", "lora_lite", "show", "lroa").returncode == 2


def test_new_variant_passes_the_suite_and_writes_over_nothing(tmp_path, monkeypatch, command):
    places = ("--folder", "plugin", "--tests", "tests", "--reviews", "reviews")
    monkeypatch.chdir(tmp_path)
    assert command("new", "my_method", *places)[0] == 0
    assert "exists" in command("new", "my_method", *places)[2]
    assert "cannot be called" in command("new", "My-Method", *places)[2]
    assert "already" in command("new", "lora", *places)[2]
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_my_method.py")
    tested = python(*words, cwd=tmp_path, path=tmp_path / "plugin")  # nothing of this repository is there
    assert tested.returncode == 0, tested.stdout
    assert "2 passed" in tested.stdout
    review = (tmp_path / "reviews" / "my_method.md").read_text()
    assert all(field in (tmp_path / "plugin" / "my_method.py").read_text() for field in CARD_FIELDS)
    assert "my_method" in review


def test_the_command_that_checks_a_variant_ends_with_how_many_promises_hold(command):
    _, ran, _ = command("check", "ia3")
    count = len(checks("ia3"))
    assert ran.splitlines()[-1] == f"{count} of {count} promises hold"


def test_variants_of_other_packages_join_by_entry_point(tmp_path):
    (tmp_path / "plug.py").write_text(
        "import lora_lite as ll\nfrom lora_lite.variants.lora import LoRA, LoRAConfig\n"
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True, kw_only=True)\nclass PlugConfig(LoRAConfig): pass\n"
        "@ll.register\nclass Plug(LoRA): Config = PlugConfig\n"
    )
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lora_lite.variants]\nplug = plug\nbroken = nowhere_to_be_found\n")
    found = python("-c", "import lora_lite as ll; print(ll.names()); print(ll.PlugConfig(r=3).r)", path=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "'plug'" in found.stdout
    assert found.stdout.splitlines()[1] == "3"
    loud = subprocess.run(
        [sys.executable, "-W", "always", "-c", "import lora_lite as ll; ll.names()"],
        capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert "variant plugin broken" in loud.stderr
