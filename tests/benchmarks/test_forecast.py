"""The forecasting example: model, data, a tiny run, and the committed record against what is said of the barrier."""

import io
import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

import lora_lite as ll
from lora_lite.observe import attention
from lora_lite.observe.objectives import AttentionBarrier
from lora_lite.testing import toy

pytest.importorskip("transformers")
pytest.importorskip("typer")
pytest.importorskip("statsmodels")

from benchmarks.common.places import FORECASTER, RESULTS
from benchmarks.embedded.run import fitting
from benchmarks.forecast import bench as forecast
from benchmarks.forecast.base import load_forecaster, pretrained
from benchmarks.forecast.bench import ARMS, TARGETS, Forecasting
from benchmarks.forecast.data import CONTEXT, DISTURBANCES, POINTS, REAL, TASKS, real, sawtooths, sinusoids, task
from benchmarks.forecast.report import SHOWN, at, changes, mean, page
from benchmarks.forecast.toto_like import Forecast, TotoLike, forecasting_loss, toto_schedule
from lora_lite.core import finding
from tests import ROOT

TINY = ["tasks=sawtooth,macrodata", "seeds=0,1", "steps=2", "calibration=2", "windows=6"]


def model():
    return toy.seeded(TotoLike)


def series(n=2, seed=0):
    return sawtooths(torch.Generator().manual_seed(seed), n)


# --- the model --------------------------------------------------------------------------------------------------------


def test_the_model_has_totos_names_and_34768_parameters():
    found = ll.find_targets(model(), ll.config("lora", targets=TARGETS))
    leaves = {path.partition(".")[2].partition(".")[2] for path in found}
    assert leaves == {"attention.wQKV", "attention.wO", "mlp.0", "mlp.2"}
    assert len(found) == 16
    assert sum(p.numel() for p in model().parameters()) == 34_768


def test_heads_are_fastest_in_the_fused_projection():
    one = model()
    with ll.capture(one, {"attention"}) as seen:
        one(series())
    call, block = seen.calls[0], one.blocks[0]
    x = block.norm1(one.embedding(series().unflatten(-1, (-1, 8)))).flatten(0, 1)
    v = block.attention.wQKV(x)[..., 64:]
    for head in range(4):
        assert torch.equal(call.v[:, head], v[..., head::4])
    assert call.v.stride(-1) == 4


def test_time_wise_layers_are_causal_and_space_wise_ones_are_not():
    one = model()
    with ll.capture(one, {"attention"}) as seen:
        one(series())
    assert [call.layer for call in seen.calls] == [f"blocks.{i}.attention" for i in range(4)]
    assert [attention.is_causal(call) for call in seen.calls] == [True, True, False, True]
    assert [tuple(call.q.shape) for call in seen.calls] == [(6, 4, 16, 8), (6, 4, 16, 8), (32, 4, 3, 8), (6, 4, 16, 8)]


def test_a_forecast_sees_no_later_patch_and_every_variate():
    one, x = model(), series()
    changed = x.clone()
    changed[:, 0, 64:] += 1
    with torch.no_grad():
        before, after = one(x).mean, one(changed).mean
    assert torch.equal(before[:, :, :8], after[:, :, :8])
    assert (before != after)[:, :, 8:].all(-1).all()


def test_scores_depend_on_the_distance_of_patches_alone():
    """Rotary embedding: shifting q and k together changes nothing."""
    from benchmarks.forecast.toto_like import rotary

    q, k = toy.inputs(1, 5, 8, dtype=torch.float64), toy.inputs(1, 5, 8, dtype=torch.float64, seed=2)
    shift = torch.zeros(1, 3, 8, dtype=torch.float64)
    moved = [rotary(torch.cat([shift, x], 1))[:, 3:] for x in (q, k)]
    assert torch.allclose(rotary(q) @ rotary(k).mT, moved[0] @ moved[1].mT)
    assert not torch.allclose(rotary(q) @ rotary(k).mT, q @ k.mT)


