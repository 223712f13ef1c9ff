"""docs/guide/objectives.md: its blocks run, in order, in one namespace; its tables name what there is."""

import json
import re

import pytest
import torch

import lora_lite as ll
from lora_lite.core import finding
from lora_lite.testing import toy
from tests import ROOT
from tests.oracles.guide import GUIDE, blocks

PAGE = blocks("objectives")
TEXT = (GUIDE / "objectives.md").read_text()


@pytest.mark.long  # every block; of the other pages tests/whole/test_engines.py runs them every day
def test_the_blocks_of_the_page_run_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    space: dict = {"__name__": "guide"}
    for block in PAGE:
        exec(block.replace("benchmarks/base", str(ROOT / "benchmarks" / "base")), space)
    printed = capsys.readouterr().out
    assert printed.count("'eff_rank':") == 3
    assert "{'gossip': " in printed
    assert re.search(r"eff_rank +\d+\.\d+ -> +\d+\.\d+", printed)
    assert {"eff_rank", "eff_rank_unmasked", "delta_eff_rank"} <= space["both"].keys()
    assert space["after"]["sigma_ratio"] != pytest.approx(space["base"]["sigma_ratio"], rel=1e-4)
    assert len(space["ranks"]) == 42
    model = space["model"]
    own = {id(p) for f in finding.adapters(model) for p in f.adapter.parameters()}
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def test_the_tables_name_every_objective_and_every_figure():
    for name in ll.objectives.names():
        assert f"`{name}`" in TEXT, name
    model, x = toy.toy(), toy.inputs(2, 6, 24)
    figures = ll.geometry.measure(model, [x], layers=1, attention=False)
    for name in (*figures, "head_sim", "delta_eff_rank"):
        assert f"`{name}`" in TEXT, name


def test_the_table_of_costs_is_the_committed_record_s():
    pytest.importorskip("rich")
    from benchmarks.cost.objectives import SUBJECTS, markdown

    record = json.loads((ROOT / "benchmarks" / "results" / "objectives_cost.json").read_text())
    assert "\n".join(markdown(record)) in TEXT
    assert tuple(record["ratios"]) == SUBJECTS
    assert record["environment"]["threads"] == 1


def test_padding_raises_rep_and_lowers_eff_rank_as_the_page_says():
    """Forty random rows and 88 equal ones."""
    X = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([X, X[:1].expand(88, -1)])
    masked, unmasked = ll.geometry.of_rows(X), ll.geometry.of_rows(padded)
    assert unmasked["rep"] > 3 * masked["rep"]
    assert unmasked["eff_rank"] < masked["eff_rank"]
