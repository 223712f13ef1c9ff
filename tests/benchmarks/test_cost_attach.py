"""What attaching costs: what a case measures, what the record holds, what the page says."""

import pytest

from benchmarks.cost import attach as cost_attach
from benchmarks.cost.attach import Attach, attach_rows, count, exponent, growth_rows, large_rows, spec_of
from benchmarks.cost.attach_case import measured
from benchmarks.cost.attach_report import section

pytest.importorskip("peft")


def fake(spec):
    size = spec["d"] * spec["rank"] * spec["layers"] * spec["tokens"]
    ours = spec["subject"] == "ours"
    return {"seconds": size**2 * (1 if ours else 4), "peak_bytes": size << 20, "model_bytes": 2**20, "energy": 0.9999}


@pytest.mark.parametrize("subject", ["ours", "peft"])
@pytest.mark.parametrize("case", ["pissa", "corda"])
def test_a_case_measures_seconds_memory_and_energy(case, subject):
    settings = Attach(repeats=1, batches=1)
    found = measured(spec_of(settings, case=case, subject=subject, d=64, layers=1, rank=2, tokens=80, energy=True))
    assert set(found) == {"seconds", "peak_bytes", "model_bytes", "energy"}
    assert found["seconds"] > 0
    assert found["peak_bytes"] >= 0
    assert 0.99 < found["energy"] < 1 + 1e-5
    assert found["model_bytes"] > 4 * 64 * 64


def test_rows_growth_and_page_come_from_the_cases(monkeypatch):
    monkeypatch.setattr(cost_attach, "child", lambda specs: [fake(spec) for spec in specs])
    settings, seen = Attach(cases=("pissa", "pissa_fast", "olora")), []
    record = {"settings": vars(settings), "rows": attach_rows(settings, seen.append), "growth": growth_rows(settings)}
    record["large"] = large_rows(settings)
    assert seen == [name for case in settings.cases for name in (case, f"{case}, PEFT")]
    assert len(seen) == count(settings, "attach")
    for row in record["growth"]:
        assert abs(row["seconds_exponent"] - 2) < 1e-9
        assert abs(row["peak_bytes_exponent"] - 1) < 1e-9
    text = section(record)
    assert any(
        line.startswith("| `pissa` | d1024 | 16 |") and "| 0.25 |" in line and line.endswith("| 1e-04 | 1e-04 |")
        for line in text
    )
    assert sum(line.startswith("| `corda` | ") for line in text) == 4 + 1
    assert "| `corda` | 16 | " in "\n".join(text)
    assert "Batches there have 128 tokens." in " ".join(text)


def test_exponent_is_the_slope_of_the_logarithms():
    assert abs(exponent([1, 2, 4, 8], [3 * n**1.5 for n in (1, 2, 4, 8)]) - 1.5) < 1e-12