def test_the_loss_is_that_of_its_formula_on_the_points_that_count():
    x = torch.tensor([[[0.0, 0, 1, 2]]])
    forecast = Forecast(torch.tensor([[[[0.5, 2.0], [9, 9]]]]), torch.tensor([[[[0.5, 1.0], [9, 9]]]]))
    points = []
    for truth, m, s in ((1, 0.5, 0.5), (2, 2.0, 1.0)):
        nll = 0.5 * ((truth - m) / s) ** 2 + math.log(s * math.sqrt(2 * math.pi))
        points.append(0.575 * nll + 0.425 * math.log(1 + 0.5 * ((truth - m) / 0.1) ** 2))
    assert float(forecasting_loss(forecast, x)) == pytest.approx(sum(points) / 2)
    mask = torch.tensor([[[True, True, False, True]]])
    assert float(forecasting_loss(forecast, x, mask)) == pytest.approx(points[1])


def test_the_schedule_rises_stays_and_falls_with_the_root_of_progress():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = toto_schedule(optimizer, 100), []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[0] == pytest.approx(0.1)
    assert rates[10:50] == [1.0] * 40
    assert rates[75] == pytest.approx(0.01 + (1 - math.sqrt(0.5)) * 0.99)
    assert 0.01 < rates[-1] < 0.03


class Fused(torch.nn.Sequential):
    """An MLP whose kernel reads the weights."""

    def forward(self, x):
        return F.linear(F.gelu(F.linear(x, self[0].weight, self[0].bias)), self[2].weight, self[2].bias)


def test_linears_that_a_fused_mlp_never_calls_are_left_out():
    one = model()
    one.blocks[1].mlp.__class__ = Fused
    with pytest.raises(ll.LoraLiteError, match=r"blocks\.\*\.mlp\.\* x2: read, not called: Fused uses its weight"):
        ll.attach(one, ll.config("lora", r=2, targets=TARGETS))
    handle = ll.attach(one, ll.config("lora", r=2))
    assert {path for path, why in handle.skipped.items() if "Fused" in why} == {"blocks.1.mlp.0", "blocks.1.mlp.2"}
    one(series())
    assert ll.status(one).dead == []


@pytest.mark.filterwarnings("ignore:1 layers are left out")  # sawtooths span fewer directions than corda asks for
@pytest.mark.parametrize("name", ll.names())
def test_the_barrier_reaches_every_variant_on_the_fused_projections_and_no_base_weight(name):
    one, cls = load_forecaster(), ll.get(name)
    settings = Forecasting(variant=name, calibration=2)
    cfg = fitting(one, settings.config(0))
    data = forecast.calibration(task("sawtooth"), settings) if cls.needs(cfg) or cls.wants(cfg) else None
    toy.perturb(ll.attach(one.train(), cfg, data))
    barrier = AttentionBarrier(alpha=0.1)
    with ll.capture(one, barrier) as seen:
        one(series())
    barrier(seen).backward()
    adapters = {f.path: f.adapter for f in finding.adapters(one)}
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters()}
    assert all(p.grad is None for p in one.parameters() if id(p) not in own)
    first = next(iter(adapters.values()))
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in first.parameters())


