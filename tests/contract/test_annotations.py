"""Annotations such as Float[Tensor, "... i"] are held against live tensors in every call of a variant."""

import subprocess
import sys

import pytest

from tests import ROOT

CHECKED = "lora_lite.variants,lora_lite.families,beartype.beartype"


def run(*arguments):
    words = [sys.executable, "-m", "pytest", "-q", f"--jaxtyping-packages={CHECKED}", *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)


CALLS = ("calls_and_shapes", "coeff_per_sample", "needs_data")


@pytest.mark.parametrize("which", [" or ".join(CALLS), pytest.param("not check_compiles", marks=pytest.mark.long)])
def test_shapes_of_every_variant_hold_while_the_suite_runs(which):
    """Every day the checks that call a variant in another way each. Without the compile check: the checker breaks a graph."""
    found = run("tests/variants/test_contract.py", "-k", which)
    assert found.returncode == 0, found.stdout[-2000:]


def test_a_wrong_shape_is_caught(tmp_path):
    """The checker is on: an adapter called with an input of another width fails by its annotation, not by torch."""
    path = tmp_path / "test_wrong.py"
    path.write_text(
        "import lora_lite as ll, torch\n"
        "def test_wrong():\n"
        "    a = ll.get('ia3')(8, 4, ll.config('ia3'))\n"
        "    a(torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, 4), None)\n"
    )
    found = run(str(path))
    assert found.returncode == 1
    assert "jaxtyping" in found.stdout
