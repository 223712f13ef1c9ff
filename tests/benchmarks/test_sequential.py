"""The sequential suite: measures and metrics by hand, tiny runs of every variant, its invariants, its options and its files."""

import io
import itertools
import json
import math
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

import lora_lite as ll

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks.common import records
from benchmarks.forecast.bench import forecast
from benchmarks.sequential import bench as sequential
from benchmarks.sequential import run as sequential_run
from benchmarks.sequential.bench import parsed
from benchmarks.sequential.compose import cosines, frontier
from benchmarks.sequential.data import Words, batch
from benchmarks.sequential.measures import crossed, metrics, prepared, scores
from benchmarks.sequential.model import tier
from benchmarks.sequential.run import Plan, sequence
from benchmarks.sequential.summary import finished, good, lasting, verdict
from benchmarks.sequential.tasks import LINES, Example, contradicts, lines, order
from lora_lite.contract.registry import borrowed
from tests.oracles.kinds import daily

ABC = ("A", "B_related", "C_conflict")
TINY = ["model=tier", "steps=2", "batch=4", "lines=4", "seeds=0,1"]


def plan(tasks=ABC, objective="none", steps=2, routes=("A+B+C",), joint=False, size=4, lines=4):
    return Plan(tuple(tasks), Words(), tier(), objective, steps, size, lines, tuple(routes), joint, "cpu")


def run(name="lora", seed=0, fields=None, **options):
    return sequence(plan(**options), name, fields or {}, seed, lambda: None)


@pytest.fixture(scope="module")
def tiny():
    return run()


# --- measures ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half_trained():
    """A model that writes some answers and not others."""
    model = tier()
    handle = ll.attach(model, ll.config("lora", r=8, lr=5e-3))
    sequential_run.phase(
        model, ll.objectives.parse("none"), sequential_run.rounds(lines("A"), 16, 30), plan(size=16), lambda: None
    )
    return model, handle


def written(model, text, length):
    """What greedy decoding puts behind the prompt, token by token."""
    ids = Words().spans(Example(text).prompt).ids
    with torch.no_grad():
        for _ in range(length):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-length:]


def test_accuracy_is_that_of_greedy_decoding(half_trained):
    texts = lines("A")[:40]
    answers = [Words().spans(Example(text).answer).ids for text in texts]
    right = [written(half_trained[0], text, len(answer)) == answer for text, answer in zip(texts, answers)]
    assert 0 < sum(right) < len(texts)
    assert scores(half_trained[0], prepared(Words(), texts, "cpu"))["acc"] == sum(right) / len(texts)


def test_losses_are_those_of_a_direct_computation(half_trained):
    texts = [LINES["B_strong"](5), LINES["N_neutral"](6), LINES["A"](7)]
    line, answer, lead = [], [], []
    for text in texts:
        ids, places = Words().spans(text)
        with torch.no_grad():
            logs = half_trained[0](torch.tensor([ids])).logits[0].double().log_softmax(-1)
        example = Example(text)
        start, end = len(example.prompt), len(example.prompt) + len(example.answer)
        for t in range(1, len(ids)):
            nll = -float(logs[t - 1, ids[t]])
            line.append(nll)
            if start < places[t][1] <= end:
                answer.append(nll)
            if places[t] == example.lead:
                lead.append(nll)
    found = scores(half_trained[0], prepared(Words(), texts, "cpu"))
    assert len(lead) == 3
    for name, values in (("line", line), ("answer", answer), ("lead", lead)):
        assert found[name] == pytest.approx(sum(values) / len(values), rel=1e-5)


def test_lines_are_scored_alike_in_any_company(half_trained):
    texts = [*lines("A")[:30], *lines("B_strong")[:30]]
    together = scores(half_trained[0], prepared(Words(), texts, "cpu"))
    parts = [scores(half_trained[0], prepared(Words(), texts[k::2], "cpu")) for k in range(2)]
    assert together["lead"] == pytest.approx((parts[0]["lead"] + parts[1]["lead"]) / 2, rel=1e-5)


def test_intrusion_is_the_rivals_answer_to_the_first_tasks_prompt():
    example = Example(crossed(LINES["A"](17), LINES["C_conflict"](17)))
    assert example.prompt == "Record 0017, clan glass:"
    assert example.answer == " hue=ochre; site=Quill; post=mason; gear=chisel."


# --- metrics ----------------------------------------------------------------------------------------------------------


def rows_of(*values):
    """Rows with one number for every task, the same in every measure."""
    return [
        {"tasks": {t: dict.fromkeys(("line", "answer", "lead", "acc"), x) for t, x in zip(ABC, row)}, "intrusion": 0.0}
        for row in values
    ]


