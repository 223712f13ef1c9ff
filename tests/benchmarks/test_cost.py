"""just bench-cost: what it compares, what it records, how it fails."""

import io
import itertools
import json
import time
import types
from statistics import median

import pytest
import torch

import lora_lite as ll
from benchmarks.common import measure
from benchmarks.cost import bench as cost
from benchmarks.cost import limit, subjects
from benchmarks.cost.goals import GOALS, cell, controlled, ratio, reached
from benchmarks.cost.peers import PEERS
from benchmarks.cost.report import page, plot, table
from benchmarks.cost.settings import Cost
from benchmarks.cost.step import times
from lora_lite.core import finding
from tests.oracles.kinds import daily

pytest.importorskip("peft")
TINY = ["parts=step", "variants=lora,antipasto_ablate", "models=d512", "repeats=1", "seconds=.01", "tokens=16"]


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
            assert median(row[subject]["step"]) > median(row[subject]["forward"]) > 0
            assert row[subject]["peak_bytes"] > row[subject]["saved_bytes"] > 0
        assert row["ours"]["saved_bytes"] > row["bare"]["saved_bytes"]
        assert {"attach_seconds", "load_seconds", "file_bytes"} <= set(row["ours"])
        assert all(row["limit"][kind] > median(row["bare"][kind]) for kind in ("forward", "step"))


def test_ratios_are_medians_over_the_rounds_in_which_both_ran_and_missing_peers_are_blank(record):
    row = {
        "ours": {"step": [2.0, 6.0, 9.0]},
        "bare": {"step": [1.0, 2.0, 3.0]},
        "peft": {"step": [4.0]},
        "limit": {"step": 1.5},
    }
    assert ratio(row, "ours", "step") == 3.0
    assert ratio(row, "ours", "step", "peft") == 0.5
    assert ratio(row, "ours", "step", "limit") == 4.0
    assert ratio(row, "limit", "step", "bare") == 0.75
    first, second = record["rows"]
    assert ratio(first, "ours", "saved_bytes", "peft") == first["ours"]["saved_bytes"] / first["peft"]["saved_bytes"]
    assert ratio(second, "ours", "step", "peft") is None
    assert table(record).row_count == 3  # the name of the model, and two variants
    assert plot(record).startswith(b"\x89PNG")


def test_the_slow_take_fewer_turns_and_each_of_the_others_is_as_often_behind_the_bare_model():
    class Toy(torch.nn.Module):
        def __init__(self, rest: float):
            super().__init__()
            self.embedding, self.rest, self.runs = torch.nn.Embedding(4, 4), rest, 0

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids=None, inputs_embeds=None, labels=None):
            self.runs += inputs_embeds is not None
            order.append(self)
            time.sleep(self.rest)
            loss = None if inputs_embeds is None else inputs_embeds.sum()
            return types.SimpleNamespace(loss=loss)

    order: list[Toy] = []
    ids, bare, ours = torch.zeros(1, 4, dtype=torch.long), Toy(0.002), Toy(0.002)
    found = times({"bare": bare, "ours": ours, "peft": Toy(0.1)}, ids, 3)
    assert [len(found[name]["step"]) for name in ("bare", "ours", "peft")] == [6, 6, 2]
    order.clear()
    times({"bare": bare, "ours": ours, "peft": (peft := Toy(0.002))}, ids, 2)
    behind = [after for before, after in itertools.pairwise(order) if before is bare and after is not bare]
    assert behind == [ours, ours, peft, ours, peft]  # the first one warms up
    order.clear()
    times({"bare": bare, "ours": ours}, ids, 1, enough=0.1)
    assert len(order) > 6 * 2


