"""The steering example: its rule, its measures by hand, a tiny run, and the committed record."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

import lora_lite as ll

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks.common.places import RESULTS
from benchmarks.embedded.run import Settings, load_base
from benchmarks.steering import bench as steering
from benchmarks.steering.bench import BYTE, KL_LIMIT, score
from benchmarks.steering.passages import DUE, OTHERWISE, Passages, calibration_data, places, prose
from benchmarks.steering.report import at, summary
from benchmarks.steering.settings import CONTEXT, Steering
from tests import ROOT

TINY = ["coeffs=-1", "calibration=4", "places=3", "windows=2", "window=80", "seeds=0,1"]


def check(record):
    """Every figure is finite, and the row at 0 is the base, figure for figure."""
    coeffs = record["settings"]["coeffs"]
    assert set(coeffs) >= {0.0, 1.0}
    for kind in ("contrast", "variance", "random"):
        for run in record["curves"][kind]:
            assert [row["coeff"] for row in run["rows"]] == list(coeffs)
            assert all(math.isfinite(value) for row in run["rows"] for value in row.values())
            assert run["rows"][list(coeffs).index(0.0)] == {"coeff": 0.0, **record["base"]}
            assert {int(path.split(".")[2]) for path in run["layers"]} == set(record["blocks"])
            assert {path.rpartition(".")[2] for path in run["layers"]} == {"o_proj", "down_proj"}
    assert [run["seed"] for run in record["curves"]["random"]] == list(record["settings"]["seeds"])


# --- the rule and the measures ----------------------------------------------------------------------------------------


def test_rule_marks_where_backquotes_open_and_where_words_do_not():
    data = b"see `a`, ``b`` (`c`) or d`e` f ` g\n``h`` X"
    assert [data[p : p + 3] for p in places(data, DUE)] == [b"`a`", b"``b", b"`c`", b"``h"]
    assert [chr(data[p]) for p in places(data, OTHERWISE)] == ["o", "d", "f", "g"]


def test_rows_end_with_the_byte_before_a_place():
    data = prose()["validation"]
    batches = calibration_data(data, Steering(calibration=5))
    for label, rule in (("positive", DUE), ("negative", OTHERWISE)):
        (rows,) = (batch["input_ids"] for batch in batches[label])
        assert rows.shape == (5, 64)
        starts = {data[p - 64 : p] for p in places(data, rule)}
        assert all(bytes(row.tolist()) in starts for row in rows)


def test_parts_of_the_prose_have_no_longer_paragraph_in_common():
    parts = [
        {" ".join(p.split()) for p in passage.decode().split("\n\n") if len(" ".join(p.split())) >= 40}
        for passage in prose().values()
    ]
    assert all(len(part) > 50 for part in parts)
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_scores_are_those_of_a_direct_computation():
    model, _ = load_base(Settings(device="cpu"))
    passages = Passages.of(prose()["validation"], Steering.parse(TINY, ""))
    base = steering.predictions(model, passages)
    handle = ll.attach(model, ll.config("antipasto_ablate", r=192, init_alpha=1.0, seed_direction="random"))
    with torch.no_grad():
        got = score(steering.predictions(model, passages), base, passages)
        after = model(input_ids=passages.windows).logits.double().softmax(-1)
        due = model(input_ids=passages.due).logits[:, -1].double().softmax(-1)[:, BYTE].log2()
        handle.detach()
        before = model(input_ids=passages.windows).logits.double().softmax(-1)
    kl, bits = [], []
    for row, tokens in enumerate(passages.windows):
        for t in range(CONTEXT, len(tokens)):
            if passages.counted[row, t - CONTEXT]:
                p, q = before[row, t - 1], after[row, t - 1]
                kl.append(float((p * (p / q).log2()).sum()))
                bits.append(-math.log2(q[tokens[t]]))
    assert math.isclose(got["due"], float(due.mean()), rel_tol=1e-4)
    assert math.isclose(got["kl"], sum(kl) / len(kl), rel_tol=1e-3)
    assert math.isclose(got["bits_per_byte"], sum(bits) / len(bits), rel_tol=1e-4)
    assert got["kl"] > 1e-4
    assert len(kl) == passages.source["counted_bytes"]


def test_places_of_the_property_are_no_part_of_the_harm():
    data = prose()["validation"]
    passages = Passages.of(data, Steering(windows=10**6))
    starts = torch.linspace(0, len(data) - 256, len(data) // 256).long()
    due = set(places(data, DUE))
    left_out = {int(s) + CONTEXT + i for s, row in zip(starts, passages.counted) for i in range(len(row)) if not row[i]}
    assert left_out
    assert left_out <= due


# --- a tiny run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out, text = tmp_path_factory.mktemp("steering"), io.StringIO()
    return steering.steer([*TINY, f"out={out}"], Console(file=text, width=120)), out, text.getvalue()


def test_tiny_run_writes_a_whole_record_and_shows_it(tiny):
    record, out, shown = tiny
    check(record)
    assert json.loads((out / "steering.json").read_text()) == json.loads(json.dumps(record))
    assert (out / "steering.png").read_bytes().startswith(b"\x89PNG")
    assert f"{at(record, 'contrast', 1.0, 'kl'):.3f}" in shown
    assert record["data"]["held_out"]["places_due"] == 3
    assert str(ROOT) not in json.dumps(record)


def test_random_figures_are_means_over_the_seeds(tiny):
    record, _, _ = tiny
    first, second = (run["rows"][0]["kl"] for run in record["curves"]["random"])
    assert first != second
    assert at(record, "random", -1.0, "kl") == (first + second) / 2


def test_blocks_are_the_best_that_the_limit_allows(tiny):
    tried, blocks = tiny[0]["candidates"], tiny[0]["blocks"]
    assert [t["first_block"] for t in tried] == list(range(6))
    allowed = [t for t in tried if t["kl"] <= KL_LIMIT] or [min(tried, key=lambda t: t["kl"])]
    assert blocks == list(range(min(allowed, key=lambda t: t["due"])["first_block"], 6))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["widows=3"], "Closest name: windows"),
        (["windows"], "written key=value"),
        (["windows=0"], "A value like 48"),
        (["places=many"], "A value like 96"),
        (["coeffs=a,b"], "numbers of type float"),
        (["seeds=0.5"], "numbers of type int"),
        (["window=64"], "More than the 64 bytes"),
    ],
)
def test_wrong_options_are_named(words, named):
    with pytest.raises(ll.LoraLiteError, match=named):
        Steering.parse(words, "")


def test_points_of_the_curve_are_sorted_and_hold_zero_and_one():
    assert Steering.parse(["coeffs=2,-1"], "").coeffs == (-1.0, 0.0, 1.0, 2.0)


def test_errors_end_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as left:
        steering.main(["widows=3"])
    assert left.value.code == 2
    assert "Closest name: windows" in capsys.readouterr().out


# --- the committed record ---------------------------------------------------------------------------------------------


@pytest.fixture
def committed():
    return json.loads((RESULTS / "steering.json").read_text())


def test_committed_record_is_whole_and_of_the_default_settings(committed):
    check(committed)
    defaults = Steering.parse([], "")
    assert all(
        committed["settings"][name] == json.loads(json.dumps(getattr(defaults, name))) for name in ("coeffs", "seeds", "places")
    )
    assert committed["rule"]["due"] == DUE.decode()
    assert {"python", "torch", "lora_lite"} <= set(committed["environment"])
    assert committed["data"]["held_out"]["places_due"] >= 50


def test_committed_record_shows_steering_both_ways_and_its_controls(committed):
    def moved(kind, coeff):
        return at(committed, kind, coeff, "due") - committed["base"]["due"]

    assert moved("contrast", 1.0) < -2 < 0 < 1 < moved("contrast", -1.0)
    for kind in ("random", "variance"):
        assert abs(moved(kind, 1.0)) < 0.25 * abs(moved("contrast", 1.0))
    assert at(committed, "random", 1.0, "kl") < at(committed, "contrast", 1.0, "kl") < at(committed, "variance", 1.0, "kl")


def test_page_has_the_records_figures_and_its_picture(committed):
    text = (ROOT / "docs" / "steering.md").read_text()
    assert summary(committed) in text
    assert "](steering.png)" in text
    assert (ROOT / "docs" / "steering.png").exists()