ROWS = rows_of((8.0, 7.0, 6.0), (2.0, 5.0, 5.5), (3.0, 1.0, 5.0), (4.0, 2.0, 0.5))


def test_metrics_are_their_definitions():
    assert metrics([row["tasks"] for row in ROWS], ABC, "answer") == {
        "learning_a": 6.0,
        "learning_b": 4.0,
        "learning_c": 4.5,
        "learning_b_total": 6.0,
        "forward_transfer_b": 2.0,
        "forgetting_a": 1.0,
        "accretion_a": -1.0,
        "forward_transfer_c": 1.0,
        "interference_a": 1.0,
        "interference_b": 1.0,
        "retention_a_b": 2 / 3,
        "retention_a_c": 0.5,
        "retention_b_c": 0.5,
    }


def test_metrics_of_accuracy_are_turned_round_and_have_no_retention():
    loss, accuracy = (metrics([row["tasks"] for row in ROWS], ABC, measure) for measure in ("answer", "acc"))
    assert accuracy == {name: -value for name, value in loss.items() if "retention" not in name}


def test_retention_over_nothing_is_no_number():
    rows = [row["tasks"] for row in rows_of((1, 1, 1), (1, 1, 1), (0, 1, 1), (0, 0, 1))]
    found = metrics(rows, ABC, "line")
    assert math.isnan(found["retention_a_b"])
    assert lasting(found)["retention_a_b"] is None


def test_two_phases_have_no_metric_of_a_third():
    found = metrics([row["tasks"] for row in ROWS[:3]], ABC[:2], "line")
    assert set(found) == {
        *("learning_a", "learning_b", "learning_b_total", "forward_transfer_b"),
        *("forgetting_a", "accretion_a", "retention_a_b"),
    }


def test_every_metric_says_which_way_is_better(tiny):
    for found in tiny["metrics"].values():
        assert all(good(name) in ("higher", "lower") for name in found)
    assert (good("forgetting_a"), good("accretion_a"), good("eff_rank"), good("sigma_ratio"), good("rep")) == (
        "lower",
        "higher",
        "higher",
        "lower",
        "-",
    )


def test_frontier_is_ll_frontier_of_the_metrics_of_both_sides():
    last = rows_of((3.0, 1.5, 2.0))[0]
    expected = ll.frontier(
        {"accretion_a": 2 - 3, "interference_a": 0.0, "interference_b": 0.5, "learning_b": 5 - 1.5, "learning_c": 3.0},
        {"accretion_a": 2 - 3, "interference_a": 1.0, "interference_b": 1.0, "learning_b": 4.0, "learning_c": 4.5},
    )
    assert frontier(ROWS, last, ABC) == pytest.approx(expected)
    assert frontier(ROWS, ROWS[-1], ABC) == 0


# --- invariants of runs -----------------------------------------------------------------------------------------------


def test_without_steps_nothing_changes():
    found = run(steps=0, routes=("A+0.9B+0.25C",))
    rows = [*found["rows"], found["routes"][0]["row"], found["routes"][0]["row"]]
    assert all(row == rows[0] for row in rows)
    for of in found["metrics"].values():
        assert all(value == 0 for name, value in of.items() if "retention" not in name)
    assert all(math.isnan(value) for value in found["delta_cosines"].values())
    assert set(found["zero_norms"].values()) == {12}
    assert found["geometry"]["before"] == found["geometry"]["after"]
    assert found["routes"][0]["frontier"] == 0


def test_one_seed_twice_gives_equal_tables_and_another_does_not(tiny):
    assert lasting(run()) == lasting(tiny)
    assert run(seed=1)["rows"] != tiny["rows"]


def test_accretion_is_forgetting_turned_round(tiny):
    for found in tiny["metrics"].values():
        assert found["accretion_a"] == -found["forgetting_a"]


def test_route_with_all_phases_is_the_sequence_itself(tiny):
    (route,) = tiny["routes"]
    assert route["route"] == "A+B+C"
    assert route["row"] == tiny["rows"][-1]
    assert route["metrics"] == tiny["metrics"]["answer"]
    assert route["frontier"] == 0


def test_gains_by_score_have_one_for_each_phase_and_are_reported_on_other_lines(tiny):
    assert list(tiny["oracle"]["gains"]) == ["A", "B", "C"]
    assert tiny["oracle"]["row"]["tasks"].keys() == tiny["rows"][0]["tasks"].keys()


def test_objective_of_weight_0_changes_no_bit(tiny):
    assert lasting(run(objective="gossip:0")) == lasting(tiny)