# --- the data ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [sinusoids, sawtooths])
def test_generated_windows_are_standardised_and_follow_their_generator(make):
    first, again = (make(torch.Generator().manual_seed(3), 4) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (4, 3, POINTS)
    assert torch.allclose(first.mean(-1), torch.zeros(4, 3), atol=1e-5)
    assert torch.allclose(first.std(-1), torch.ones(4, 3), atol=1e-5)


@pytest.mark.parametrize("name", REAL)
def test_held_out_points_are_later_than_any_training_point(name, monkeypatch):
    """A ramp in place of the series shows which points a window holds."""
    shape = REAL[name]().shape
    assert np.isfinite(REAL[name]()).all()
    monkeypatch.setitem(REAL, name, lambda: np.broadcast_to(np.arange(shape[1], dtype=float), shape))
    monkeypatch.setattr("benchmarks.forecast.data.standardised", lambda x, by: x)
    of = real(name)
    drawn = of.draw(torch.Generator().manual_seed(0), 500)
    scored = of.held_out[of.mask]
    assert drawn.max() < scored.min()
    assert scored.min() >= shape[1] - round(0.25 * shape[1])
    assert scored.max() == shape[1] - 1
    assert torch.equal(drawn[:, :, 1:] - drawn[:, :, :-1], torch.ones_like(drawn[:, :, 1:]))


def test_real_windows_are_standardised_by_their_context_alone():
    found = task("elnino").held_out
    assert torch.allclose(found[..., :CONTEXT].mean(-1), torch.zeros(found.shape[:2]), atol=1e-5)
    assert not torch.allclose(found.mean(-1), torch.zeros(found.shape[:2]), atol=1e-2)


@pytest.mark.parametrize("name", DISTURBANCES)
def test_disturbances_of_size_zero_change_nothing_and_grow_with_their_size(name):
    disturb, sizes = DISTURBANCES[name]
    x = series(8)
    moved = [float((disturb(x, size, torch.Generator().manual_seed(0)) - x).square().mean()) for size in sizes]
    assert moved[0] == 0
    assert moved == sorted(moved)
    assert moved[-1] > 0.1
    assert SHOWN[name] in sizes


# --- the base ---------------------------------------------------------------------------------------------------------


def test_the_stored_base_is_what_its_record_says():
    record = json.loads((FORECASTER / "pretrain.json").read_text())
    held_out = sinusoids(torch.Generator().manual_seed(1), 256)
    with torch.no_grad():
        one = load_forecaster()
        loss = float(forecasting_loss(one(held_out), held_out))
    assert loss == pytest.approx(record["held_out_loss"]["model"], abs=1e-3)
    assert loss < 0.5 < 2 < record["held_out_loss"]["start"]
    assert not any(p.requires_grad for p in one.parameters())


def test_pretraining_follows_its_seed():
    (first, record), (again, _) = pretrained(steps=3), pretrained(steps=3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert record["held_out_loss"]["model"] < record["held_out_loss"]["start"]


# --- a tiny run -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    out, text = tmp_path_factory.mktemp("forecast"), io.StringIO()
    return forecast.forecast([*TINY, f"out={out}"], Console(file=text, width=80)), out, text.getvalue()


def check(record):
    """Every figure is finite, and each task has its arms and seeds."""
    for name, found in record["tasks"].items():
        assert set(found["arms"]) == (set(ARMS) if name == "sawtooth" else {"none", "barrier"})
        assert found["trained"] > 0
        for run in [found["base"], *(run for runs in found["arms"].values() for run in runs)]:
            figures = [run["loss"], run["error"], run["trace"], run["trace_q95"], *itertools.chain(*run["disturbed"].values())]
            assert all(map(math.isfinite, figures))
            assert all(losses[0] == pytest.approx(run["loss"], abs=1e-5) for losses in run["disturbed"].values())
        for runs in found["arms"].values():
            assert [run["seed"] for run in runs] == list(record["settings"]["seeds"])


def test_tiny_run_writes_a_whole_record_and_shows_it(tiny):
    record, out, shown = tiny
    check(record)
    assert record["tasks"]["sawtooth"]["windows"] == [6, 3, POINTS]
    assert json.loads((out / "forecast.json").read_text()) == json.loads(json.dumps(record))
    assert (out / "forecast.png").read_bytes().startswith(b"\x89PNG")
    loss = mean([run["loss"] for run in record["tasks"]["macrodata"]["arms"]["barrier"]])
    assert f"{loss:.3f}" in shown
    assert "…" not in shown
    assert str(ROOT) not in json.dumps(record)
    assert f"{loss:.3f}" in page(record)


def test_runs_are_the_same_twice_and_seeds_differ(tiny):
    settings = Forecasting.parse(TINY, "")
    again = forecast.run_task("macrodata", settings, lambda: None)
    assert json.dumps(again) == json.dumps(tiny[0]["tasks"]["macrodata"])
    first, second = again["arms"]["none"]
    assert first["loss"] != second["loss"]


def test_a_barrier_of_weight_zero_trains_the_same_numbers():
    settings, of = Forecasting(steps=3), task("sawtooth")
    plain, zero = (forecast.train(of, b, settings, 0, lambda: None) for b in (None, AttentionBarrier(weight=0.0)))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), zero.parameters(), strict=True))


