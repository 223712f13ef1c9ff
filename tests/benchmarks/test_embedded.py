"""The embedded benchmark: its text and split, its base model, its report, and the hub protocol on small local files."""

import json
import lzma
import math
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from rich.console import Console

import lora_lite as ll

pytest.importorskip("transformers")
pytest.importorskip("typer")

from benchmarks.common import records, text
from benchmarks.embedded import bench as bench_variant
from benchmarks.embedded import report
from benchmarks.embedded.run import (
    BASE,
    FULL,
    SWEEP,
    Settings,
    best_rate,
    fitting,
    learning_rate,
    load_base,
    make_task,
    run_full,
    run_variant,
    settings_json,
)
from benchmarks.embedded.tasks import Code, Math, final_number
from tests import ROOT
from tests.oracles.kinds import daily

QUICK = Settings(steps=4, batch=2, window=64, eval_windows=4, eval_every=2, calibration_batches=4)


@pytest.fixture(scope="module")
def base():
    """(bare model, tokenizer) of the embedded base."""
    return load_base(QUICK)


def silent(steps, label):
    return steps


# --- text -------------------------------------------------------------------------------------------------------------


def test_split_follows_from_the_name_alone():
    assert text.part_of("json.decoder") == text.part_of("json.decoder")
    parts = {part: set(text.code(part)) for part in ("train", "validation", "test")}
    assert not parts["train"] & parts["validation"] | parts["train"] & parts["test"] | parts["validation"] & parts["test"]
    sizes = {part: len(names) for part, names in parts.items()}
    assert 0.05 < sizes["test"] / sum(sizes.values()) < 0.2
    assert all(text.is_held_out(name) for name in parts["test"])


def test_held_out_prose_and_code_come_from_the_same_modules():
    prose = {name for name in text.prose(held_out=True) if not name.startswith("topic ")}
    assert prose <= set(text.code("test"))
    assert not set(text.prose(held_out=True)) & set(text.prose(held_out=False))


def test_paragraphs_of_the_held_out_prose_are_taken_out_of_training():
    held_out = {"a": "x" * 50 + "\n\nshort"}
    known: set[str] = set()
    text.without_paragraphs(held_out, known)
    kept = text.without_paragraphs({"b": "y" * 50 + "\n\n" + "x" * 50 + "\n\nshort", "c": "y" * 50}, known)
    assert kept == {"b": "y" * 50 + "\n\nshort"}


def test_docstrings_are_those_of_modules_classes_and_functions():
    source = '"""Module ' + "m" * 40 + '"""\nclass A:\n    """Class ' + "c" * 40 + '"""\n    def f(self):\n        "short"\n'
    assert text.docstrings(source).split("\n\n") == ["Module " + "m" * 40, "Class " + "c" * 40]


# --- base model -------------------------------------------------------------------------------------------------------


def test_tokens_of_the_embedded_base_are_bytes(base):
    tokenizer = base[1]
    passage = "naïve\n\tcode = 'ü'\x00"
    assert tokenizer(passage, add_special_tokens=False).input_ids == list(passage.encode())
    assert tokenizer.decode(list(passage.encode())) == passage


def test_embedded_base_beats_general_compressors_on_held_out_prose(base):
    """On the text of the running Python, which may differ from that of the record."""
    from benchmarks.embedded.pretrain import bits_per_byte

    held_out = text.joined(text.prose(held_out=True))
    part = held_out[::1][len(held_out) // 2 : len(held_out) // 2 + 30_000]
    model = bits_per_byte(base[0], part, 256)
    assert model < 8 * len(lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)) / len(held_out) - 0.3
    assert model < 8 * len(zlib.compress(held_out, 9)) / len(held_out) - 0.5