def test_objective_changes_the_training_and_is_logged(tiny):
    found = run(objective="gossip:5,tau=.1")
    assert found["rows"][0] == tiny["rows"][0]
    assert found["rows"][-1] != tiny["rows"][-1]
    assert all({"loss", "gossip"} == set(part) for part in found["training"])


@pytest.mark.parametrize("name", ll.objectives.names())
def test_every_objective_that_has_a_name_trains(name):
    found = run(objective=name, steps=1, size=2, lines=2, tasks=ABC[:2], routes=())
    terms = ll.objectives.parse(name).named
    assert all({"loss", *terms} == set(part) for part in found["training"])
    assert all(math.isfinite(value) for part in found["training"] for value in part.values())


def test_every_phase_starts_a_new_optimizer_on_one_adapter(monkeypatch):
    made, real = [], torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda groups: made.append(real(groups)) or made[-1])
    run()
    parameters = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in made]
    assert len(made) == 3
    assert parameters[0] == parameters[1] == parameters[2]


def test_lines_of_phases_come_in_their_order_and_never_from_held_out_entities(monkeypatch):
    seen = []
    monkeypatch.setattr(
        sequential_run, "batch", lambda tokens, texts, device: seen.extend(texts) or batch(tokens, texts, device)
    )
    run(steps=25, size=16, routes=())  # 400 lines of 192 entities: the walk starts again
    split = plan().split(0)
    expected = [LINES[task](i) for number, task in enumerate(ABC) for i in (order(split.train, 0, number) * 3)[:400]]
    calibration = 16 * sequential_run.CALIBRATION_BATCHES
    assert seen[calibration:] == expected
    labels = {Example(text).prompt.split()[1].rstrip(",:") for text in seen}
    assert not labels & {f"{i:04d}" for i in split.held_out}


def test_cosines_are_those_of_the_dense_changes():
    model = tier()
    ll.attach(model, ll.config("dora", r=4, lr=1e-2))
    chain, deltas = [], [{}]
    for task in ABC:
        sequential_run.phase(model, ll.objectives.parse("none"), sequential_run.rounds(lines(task), 4, 2), plan(), lambda: None)
        chain.append(ll.snapshot(model))
        deltas.append({path: ll.delta_weight(model, path).double() for path in chain[-1].layers})
    added = [{p: after[p] - before.get(p, 0) for p in after} for before, after in itertools.pairwise(deltas)]
    found, zeros = cosines(chain)
    assert set(zeros.values()) == {0}
    for (i, x), (j, y) in (((0, "a"), (1, "b")), ((0, "a"), (2, "c")), ((1, "b"), (2, "c"))):
        each = [torch.cosine_similarity(added[i][p].flatten(), added[j][p].flatten(), dim=0) for p in added[i]]
        assert found[f"delta_cosine_{x}_{y}"] == pytest.approx(float(torch.stack(each).mean()), abs=1e-4)


def test_joint_training_sees_all_tasks():
    found = run(joint=True, routes=())
    assert found["joint"]["tasks"].keys() == set(ABC)
    assert found["joint"] != found["rows"][-1]


@pytest.mark.parametrize("name", daily(ll.names(), "lora", "antipasto_ablate", "oft"))
def test_every_variant_runs_a_sequence_with_its_routes(name):
    found = run(name, steps=1, size=2, lines=2, routes=("A+0.5B+0.25C",))
    assert found["rows"][-1] != found["rows"][0]
    assert all(math.isfinite(value) for row in found["rows"] for task in row["tasks"].values() for value in task.values())
    assert len(found["delta_cosines"]) == 3
    assert found["routes"][0]["route"] == "A+0.5B+0.25C"