@pytest.mark.parametrize("side", ["output", "input"])
def test_extra_work_is_what_the_formula_needs(side):
    """lora: r (i + o) multiply-adds per token and three times that in a step; both factors, and its own side's activations."""
    model, ids = subjects.build("d512"), torch.zeros(1, 16, dtype=torch.long)
    cfg = ll.config("lora", r=4, targets=("o_proj",)) if side == "output" else ll.config("hra", r=4, targets=("o_proj",))
    work = limit.extra(subjects.attached(model, cfg, ids)[0], limit.multiply_adds(model, ids), ids)
    tensors = 2 * 4 * (512 + 512) if side == "output" else 2 * 4 * 512  # two blocks
    assert work["forward"]["bytes"] == 4 * (tensors + 2 * 2 * 16 * 512)
    assert work["step"]["bytes"] == 4 * (3 * tensors + 2 * 4 * 16 * 512)
    if side == "output":
        assert work["forward"]["multiply_adds"] == 16 * tensors
        assert work["step"]["multiply_adds"] == 3 * 16 * tensors
    assert limit.least_seconds({"multiply_adds": 6, "bytes": 8}, {"multiply_adds_per_second": 3, "bytes_per_second": 2}) == 6


def test_peak_memory_counts_what_lives_at_once():
    class Toy(torch.nn.Module):
        def __init__(self, copies: int):
            super().__init__()
            self.embedding, self.copies = torch.nn.Embedding(4, 256), copies

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, inputs_embeds, labels):
            kept = [inputs_embeds.detach() + k for k in range(self.copies)]
            return types.SimpleNamespace(loss=inputs_embeds.sum() + kept[-1].sum())

    ids = torch.zeros(1, 256, dtype=torch.long)
    few, many = (measure.memory(Toy(copies), ids)["peak_bytes"] for copies in (1, 5))
    assert many - few == 4 * 256 * 256 * 4


def test_page_says_what_is_unmeasured(record):
    assert "on one, are unmeasured" in " ".join(page(record).split())
    assert "unmeasured" not in page(record | {"settings": record["settings"] | {"device": "cuda"}})


def test_page_shows_the_ratios_of_every_row(record):
    text = page(record)
    steady = [1.0] * 5
    pair = {"ours": {"step": [1.0, 1.0, 1.0, 1.2, 1.2]}, "bare": {"step": steady}, "peft": {"step": steady}}
    assert cell(pair, "ours", "step", "bare") == "~1.00"
    assert cell(pair, "peft", "step", "bare") == "1.00"
    row = next(line for line in text.splitlines() if line.startswith("| `lora` | 16"))
    assert [text.lstrip("~") for text in row.split(" | ")[2:4]] == [
        f"{ratio(record['rows'][0], 'ours', kind):.2f}" for kind in ("forward", "step")
    ]
    assert next(line for line in text.splitlines() if "`antipasto_ablate` | 2" in line).count(" - ") == 5
    assert "| `lora` | step / PEFT | 1.00 | " in text
    assert min(record["control"]["d512"]["step"]) > 0
    assert " ".join(controlled(record).split()) in " ".join(text.split())


def test_control_shows_its_quartiles_and_records_without_one_say_nothing():
    shown = controlled({"control": {"d512": {"step": [0.98, 1.0, 1.02], "forward": [1.0]}}})
    assert shown.endswith("in the same turns: 1.00 [0.98, 1.02] (d512).")
    assert controlled({}) == ""


def test_goals_are_met_where_every_model_meets_them(record):
    row = {"variant": "oft", "model": "d512", "mode": "eager", "ours": {"step": [0.8]}, "peft": {"step": [1.0]}}
    row["limit"] = {"step": 0.7}
    alone = "| `oft` | step / PEFT | 0.85 | 0.80 [0.80, 0.80] (d512) | 0.70 (d512) | - (d512) | yes |"
    assert reached({"rows": [row]}) == [alone]
    other = {**row, "model": "d1024", "ours": {"step": [0.9]}, "extra": {"step": {"multiply_adds": 6}}}
    other["peft"] = {"step": [1.0], "multiply_adds": {"step": 2}}
    figures = "0.80 [0.80, 0.80] (d512), 0.90 [0.90, 0.90] (d1024) | 0.70 (d512), {} (d1024) | - (d512), 3.00 (d1024)"
    both = f"| `oft` | step / PEFT | 0.85 | {figures} | no{{}} |"
    assert reached({"rows": [row, other]}) == [both.format("0.70", "")]
    other["limit"] = {"step": 0.88}
    assert reached({"rows": [row, other]}) == [both.format("0.88", ", and below the limit")]
    uneven = {**row, "ours": {"step": [0.8, 0.84, 0.9, 0.91]}, "peft": {"step": [1.0] * 4}}
    assert reached({"rows": [uneven]})[0].endswith("0.87 [0.81, 0.91] (d512) | 0.70 (d512) | - (d512) | within the spread |")
    assert set(sum((goal.variants for goal in GOALS), ())) <= set(ll.names())