def test_record_of_the_embedded_base_states_its_recipe_and_beats_both():
    from benchmarks.embedded.pretrain import RECIPE

    record = json.loads((BASE / "pretrain.json").read_text())
    assert record["recipe"] == RECIPE
    assert 2.5e6 < record["parameters"] < 3e6
    scores = record["held_out_bits_per_byte"]
    assert scores["model"] < scores["lzma -9e"] < scores["zlib -9"]
    log = [json.loads(line) for line in (BASE / "pretrain.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == RECIPE["steps"]
    assert log[-1]["train_bits_per_byte"] < log[0]["train_bits_per_byte"]


def test_pretraining_batches_depend_on_the_step_alone():
    from benchmarks.embedded.pretrain import RECIPE, draw

    streams = [torch.arange(5000) % 256, torch.arange(7000) % 251]
    assert torch.equal(draw(streams, 7), draw(streams, 7))
    assert not torch.equal(draw(streams, 7), draw(streams, 8))
    assert draw(streams, 7).shape == (RECIPE["batch"], RECIPE["window"])


# --- runs -------------------------------------------------------------------------------------------------------------


def test_code_task_is_a_function_of_seed_and_step(base):
    task, same, other = (make_task(QUICK, base[1], seed) for seed in (0, 0, 1))
    assert torch.equal(task.batch(3)["input_ids"], same.batch(3)["input_ids"])
    assert not torch.equal(task.batch(3)["input_ids"], task.batch(4)["input_ids"])
    assert not torch.equal(task.batch(3)["input_ids"], other.batch(3)["input_ids"])
    assert task.batch(0)["input_ids"].shape == (2, 64)


def test_scores_are_those_of_a_direct_computation(base):
    model, tokenizer = base
    task = make_task(QUICK, tokenizer, 0)
    rows, bytes_per_token = task.windows["code"]
    assert bytes_per_token == 1
    logits = model(input_ids=rows[:, :-1]).logits.double().log_softmax(-1)
    nats = -logits.gather(-1, rows[:, 1:, None]).mean()
    scores = task.evaluate(model)
    assert math.isclose(scores["code_bits_per_byte"], float(nats) / math.log(2), rel_tol=1e-5)
    assert 0 < scores["code_accuracy"] < 1


@pytest.mark.parametrize("name", daily(ll.names(), "lora", "antipasto_ablate", "oft"))
def test_every_variant_runs_and_keeps_its_promises(base, name):
    bare, tokenizer = base
    before = [p.clone() for p in bare.parameters()]
    run = run_variant(name, {}, QUICK, 0, silent, bare=bare, task=make_task(QUICK, tokenizer, 0))
    assert [point["step"] for point in run["curve"]] == [2, 4]
    assert all(run["fidelity"][key] == 0 for key in report.EXACT)
    assert run["fidelity"]["merge"] < 1e-4
    if "amplification" in run["fidelity"]:
        assert run["fidelity"]["amplification"] <= 1 + 1e-6
    if "orthogonality_error" in run["fidelity"]:
        assert run["fidelity"]["orthogonality_error"] < 1e-5
    if "rank" in run["fidelity"]:
        assert run["fidelity"]["rank"] <= run["fidelity"]["rank_claimed"]
    assert run["cost"]["trainable"] > 0
    assert all(map(torch.equal, before, bare.parameters()))


def test_same_seed_gives_the_same_numbers(base):
    bare, tokenizer = base
    runs = [run_variant("lora", {"r": 2}, QUICK, 5, silent, bare=bare, task=make_task(QUICK, tokenizer, 5)) for _ in range(2)]
    assert runs[0]["curve"] == runs[1]["curve"]


def test_embedded_base_is_known_by_any_spelling_of_its_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    for spelling in ("benchmarks/base", "./benchmarks/../benchmarks/base", str(BASE)):
        settings = Settings(model=spelling)
        assert learning_rate("lora", settings) == {"lr": best_rate("lora")}
        assert settings_json(settings)["model"] == "benchmarks/base"
    assert learning_rate("lora", Settings(model="elsewhere")) == {}


def test_full_fine_tuning_runs_on_a_copy(base):
    bare, tokenizer = base
    before = [p.clone() for p in bare.parameters()]
    curve = run_full(QUICK, 0, silent, bare=bare, task=make_task(QUICK, tokenizer, 0))["curve"]
    assert len(curve) == 2
    assert all(map(torch.equal, before, bare.parameters()))


def test_default_rank_is_lowered_to_what_the_base_allows_and_a_given_one_is_not(base):
    bare, _ = base
    assert fitting(bare, ll.config("antipasto")).r == 96
    assert fitting(bare, ll.config("antipasto_ablate")).r == 192
    assert fitting(bare, ll.config("antipasto", r=100)).r == 100
    assert fitting(bare, ll.config("lora")).r == ll.config("lora").r
    assert fitting(bare, ll.config("ia3")).r is None


def test_every_variant_has_a_swept_rate_and_a_record_that_beats_the_base():
    """The committed records; test data chose nothing, so a rate need not be the best on it."""
    lora = full = None
    for name in [*ll.names(), FULL]:
        missing = [p for p in (SWEEP / f"{name}.json", SWEEP.parent / f"{name}.json") if not p.exists()]
        assert not missing, f"just sweep {name} && just bench-variant {name} out=benchmarks/results"
        swept = json.loads((SWEEP / f"{name}.json").read_text())
        assert swept["best"] == best_rate(name) == float(min(swept["validation_bits_per_byte"].items(), key=lambda i: i[1])[0])
        record = json.loads((SWEEP.parent / f"{name}.json").read_text())
        (run,) = record["runs"]
        assert run["config"]["lr"] == swept["best"]
        gained = record["base"]["code_bits_per_byte"] - report.final(run)["code_bits_per_byte"]
        assert gained > 0, name
        lora, full = (gained if name == n else v for n, v in (("lora", lora), (FULL, full)))
    assert lora is not None
    assert full is not None
    assert lora >= 0.5 * full, "lora closes less than half of the gap that full fine-tuning closes"


# --- report and command line ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A real record of two seeds with lora beside, and the folder it was written to."""
    folder = tmp_path_factory.mktemp("runs")
    words = ["steps=2", "batch=2", "window=64", "eval_windows=2", "seeds=0,1", "calibration_batches=2", f"out={folder}"]
    return bench_variant.bench("ia3", words), folder


def test_record_table_and_plot_say_what_happened(record):
    made, folder = record
    assert json.loads((folder / "ia3.json").read_text()) == json.loads(json.dumps(made))
    assert (folder / "ia3.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in folder.iterdir()) == ["ia3.json", "ia3.png"]
    assert made["settings"]["model"] == "benchmarks/base"
    console = Console(width=120, record=True, file=open("/dev/null", "w"))
    report.show(made, console)
    shown = console.export_text()
    for words in ("untouched base", "code, bits per byte", "forgetting", "paired difference to lora", "bit for bit", "±"):
        assert words in shown
    console.file.close()


def test_paired_comparison_is_the_mean_of_the_differences_by_seed(record):
    made, _ = record
    ours, theirs = ([report.final(r)["code_bits_per_byte"] for r in runs] for runs in (made["runs"], made["peer"]["runs"]))
    assert made["paired"]["against"] == "lora"
    assert math.isclose(made["paired"]["mean"], sum(a - b for a, b in zip(ours, theirs)) / 2, abs_tol=1e-12)
    assert report.paired({**made, "peer": None}) is None


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["stpes=3"], "Closest name: steps"),
        (["steps"], "written key=value"),
        (["steps=0"], "above 0"),
        (["steps=many"], "above 0"),
        (["lr=-1"], "above 0"),
        (["seeds=a"], "Integers"),
        (["dropout=0.1"], "no option"),
    ],
)
def test_wrong_options_are_named(words, named):
    with pytest.raises(ll.LoraLiteError, match=named):
        bench_variant.parse(words, ll.get("lora"))