def test_a_variant_that_is_no_linear_map_runs_without_routes_and_cosines(tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class BentConfig(ll.RanklessConfig):
        pass

    class Bent(ll.Adapter):
        Config = BentConfig
        claims = ll.Claims(affine=False)

        @staticmethod
        def param_specs(d_in, d_out, cfg):
            return {"a": ll.ParamSpec((d_out,))}

        def forward(self, x, y, base):
            return y + self.coeff * self.a * torch.tanh(y)

    text = io.StringIO()
    with borrowed(Bent):
        record = sequential.bench(["bent", *TINY[:-1], "seeds=0", f"out={tmp_path}"], Console(file=text, width=160))
    run = record["runs"][0]
    assert run["rows"][-1] != run["rows"][0]
    assert "routes" not in run
    assert "delta_eff_rank" not in run["geometry"]["after"]
    assert "delta_eff_rank" in record["peer"]["runs"][0]["geometry"]["after"]
    assert "interference_a" in text.getvalue()


def test_a_loss_that_is_not_finite_is_named():
    with pytest.raises(ll.LoraLiteError, match="The loss is nan at step"):
        run(fields={"lr": 1e30}, steps=5)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([], "Which variant"),
        (["suite=accretion"], "Which variant"),
        (["lorra"], "Closest name: lora"),
        (["lora", "suite=accreton"], "suite=accreton is unknown.*Closest name: accretion"),
        (["lora", "objective=gosip:5"], "no objective 'gosip'.*Closest name: gossip"),
        (["lora", "phases=A,B_relatd"], "Closest name: B_related"),
        (["lora", "phases=A,Q"], "tasks of one suite"),
        (["lora", "phases=A"], "Two or three different tasks"),
        (["lora", "phases=A,A"], "Two or three different tasks"),
        (["lora", "routes=A+0.9D"], "no phase 'D'. Known: A, B, C. Terms"),
        (["lora", "routes=0.5A+B"], "stable phase 'A'"),
        (["lora", "stps=3"], "Closest name: steps"),
        (["lora", "steps=0"], "A value like 40"),
        (["lora", "joint=maybe"], "joint=maybe is unknown"),
        (["lora", "r=0"], "r=0"),
        (["lora", "seeds=a"], "numbers of type int"),
        (["lora", "seeds=0,0"], "seeds=0,0 Different seeds"),
        (["lora", "seed=1"], "Closest name: seeds"),
        (["lora", "lines=1"], "lines=1 2 or more"),
        (["lora", "coeff=0"], "coeff=0 switches the adapter off"),
        (["lora", "device=cudda"], "device=cudda cannot be used"),
        (["lora", "suite=continual", "phases=A,C_conflict"], "tasks of suite=accretion, not of suite=continual"),
    ],
)
def test_wrong_words_are_named(words, named):
    with pytest.raises(ll.LoraLiteError, match=named):
        parsed(words)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ll.LoraLiteError, match="cannot be loaded"):
        sequential.bench(["lora", f"model={tmp_path / 'none'}", f"out={tmp_path}"], Console(file=io.StringIO()))


def test_defaults_follow_the_suite_and_the_model():
    _, options, _ = parsed(["lora"])
    assert (options.phases, options.model, options.steps, options.routes[0]) == (ABC, "base", 40, "A+0.9B+0.25C")
    _, options, fields = parsed(["lora", "model=tier", "suite=continual", "batch=4", "r=2"])
    assert (options.phases, options.steps, options.batch, options.routes[0]) == (("P", "Q"), 80, 4, "A+0.25B")
    assert fields == {"r": 2}


def test_the_suite_is_that_of_the_phases():
    assert parsed(["lora", "phases=P,Q"])[1].suite == "continual"
    assert parsed(["lora", "phases=C_conflict,A"])[1].suite == "accretion"


def test_swept_rates_are_for_the_models_of_the_repository():
    assert sequential.own_rate("dora", "base") == sequential.own_rate("dora", "tier") == {}
    assert sequential.own_rate("dora", str(sequential.BASE)) == {}
    assert sequential.own_rate("dora", "elsewhere") == {"lr": ll.config("dora").lr}