def test_goals_of_kept_bytes_attaching_and_loading_have_a_row_each():
    kept = {"mode": "eager", "model": "d512", "peft": {"saved_bytes": 100}}
    rows = [{**kept, "variant": "lora", "ours": {"saved_bytes": 90}}, {**kept, "variant": "lokr", "ours": {"saved_bytes": 130}}]
    attach = {"rows": [{"case": "pissa_fast", "ours": {"seconds": 1.0}, "peft": {"seconds": 8.0}}]}
    attach["large"] = [{"case": "corda", "blocks": 4, "ours": {"peak_bytes": 20, "model_bytes": 100}}]
    start = [{"measure": "load", "ours": {"median": 3.0}, "read_bytes": {"median": 2.0}}]
    assert reached({"rows": rows, "attach": attach, "start": start}) == [
        "| all with a peer | kept / PEFT | 1.00 | at most 1.30 (`lokr`, d512) | - | - | no |",
        "| `pissa_fast` | attach / PEFT | 0.10 | 0.12 | - | - | no |",
        "| `corda` | memory of attach / model of 4 8B blocks | 0.25 | 0.20 | - | - | yes |",
        "| `lora` | load / reading | 1.50 | 1.50 | - | - | yes |",
    ]


def test_goals_of_kept_bytes_beside_lora_leave_out_the_bare_model_and_what_the_formula_needs():
    tensors, outputs = 5, 40
    work = {"forward": {"bytes": tensors + 2 * outputs}, "step": {"bytes": 3 * tensors + 4 * outputs}}
    common = {"mode": "eager", "model": "d512", "bare": {"saved_bytes": 10}, "extra": work}
    saved = {"lora": 60, "dora": 109, "hra": 75}
    rows = [{**common, "variant": name, "ours": {"saved_bytes": kept}} for name, kept in saved.items()]
    assert reached({"rows": rows}) == [
        "| `dora` | kept / lora's and the outputs | 1.20 | 1.10 (d512) | - | - | yes |",
        "| `hra` | kept / lora's | 1.20 | 1.30 (d512) | - | - | no |",
    ]
    assert reached({"rows": rows[1:]}) == []


def test_whole_numbers_of_seconds_are_numbers_of_seconds():
    assert Cost.parse(["seconds=8"], "").seconds == 8.0


@pytest.mark.parametrize("name", daily(sorted(PEERS), "lora", "dora", "oft", "vera", "ia3"))
def test_peer_adapts_the_same_layers_with_the_same_method(name):
    """As many trained numbers as ours, where the method stores the same ones."""
    model = subjects.build("d512")
    cfg = subjects.variant_config(name, model)
    theirs, _ = subjects.peered(model, cfg)
    ours, _ = subjects.attached(model, cfg, torch.zeros(1, 64, dtype=torch.long) + torch.arange(64))
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    stored_otherwise = {"boft", "randlora", "eva"}  # whole blocks and a scale; bases per layer; ranks by data
    assert count == ll.status(ours).trainable or name in stored_otherwise
    layers = {f.path for f in finding.adapters(ours)}
    assert all(any(path in key for key, p in theirs.named_parameters() if p.requires_grad) for path in layers)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["variants=lroa"], "Closest name: lora"),
        (["models=d513"], "Closest name: d512"),
        (["modes=jit"], "eager"),
        (["parts=grow"], "Closest name: growth"),
        (["device=gpu"], "device='gpu'"),
        (["repeats=0"], "A value like"),
        (["peer=torch"], "peft"),
        (["speed=1"], "written key=value"),
    ],
)
def test_wrong_options_are_named(words, named):
    with pytest.raises(ll.LoraLiteError, match=named):
        Cost.parse(words, "just bench-cost")
