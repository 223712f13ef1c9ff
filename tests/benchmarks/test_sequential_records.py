"""The committed records of bench-sequential: whole, made by the commands they name, and showing what the page says."""

import io
import json

import pytest
from rich.console import Console

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks.sequential.claims import claims
from benchmarks.sequential.figures import committed, span
from benchmarks.sequential.findings import HELPING, compared, found
from benchmarks.sequential.page import page
from benchmarks.sequential.records import RECORDS
from benchmarks.sequential.report import drawn, show
from benchmarks.sequential.summary import finished
from benchmarks.sequential.tasks import digest
from tests import ROOT

FOUND = committed()


def test_every_record_is_there_and_no_other():
    assert set(FOUND) == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_record_names_the_command_that_makes_it_and_follows_from_its_runs(name):
    record = FOUND[name]
    assert record["command"] == " ".join(["just bench-sequential", *RECORDS[name]])
    assert finished(record) == record
    assert len(record["runs"]) == len(record["settings"]["seeds"])
    assert {"python", "torch", "lora_lite", "threads"} <= set(record["environment"])
    assert all(digest(task) == found["sha256"] for task, found in record["tasks"].items())
    assert str(ROOT) not in json.dumps(record)


@pytest.mark.parametrize("name", RECORDS)
def test_every_figure_is_whole_on_a_terminal_of_80_columns(name):
    text = io.StringIO()
    show(FOUND[name], Console(file=text, width=80))
    assert "…" not in text.getvalue()


@pytest.mark.parametrize("name", ["conflict", "continual_80", "gossip_5"])
def test_every_curve_lies_within_its_panel(name):
    for axes in drawn(FOUND[name]).axes:
        low, high = axes.get_ylim()
        assert all(low <= y <= high for line in axes.get_lines() for y in line.get_ydata())


@pytest.mark.parametrize("claim", claims(FOUND), ids=lambda claim: claim.text[:60])
def test_what_the_page_says_holds_on_the_records(claim):
    assert claim.holds, claim.text


def test_claims_can_fail():
    changed = json.loads(json.dumps(FOUND))
    for run in changed["conflict"]["runs"]:
        run["rows"][-1]["tasks"]["A"]["acc"] = 0.9
    lost = [claim for claim in claims(changed) if not claim.holds]
    assert [claim.text[:27] for claim in lost] == ["The conflicting task overwr"]
    assert "(does not hold) The conflicting task" in " ".join(page(changed).split())


@pytest.mark.parametrize("name", compared(FOUND))
def test_every_finding_of_a_record_stands_on_the_page(name):
    lines = (ROOT / "docs" / "sequential.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| figure | better |")).split(" | ")
    column = head.index(f"`{FOUND[name]['settings']['objective']}`" + (" |" if name == compared(FOUND)[-1] else ""))
    for figure in found(FOUND[name]):
        row = next(line for line in lines if line.startswith(f"| {figure} |")).split(" | ")
        assert f"{FOUND[name]['paired'][figure]['mean']:+.4g}" in row[column], figure


def test_a_finding_of_any_measure_changes_the_page():
    for figure in ("acc.forgetting_a", "end.intrusion", "delta_cosine_a_b"):
        changed = json.loads(json.dumps(FOUND))
        changed["l1"]["paired"][figure] |= {"finding": True, "mean": 0.1234, "p": 0.001}
        assert f"| {figure} |" in page(changed)
        assert f"| {figure} |" not in page(FOUND)


@pytest.mark.parametrize(
    ("figure", "told"),
    [
        ("line.forgetting_a", "Through phase B they keep"),
        ("line.interference_a", "Phase C takes it back"),
        ("answer.forgetting_a", "Of A's answer nothing"),
        ("acc.interference_a", "Of A's answer nothing"),
        ("end.A.line", "At the end nothing of it"),
        ("end.intrusion", "At the end nothing of it"),
    ],
)
def test_all_four_statements_on_forgetting_hang_on_their_own_measures(figure, told):
    changed = json.loads(json.dumps(FOUND))
    result = changed[HELPING[0]]["paired"][figure]
    result["finding"] = not result["finding"]
    lost = [claim.text for claim in claims(changed) if not claim.holds]
    assert len(lost) == 1
    assert lost[0].startswith(told)
    assert f"(does not hold) {told}" in " ".join(page(changed).split())


def test_page_tells_the_four_figures_of_forgetting():
    text = " ".join((ROOT / "docs" / "sequential.md").read_text().split())
    for mean in ("-0.122", "-0.064", "-0.084"):
        assert f"{mean} (" in text.partition("line.forgetting_a")[2]
    assert "p = 0.00065" in text
    assert "None of them is found to keep A from being forgotten" not in text


def test_page_is_that_of_the_records_and_has_its_picture():
    assert (ROOT / "docs" / "sequential.md").read_text() == page(FOUND)
    assert (ROOT / "docs" / "sequential.png").exists()


@pytest.mark.parametrize(
    ("values", "text"), [([1.0, 1.0], "1.00"), ([0.0, 0.5], "0.25 (0.00 to 0.50)"), ([0.996, 1.0], "1.00"), ([-1.0], "-1.00")]
)
def test_span_is_mean_and_extremes_where_they_differ(values, text):
    assert span(values) == text