@pytest.mark.parametrize("command", [sequential.bench, forecast])
def test_a_place_that_cannot_be_written_is_named_before_anything_is_trained(command, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", pytest.fail)
    (tmp_path / "file").touch()
    words = [f"out={tmp_path / 'file'}"]
    with pytest.raises(ll.LoraLiteError, match=r"out=.*file cannot be written to: File exists"):
        command([*(["lora", *TINY] if command is sequential.bench else []), *words], Console(file=io.StringIO()))


def test_plain_lora_takes_over_what_every_variant_has_and_no_rate_but_its_own():
    given = {"r": 4, "targets": ("q_proj",), "lr": 1.0, "seed": 3, "lambda0": 2}
    assert sequential.plain_fields("delora", given) == {"r": 4, "targets": ("q_proj",)}
    assert sequential.plain_fields("lora", given) == given


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written_record(tmp_path_factory):
    out, text = tmp_path_factory.mktemp("sequential"), io.StringIO()
    record = sequential.bench(["ia3", *TINY, "objective=l1:.1", f"out={out}"], Console(file=text, width=160))
    return record, out, text.getvalue()


def test_record_and_plot_are_written_and_shown(written_record):
    record, out, shown = written_record
    name = "ia3-tier-A-B_related-C_conflict-l1_.1"
    assert {path.name for path in out.iterdir()} == {f"{name}.json", f"{name}.png"}
    read = json.loads((out / f"{name}.json").read_text(), parse_constant=pytest.fail)
    assert read == json.loads(json.dumps(record))
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    for words in ("interference_a", "lower", "A+0.9B+0.25C", "eff_rank", "delta_cosine_a_b", "plain lora"):
        assert words in shown
    assert str(out) not in json.dumps(record)
    assert record["environment"]["torch"]


def test_plain_lora_without_the_objective_runs_beside(written_record):
    record, _, _ = written_record
    assert record["peer"]["variant"] == "lora"
    assert record["peer"]["runs"][0]["training"][0].keys() == {"loss"}
    assert record["runs"][0]["training"][0].keys() == {"loss", "l1"}
    alone = sequence(plan(lines=4, routes=sequential.ROUTES[3]), "lora", {}, 0, lambda: None)
    assert lasting(alone)["rows"] == record["peer"]["runs"][0]["rows"]


def test_paired_differences_are_ours_less_theirs(written_record):
    record, _, _ = written_record
    found = record["paired"]["answer.learning_a"]
    ours, theirs = ([run["metrics"]["answer"]["learning_a"] for run in of] for of in (record["runs"], record["peer"]["runs"]))
    assert found["differences"] == pytest.approx([a - b for a, b in zip(ours, theirs)], abs=1e-5)
    assert found["p"] is None


def test_too_short_a_training_gets_no_verdict(written_record):
    record, _, shown = written_record
    assert not record["verdict"]["strong"]
    assert record["verdict"]["text"].startswith("Too weak, no verdict")
    assert "Too weak, no verdict" in shown


def test_verdict_needs_a_conflict_that_hurts_plain_lora(written_record):
    record = json.loads(json.dumps(written_record[0]))
    for of in record["peer"]["runs"]:
        of["rows"][-1]["tasks"]["A"]["lead"] = of["rows"][-2]["tasks"]["A"]["lead"] + 1.5
    found = verdict(record)
    assert found["strong"]
    assert "nothing is claimed below 6 seeds" in found["text"]
    record["tasks"] = {"A": {}, "B_related": {}, "N_neutral": {}}
    assert "no verdict" in verdict(record)["text"]


@pytest.mark.parametrize(
    ("first", "last", "against"),
    [
        *(
            ("A", "C_conflict", True),
            ("C_conflict", "A", True),
            ("B_related", "C_conflict", True),
            ("C_conflict", "B_strong", True),
        ),
        *(("P", "Q", True), ("Q", "P", True)),
        *(("A", "B_rehearsal", False), ("A", "N_neutral", False), ("N_neutral", "C_conflict", False)),
    ],
)
def test_a_task_contradicts_the_first_where_it_says_what_its_rival_says(first, last, against):
    assert contradicts(last, first) == against


def test_plain_lora_alone_has_nobody_beside_it(tmp_path):
    words = ["lora", *TINY[:-1], "seeds=0", "suite=continual", "objective=gossip:0", f"out={tmp_path}"]
    record = sequential.bench(words, Console(file=io.StringIO(), width=160))
    assert record["peer"] is None
    assert record["paired"] == {}
    assert record["runs"][0]["oracle"] is None
    assert [route["route"] for route in record["runs"][0]["routes"]] == ["A+0.25B", "A+0.5B", "A+0.75B", "A+B"]
    assert finished(record) == record


def test_embedded_base_runs_by_its_bytes(tmp_path):
    words = ["lora", "steps=1", "batch=2", "lines=2", "seeds=0", "phases=P,Q", "routes=A+B", f"out={tmp_path}"]
    record = sequential.bench(words, Console(file=io.StringIO(), width=160))
    assert record["settings"]["model"] == "base"
    assert record["runs"][0]["rows"][1] != record["runs"][0]["rows"][0]


@pytest.mark.parametrize("moment", ["sequence", "plot", "write_atomically", "write_json"])
def test_ctrl_c_leaves_nothing(moment, tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(records if moment.startswith("write_") else sequential, moment, stop)
    if moment != "sequence":
        monkeypatch.setattr(
            sequential,
            "experiment",
            lambda *args: {"variant": "lora", "tasks": {}, "settings": {"model": "tier", "objective": "none"}},
        )
        monkeypatch.setattr(sequential, "plot", stop if moment == "plot" else lambda record: b"")
    with pytest.raises(SystemExit) as left:
        sequential.main(["lora", *TINY, f"out={tmp_path / 'new'}"])
    assert left.value.code == 130
    assert "no record was written" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_errors_end_without_a_traceback(capsys):
    with pytest.raises(SystemExit) as left:
        sequential.main(["lora", "suite=none"])
    assert left.value.code == 2
    assert "suite=none is unknown" in capsys.readouterr().out
