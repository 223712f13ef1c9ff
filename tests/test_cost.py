"""just bench-cost: what it compares, what it records, how it fails."""

import io
import json

import pytest
import torch

import lora_lite as ll
from benchmarks import cost
from benchmarks.cost import Cost
from benchmarks.cost_report import COLUMNS, cell, page, ratio, table
from benchmarks.peers import PEERS

pytest.importorskip("peft")
TINY = ["variants=lora,antipasto_ablate", "models=d512", "repeats=1", "tokens=16"]


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    from rich.console import Console

    out = tmp_path_factory.mktemp("cost")
    found = cost.run(Cost.parse([*TINY, f"out={out}"], ""), Console(file=io.StringIO()))
    assert json.loads((out / "cost.json").read_text()) == json.loads(json.dumps(found))
    return found


def test_every_row_has_the_bare_model_and_ours_and_the_peer_where_there_is_one(record):
    assert [row["variant"] for row in record["rows"]] == ["lora", "antipasto_ablate"]
    for row in record["rows"]:
        assert set(row) >= {"bare", "ours"}
        assert ("peft" in row) == (row["variant"] in PEERS)
        for subject in ("bare", "ours", *(["peft"] if "peft" in row else [])):
            assert {"forward", "step", "saved_bytes"} <= set(row[subject])
            assert row[subject]["step"]["median"] > row[subject]["forward"]["median"] > 0
        assert row["ours"]["saved_bytes"] > row["bare"]["saved_bytes"] > 0
        assert {"attach_seconds", "load_seconds", "file_bytes"} <= set(row["ours"])


def test_ratios_are_medians_over_medians_and_missing_peers_are_blank(record):
    first, second = record["rows"]
    assert ratio(first, "ours", "step") == first["ours"]["step"]["median"] / first["bare"]["step"]["median"]
    assert ratio(first, "ours", "saved_bytes", "peft") == first["ours"]["saved_bytes"] / first["peft"]["saved_bytes"]
    assert ratio(second, "ours", "step", "peft") is None
    assert table(record).row_count == 2
    assert len(table(record).columns) == 3 + len(COLUMNS)


def test_page_shows_the_ratios_of_every_row(record):
    text = page(record)
    steady = {"median": 1.0, "low": 0.96, "high": 1.04}
    pair = {"ours": {"step": steady | {"high": 1.2}}, "bare": {"step": steady}, "peft": {"step": steady}}
    assert cell(pair, "ours", "step", "bare") == "~1.00"
    assert cell(pair, "peft", "step", "bare") == "1.00"
    row = next(line for line in text.splitlines() if line.startswith("| `lora` "))
    assert [text.lstrip("~") for text in row.split(" | ")[2:4]] == [
        f"{ratio(record['rows'][0], 'ours', kind):.2f}" for kind in ("forward", "step")
    ]
    assert next(line for line in text.splitlines() if "antipasto_ablate" in line).count(" - ") == 4


@pytest.mark.parametrize("name", sorted(PEERS))
def test_peer_adapts_the_same_layers_with_the_same_method(name):
    """As many trained numbers as ours, where the method stores the same ones."""
    model = cost.build("d512")
    cfg = cost.variant_config(name, model)
    theirs, _ = cost.peered(model, cfg)
    ours, _ = cost.attached(model, cfg, torch.zeros(1, 64, dtype=torch.long) + torch.arange(64))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    stored_otherwise = {"boft", "randlora", "eva"}  # whole blocks and a scale; bases per layer; ranks by data
    assert count == ll.status(ours).trainable or name in stored_otherwise
    layers = {f.path for f in ll.runtime.adapters(ours)}
    assert all(any(path in key for key, p in theirs.named_parameters() if p.requires_grad) for path in layers)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["variants=lroa"], "Closest name: lora"),
        (["models=d513"], "Closest name: d512"),
        (["repeats=0"], "A value like"),
        (["peer=torch"], "peft"),
        (["speed=1"], "written key=value"),
    ],
)
def test_wrong_options_are_named(words, named):
    with pytest.raises(ll.LoraLiteError, match=named):
        Cost.parse(words, "just bench-cost")