def test_options_go_to_the_run_or_to_the_config():
    settings, config, out = bench_variant.parse(["steps=7", "r=4", "targets=o_proj,q_proj", "seeds=3", "out=x"], ll.get("lora"))
    assert (settings.steps, settings.seeds, out) == (7, (3,), Path("x"))
    assert ll.config("lora", **config).targets == ("o_proj", "q_proj")


def test_command_line_names_the_fault_without_a_traceback():
    words = [sys.executable, "-m", "benchmarks", "lroa"]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert "Closest name: lora" in run.stdout
    assert "Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("lora", "r=0"), "r=0"),
        (("ia3", "r=4"), "would be ignored"),
        (("lora", "device=nowhere"), "device=nowhere cannot be used"),
        (("lora", f"out={__file__}"), "cannot be written to"),
    ],
)
def test_wrong_config_ends_before_anything_is_loaded(words, named, capsys, monkeypatch):
    monkeypatch.setattr(bench_variant, "load_base", lambda settings: pytest.fail("the base was loaded"))
    with pytest.raises(SystemExit) as left:
        bench_variant.main(words[0], list(words[1:]))
    assert left.value.code == 2
    assert named in capsys.readouterr().out


def test_models_and_data_that_are_not_there(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as left:
        bench_variant.main("lora", [f"model={tmp_path / 'nowhere'}"])
    assert left.value.code == 2
    assert "cannot be loaded" in capsys.readouterr().out
    with pytest.raises(ll.LoraLiteError, match="nowhere cannot be loaded"):
        Math(base[1], 0, 2, 100, str(tmp_path / "nowhere")).batch(0)


@pytest.mark.parametrize("moment", ["training", *(pytest.param(m, marks=pytest.mark.long) for m in ("plot", "write_json"))])
def test_interrupted_run_leaves_no_record(moment, tmp_path, capsys, monkeypatch):
    batch, calls = Code.batch, []

    def interrupting(self, step):
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return batch(self, step)

    def interrupted(*args):
        calls.append(args)
        raise KeyboardInterrupt

    place, stop = {
        "training": ((Code, "batch"), interrupting),
        "plot": ((report, "plot"), interrupted),
        "write_json": ((records, "write_json"), interrupted),
    }[moment]
    monkeypatch.setattr(*place, stop)
    steps = "steps=50" if moment == "training" else "steps=1"
    with pytest.raises(SystemExit) as left:
        bench_variant.main("lora", [steps, "eval_windows=2", "batch=1", "window=32", f"out={tmp_path / 'runs'}"])
    assert calls
    assert left.value.code == 130
    assert "no record was written" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == (["lora.png"] if moment == "write_json" else [])


# --- the hub's protocol on local files --------------------------------------------------------------------------------


def test_final_number_of_answers():
    assert final_number("so 3 + 4 = 7.\n#### 7") == "7"
    assert final_number("The answer is: $1,200.50") == "1200.5"
    assert final_number("The answer is -3") == "-3"
    assert final_number("no idea") is None


@pytest.fixture
def math_folders(tmp_path):
    """Two folders in the format of MetaMathQA and GSM8K."""
    train, test = tmp_path / "metamath", tmp_path / "gsm8k"
    train.mkdir()
    test.mkdir()
    rows = [
        {"query": f"What is {n} + 1?", "response": f"It is {n + 1}.\nThe answer is: {n + 1}", "type": "GSM"} for n in range(9)
    ]
    (train / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    questions = [{"question": f"{n}+1?", "answer": f"#### {n + 1}"} for n in range(3)]
    (test / "test.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    return train, test


def test_math_protocol_trains_on_the_answers_only_and_scores_exact_match(base, math_folders, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    bare, tokenizer = base
    train, test = map(str, math_folders)
    task = Math(tokenizer, 0, 2, 400, train, test, None, new_tokens=4)
    batch = task.batch(0)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
    learnt = batch["labels"][0][batch["labels"][0] >= 0]
    assert tokenizer.decode(learnt[:-1]).startswith("It is")
    assert int(learnt[-1]) == tokenizer.eos_token_id
    prompt = batch["input_ids"][0][: int((batch["labels"][0] >= 0).nonzero()[0])]
    assert tokenizer.decode(prompt).endswith("### Response: ")
    assert 0 <= task.evaluate(bare)["exact_match"] <= 1
    settings = Settings(task="math", steps=2, batch=2, window=400, eval_every=0, train_data=train, test_data=test)
    run = run_variant("lora", {"r": 2}, settings, 0, silent, bare=bare, task=task)
    assert "exact_match" in report.final(run)


def test_sweep_walks_outwards_until_the_best_rate_has_a_worse_one_on_both_sides():
    from benchmarks.embedded.sweep import LADDER, next_rate

    for best in LADDER:
        scores: dict[float, float] = {}
        while (rate := next_rate(scores)) is not None:
            scores[rate] = abs(LADDER.index(rate) - LADDER.index(best))
        assert min(scores, key=scores.__getitem__) == best
        around = LADDER[max(0, LADDER.index(best) - 1) : LADDER.index(best) + 2]
        assert set(around) <= set(scores)