def test_the_trace_that_is_reported_is_that_of_the_definition():
    of, one = task("macrodata"), load_forecaster()
    got = forecast.score(one, of, AttentionBarrier(alpha=0.5))
    with torch.no_grad(), ll.capture(one, {"attention"}) as seen:
        out = one(of.held_out)
    traces = []
    for call in (seen.calls[i] for i in (0, 1, 3)):
        w = attention.maps(call)
        traces.append((w @ call.v.square() - (w @ call.v).square()).sum(-1))
    assert got["trace"] == pytest.approx(float(torch.stack(traces).mean()), rel=1e-4)
    assert got["beyond"] == pytest.approx(float((0.5 * torch.stack(traces) > 1).float().mean()), abs=1e-3)
    truth = of.held_out[..., CONTEXT:].unflatten(-1, (4, 8))
    assert got["error"] == pytest.approx(float((truth - out.mean[:, :, 11:15]).abs().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["taks=elnino"], "Closest name: tasks"),
        (["tasks=elnio"], "no task 'elnio'. Closest name: elnino"),
        (["barrier=0"], "A value like 0.1"),
        (["variant=lroa"], "Closest name: lora"),
        (["seeds=a"], "numbers of type int"),
    ],
)
def test_wrong_options_are_named(words, named):
    with pytest.raises(ll.LoraLiteError, match=named):
        Forecasting.parse(words, "")


def test_errors_end_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as left:
        forecast.main(["tasks=elnio"])
    assert left.value.code == 2
    assert "Closest name: elnino" in capsys.readouterr().out


# --- the committed record ---------------------------------------------------------------------------------------------


@pytest.fixture
def committed():
    return json.loads((RESULTS / "forecast.json").read_text())


def test_committed_record_is_whole_and_of_the_default_settings(committed):
    check(committed)
    defaults = json.loads(json.dumps({k: getattr(Forecasting(), k) for k in committed["settings"]}))
    assert committed["settings"] == defaults | {"seeds": [0, 1, 2, 3, 4, 5]}
    assert list(committed["tasks"]) == list(TASKS)
    assert {"python", "torch", "lora_lite"} <= set(committed["environment"])


def test_on_every_seed_the_recommended_barrier_lowers_the_trace_by_a_fifth_for_three_percent_of_loss(committed):
    arms = committed["tasks"]["sawtooth"]["arms"]
    for plain, barred in zip(arms["none"], arms["barrier"], strict=True):
        assert barred["trace"] <= 0.8 * plain["trace"]
        assert barred["loss"] <= 1.03 * plain["loss"]


def test_on_every_seed_the_originals_defaults_change_the_trace_by_less_than_a_thousandth(committed):
    arms = committed["tasks"]["sawtooth"]["arms"]
    for plain, defaults in zip(arms["none"], arms["defaults"], strict=True):
        assert 0 < abs(defaults["trace"] / plain["trace"] - 1) < 1e-3
        assert defaults["beyond"] == 0


def test_on_every_seed_a_tight_hard_barrier_leaves_ten_times_as_much_beyond_it_as_the_soft_one(committed):
    arms = committed["tasks"]["sawtooth"]["arms"]
    for hard, soft in zip(arms["tight, hard"], arms["tight, soft"], strict=True):
        assert hard["beyond"] >= 10 * soft["beyond"] > 0


def test_on_every_task_the_trace_falls_and_training_beats_the_base(committed):
    for found in committed["tasks"].values():
        for plain, barred in zip(found["arms"]["none"], found["arms"]["barrier"], strict=True):
            assert barred["trace"] < plain["trace"]
            assert max(plain["loss"], barred["loss"]) < found["base"]["loss"]
            assert max(plain["error"], barred["error"]) < found["base"]["error"]


def test_the_page_claims_no_more_than_the_record_shows(committed):
    shown = page(committed)
    assert "is not established" in shown
    runs = committed["tasks"]["macrodata"]
    assert runs["last_value_error"] < mean([run["error"] for run in runs["arms"]["none"]])
    assert "than what was trained: 1: macrodata" in " ".join(shown.split())
    for name, key, found in changes(committed):
        if key == "noise":
            runs = committed["tasks"][name]["arms"]
            first = at(committed, runs["barrier"][0], "noise") - at(committed, runs["none"][0], "noise")
            assert found["differences"][0] == pytest.approx(first)
            assert f"{found['mean']:+.3f} [" in shown
    assert (ROOT / "docs" / "forecast.md").read_text() == shown
    assert (ROOT / "docs" / "forecast.png").exists()
