"""just compatibility: the committed record covers what is registered and holds no defect, and a fresh run of it agrees."""

import io
import json

import pytest

import lora_lite as ll

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from benchmarks.common.places import RESULTS
from benchmarks.compatibility import bench as compatibility
from benchmarks.compatibility.bench import COLUMNS, TWO_PROCESSES, Compatibility
from benchmarks.compatibility.report import MEANING, notes, page, table

RECORD = json.loads((RESULTS / "compatibility.json").read_text())


def test_the_committed_record_has_every_variant_and_every_column():
    assert list(RECORD["rows"]) == ll.names()
    assert all(list(row) == [*COLUMNS, *TWO_PROCESSES] for row in RECORD["rows"].values())
    assert set(MEANING) == {*COLUMNS, *TWO_PROCESSES}


def test_the_committed_record_holds_no_defect():
    assert not [(name, row) for name, row in RECORD["rows"].items() if any("DEFECT" in verdict for verdict in row.values())]


def test_a_fresh_run_agrees_and_a_defect_is_told_in_the_table(tmp_path, monkeypatch):
    from rich.console import Console

    def broken(name: str) -> str:
        raise ValueError("first line\nsecond line")

    monkeypatch.setitem(COLUMNS, "Conv1D", broken)
    settings = Compatibility(variants=("ia3", "oft"), columns=("merge", "export", "import", "Conv1D"), out=str(tmp_path))
    found = compatibility.run(settings, Console(file=io.StringIO()))
    assert json.loads((tmp_path / "compatibility.json").read_text()) == found
    for name, row in found["rows"].items():
        assert row.pop("Conv1D") == "DEFECT ValueError: first line"
        assert row == {column: RECORD["rows"][name][column] for column in row}
    assert table(found).row_count == 2


def test_the_page_numbers_every_verdict_that_is_not_yes():
    rows = {"a": {"merge": "yes", "export": "refused: x"}, "b": {"merge": "refused: y", "export": "refused: x"}}
    record = {"environment": RECORD["environment"], "rows": rows}
    assert notes(record) == {"refused: x": 1, "refused: y": 2}
    lines = page(record).splitlines()
    assert "| `a` | yes | (1) |" in lines
    assert "| `b` | (2) | (1) |" in lines
    assert lines[-2:] == ["1. refused: x", "2. refused: y"]


@pytest.mark.parametrize(("words", "named"), [(["variants=lroa"], "lora"), (["columns=marge"], "merge")])
def test_wrong_options_are_named(words, named):
    with pytest.raises(ll.LoraLiteError, match=f"Closest name: {named}"):
        Compatibility.parse(words, "just compatibility")
