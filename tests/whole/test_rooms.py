"""The rooms of src/lora_lite: who may import whom. Every rule is also broken on purpose, in a copy, and must be seen."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_lite
from docs.rooms import faults, imports, modules
from tests import ROOT

SOURCE = Path(lora_lite.__file__).parent
MOST_LINES = 250


def test_every_import_goes_down_or_stays_in_its_room():
    assert faults(SOURCE) == []


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("contract/spec.py", "from ..core.attach import attach", "An import goes down"),
        ("mathematics/maps.py", "from ..sites.layer import sizes", "An import goes down"),
        ("core/delta.py", "def late():\n    from lora_lite.observe import seen", "An import goes down"),
        ("variants/lora.py", "from ..core.finding import adapters", "a variant's file imports"),
        ("core/finding.py", "from .attach import attach", "in a circle"),
        ("loose.py", "x = 1", "stands in no room"),
        ("loose/inner.py", "x = 1", "stands in no room"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path, file, line, told):
    copy = tmp_path / "lora_lite"
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    place = copy / file
    place.parent.mkdir(exist_ok=True)
    place.write_text((place.read_text() if place.exists() else "") + f"\n{line}\n")
    found = faults(copy)
    assert any(told in sentence for sentence in found), found


def test_the_picture_reads_every_file():
    assert imports(SOURCE).keys() == modules(SOURCE).keys()
    assert sum(map(len, imports(SOURCE).values())) > 300


def test_files_are_short():
    long = {
        path.relative_to(SOURCE).as_posix(): n
        for path in SOURCE.rglob("*.py")
        if (n := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long, f"{long}: split by what serves whom"


def test_users_see_users_names_only():
    rooms = "import lora_lite, sys; print(*sorted(dir(lora_lite)))"
    shown = subprocess.run([sys.executable, "-c", rooms], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    configs = {cls.Config.__name__ for cls in map(lora_lite.get, lora_lite.names())}
    assert set(shown) == {*lora_lite.__all__, *configs}
    assert not [name for name in shown if name.startswith("_") and name != "__version__"]


def test_every_name_that_users_see_is_there():
    for name in dir(lora_lite):
        assert getattr(lora_lite, name) is not None
