"""Import, attach, save and load in just bench-cost: what is compared, that nothing stays behind, what the page says."""

import json
from types import SimpleNamespace

import pytest

import lora_lite as ll
from benchmarks.cost import start as cost_start
from benchmarks.cost.start import QWEN3_06B, on_model, random_model, start_rows
from benchmarks.cost.start_report import start_lines
from lora_lite.testing.checks import demand_same, photograph

pytest.importorskip("peft")
TINY = QWEN3_06B | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TINY |= {"num_key_value_heads": 2, "head_dim": 16}


def test_rows_are_plain_data_of_everything_that_is_measured(monkeypatch):
    monkeypatch.setattr(cost_start, "imports", lambda repeats: {"measure": "import", "ours": cost_start.quartiles([0.01])})
    rows = start_rows(SimpleNamespace(repeats=2, peer="peft"), TINY)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["measure"] for row in rows] == ["import", "attach", "save", "load"]
    assert [row.get("layers") for row in rows] == [None, 7, 7, 7]
    assert set(rows[1]) >= {"ours", "peft"}
    assert set(rows[3]) >= {"ours", "load_file", "load_file_and_copy", "read_bytes"}
    assert all(row["ours"]["low"] <= row["ours"]["median"] <= row["ours"]["high"] for row in rows)
    assert all(row["ours"]["median"] > 0 for row in rows)


def test_the_model_is_as_before_after_all_turns_and_without_peft():
    model = random_model(TINY)
    before = photograph(model)
    (attach, *_) = on_model(model, 1, peft=True)
    demand_same(model, before, "after the turns")
    assert "peft" in attach
    assert "peft" not in on_model(model, 1, peft=False)[0]


def test_weights_of_the_random_model_tell_its_layers_apart():
    layers = ll.find_targets(random_model(TINY), ll.config("lora")).values()
    assert len({layer.weight.view(-1)[0].item() for layer in layers}) == 7


def test_import_is_timed_in_an_interpreter_of_its_own():
    found = cost_start.imports(1)["ours"]
    assert 0 < found["median"] < 10


def test_page_has_a_line_for_every_comparison_and_its_ratio():
    def spread(value):
        return {"median": value, "low": value, "high": value}

    rows = [
        {"measure": "import", "ours": spread(0.02)},
        {"measure": "attach", "layers": 196, "ours": spread(0.1), "peft": spread(0.2)},
        {"measure": "load", "layers": 196, "file_bytes": 40e6, "ours": spread(0.03), "read_bytes": spread(0.02)},
    ]
    text = "\n".join(start_lines(rows))
    assert "196 layers" in text
    assert "40 MB" in text
    assert "| `import lora_lite` after torch | 20 ms (20 to 20) | - | - | - |" in text
    assert "| 200 ms (200 to 200) | 0.50 |" in text
    assert "| 20 ms (20 to 20) | 1.50 |" in text
