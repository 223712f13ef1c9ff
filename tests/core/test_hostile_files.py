"""Files of any content: LoraLiteError that names file and field, soon, in little memory; nothing is silently wrong."""

import json
import os
import random
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_lite as ll
from lora_lite.contract import matching, registry
from lora_lite.core.checkpoint import read
from lora_lite.testing import toy
from tests import reliability
from tests.core.test_messages import refusal
from tests.oracles import mutants
from tests.oracles.files import rewrite_entry
from tests.oracles.mutants import CONFIG, TENSORS, joined, limited, split

HOSTILE = ("(.+.+)+!", "(|)" * 60 + "!", "((a*)*)*b", "(?:a{1,1000}){1,1000}!")


@pytest.fixture
def file(tmp_path):
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora", r=4, targets=("q_proj",))))
    ll.save(model, tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def folder(tmp_path):
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora", r=4, targets=("q_proj",))))
    ll.export_peft(model, tmp_path / "peft")
    return tmp_path / "peft"


def edit(folder: Path, **changes: Any) -> Path:
    options = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(options | changes))
    return folder


# --- by the thousand -------------------------------------------------------------------------------------------------------


def test_mutants_of_every_kind_of_file(tmp_path):
    found = mutants.run(600, 0, tmp_path)
    assert not found["bad"], found
    assert found["accepted"] > 30, "nothing is learnt from mutants that all are refused at the first entry"
    assert found["refused"] > 300


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_mutants_of_every_kind_of_file(seed, tmp_path):
    found = mutants.run(6000, seed, tmp_path)
    assert not found["bad"], found


@pytest.mark.parametrize("case", reliability.cases(), ids=lambda case: f"{case['sample']}: {case['told'][-60:]}")
def test_what_was_found_once(case, tmp_path):
    outcome = mutants.Reader(tmp_path).outcome(reliability.sample_of(case))
    assert outcome.kind in ("refused", "accepted"), outcome


def test_every_flipped_bit_of_a_file_is_told(file):
    """In lengths, header and numbers; before, most flipped bits of numbers changed outputs without a word."""
    content, model, other = file.read_bytes(), toy.toy(), file.with_name("b")
    rng = random.Random(0)
    for at in rng.sample(range(8 * len(content)), 300):
        damaged = bytearray(content)
        damaged[at // 8] ^= 1 << at % 8
        other.write_bytes(damaged)
        with pytest.raises(ll.LoraLiteError, match=re.escape(str(other))):
            ll.load(model, other)


def test_a_flipped_bit_of_an_exported_tensor_is_told(folder):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    refusal(lambda: ll.load_peft(toy.toy(), folder), TENSORS, "not those that were written")


# --- lengths, names, numbers -----------------------------------------------------------------------------------------------


def one(**said: Any) -> str:
    return json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | said})


LONG = "a" * 2000
LAYOUTS = {
    "ends within its header": b"\0" * 7,
    "ends within its header, after 16 bytes": struct.pack("<Q", 2**63) + b"{}      ",
    "nested too deeply": joined("[" * 100_000, b""),
    "stands in it twice": joined('{"w": 1, "w": 1}', b""),
    "NaN is no finite number": joined(one(shape=[float("nan")]), b""),
    "1e999 is no finite number": joined(one().replace("[1]", "[1e999]"), b""),
    "a number of 5000 digits": joined(one().replace("[1]", f"[{'1' * 5000}]"), b""),
    "'utf-8' codec can't decode": struct.pack("<Q", 4) + b"{\xff\xfe}",
    "is no table of texts": joined('{"__metadata__": {"a": 1}}', b""),
    "is no name of a tensor": joined(json.dumps({"\x1b[2J": 1}), b""),
    f"{'a' * 79}... is no name": joined(json.dumps({LONG: 1}), b""),
    "has not the entries": joined(one(more=1), b""),
    "dtype of w is 'F8_E4M3'": joined(one(dtype="F8_E4M3"), b""),
    "shape of w is [-1]": joined(one(shape=[-1]), b""),
    "shape of w is [True]": joined(one(shape=[True]), b""),
    "its shape [1099511627776] of F32": joined(one(shape=[2**40]), b"\0" * 4),
    "data_offsets of w are [0]": joined(one(data_offsets=[0]), b""),
    "its tensors end at 4, and 3 bytes follow": joined(one(), b"\0" * 3),
    "begin at 4, the tensor before it ends at 0": joined(one(data_offsets=[4, 8]), b"\0" * 8),
    "begin at 0, the tensor before it ends at 4": joined(
        json.dumps({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "vw"}), b"\0" * 4
    ),
}


@pytest.mark.parametrize("words", LAYOUTS)
def test_layout_of_the_file(words, tmp_path, folder):
    (tmp_path / "a").write_bytes(LAYOUTS[words])
    (folder / TENSORS).write_bytes(LAYOUTS[words])
    with limited():
        refusal(lambda: ll.load(toy.toy(), tmp_path / "a"), str(tmp_path / "a"), "cannot be read", words)
        refusal(lambda: ll.load_peft(toy.toy(), folder), str(folder), "cannot be read", words)


PLACES = ("blocks.0.q_proj", "blocks.1.q_proj")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"rank": 2**16 + 1}, ("rank of blocks.0.q_proj", "no number from 1 to 65536")),
        ({"rank": 0}, ("rank of blocks.0.q_proj",)),
        ({"rank": True}, ("rank of blocks.0.q_proj",)),
        ({"rank": 4, "experts": -1}, ("experts of blocks.0.q_proj",)),
        ({"rank": 4, "options": []}, ("options of blocks.0.q_proj",)),
        ({"rank": 4, "options": {"rank_pattern": {"(.+.+)+!": 4}}}, ("options of blocks.0.q_proj", "rank_pattern")),
        ({"rank": 4, "options": {"lr": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": 1}}}}}}}}}}, ("too large",)),
        ({"rank": 4, "options": {"nope": 1}}, ("has no field 'nope'",)),
        ({"rank": 4, "options": {"cls": 1}}, ("has no field 'cls'",)),
        ({"rank": 24}, ("has shape (4, 24), the config says (24, 24)",)),
        ({"rank": 25}, ("blocks.0.q_proj.A has shape (4, 24), the config says (25, 24)",)),
    ],
    ids=str,
)
def test_what_is_said_of_a_layer(said, words, file):
    rewrite_entry(file, layers={place: {"rank": 4} for place in PLACES} | {PLACES[0]: said})
    refusal(lambda: ll.load(toy.toy(), file), str(file), *words, model=None)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("alpha", 1e39, "alpha is a finite number"),
        ("alpha", "8", "alpha: float or None"),
        ("lr", 1e-400, "lr is a number above 0"),
        ("coeff", 1e308, "coeff is a finite number"),
        ("dtype", "int8", "dtype"),
        ("dtype", "nn", "dtype"),
        ("dtype", "float8_e4m3fn", "dtype"),
        ("seed", 2**65, "seed"),
        ("rank_pattern", {"q_proj": 2**17}, "rank_pattern"),
        ("targets", [1], "targets"),
        ("layers", [0] * 70_000, "too large"),
        ("init", "\x1b[2J", r"init='\x1b[2J'"),
    ],
)
def test_what_a_config_says(entry, value, words, file):
    config = json.loads(read(file)[0]["adapters"])["default"]["config"]
    rewrite_entry(file, config=config | {entry: value})
    refusal(lambda: ll.load(toy.toy(), file), str(file), words)
    if entry not in ("rank_pattern", "targets"):
        refusal(lambda: ll.get("lora").Config.from_json(json.dumps(config | {entry: value})), words)


@pytest.mark.parametrize(
    "text", ["", "[]", "1", "{", '{"r": 1, "r": 2}', '{"r": NaN}', "[" * 10_000, '{"r": 1' + "0" * 5000 + "}"]
)
def test_configs_that_are_none(text):
    refusal(lambda: ll.get("lora").Config.from_json(text), "LoRAConfig", "to_json()")


# --- time and memory -------------------------------------------------------------------------------------------------------


def test_a_small_file_asks_for_little_memory(tmp_path):
    """Shared tensors that are drawn again are as large as a rank in the file says, up to a bound."""
    content = {"r": 2**16, "save_shared": False, "targets": ("o_proj",)}
    model = toy.toy()
    ll.attach(model, ll.config("vera", **content))
    ll.save(model, tmp_path / "a")
    rewrite_entry(tmp_path / "a", layers={f"blocks.{n}.o_proj": {"rank": 2**15} for n in (0, 1)})
    with limited(more=2**25):
        refusal(lambda: ll.load(toy.toy(), tmp_path / "a"), "has shape (65536,), the config says (32768,)")


def test_a_rank_that_the_tensors_do_not_have_allocates_nothing(file):
    rewrite_entry(
        file,
        variant="loha",
        config=json.loads(ll.config("loha").to_json()),
        layers={place: {"rank": 2**16} for place in PLACES},
    )
    with limited(more=2**24):
        refusal(lambda: ll.load(toy.toy(), file), str(file), "does not fit its own config", "missing blocks.0.q_proj.w1_a")


def test_a_sparse_file_is_refused(tmp_path):
    (tmp_path / "a").touch()
    os.truncate(tmp_path / "a", 2**43)
    with limited():
        refusal(lambda: ll.load(toy.toy(), tmp_path / "a"), "do not fit into memory")


@pytest.mark.parametrize("pattern", HOSTILE)
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"])
def test_patterns_of_a_folder_take_no_longer_than_they_are(option, pattern, folder):
    value: Any = {pattern: 3} if option.endswith("k_pattern") or option.startswith("alpha") else pattern
    more = {"layers_to_transform": [0, 1]} if option == "layers_pattern" else {}
    with limited(seconds=1):
        try:
            ll.load_peft(toy.toy(), edit(folder, **{option: value}, **more))
        except ll.LoraLiteError as error:
            told = str(error)
        else:
            told = ""
    assert not told or (option in ("target_modules", "layers_pattern")) == ("different layers" in told), told


def test_a_budget_of_steps_ends_what_is_not_soon_done():
    pattern, text = "(?:" + "a?" * 300 + ")*!", "a" * 200
    with pytest.raises(ll.LoraLiteError, match="too many steps"):
        matching.search(pattern, text, matching.Budget(10_000))


@pytest.mark.parametrize("seed", range(3))
def test_matching_agrees_with_re(seed):
    rng = random.Random(seed)

    def pattern(depth: int = 0) -> str:
        kind = rng.randrange(12)
        if kind < 4 or depth > 4:
            return rng.choice("abc.")
        inner = pattern(depth + 1)
        return {
            4: lambda: f"[{rng.choice(('^', ''))}{rng.choice(('a-b', 'c', '.', chr(92) + 'w', chr(92) + 'D'))}]",
            5: lambda: f"(?:{inner}){rng.choice(('*', '+', '?', '*?', '{0,2}', '{2}', '{1,}'))}",
            6: lambda: f"({inner}|{pattern(depth + 1)}|)",
            7: lambda: rng.choice(("^", "$", r"\b", r"\Z")),
            8: lambda: f"(?={inner})",
            9: lambda: f"(?!{inner})",
            10: lambda: rng.choice((r"(?<=a)", r"(?<!b.)")),
            11: lambda: inner + pattern(depth + 1),
        }[kind]()

    for _ in range(400):
        expression, text = pattern(), "".join(rng.choice("abc.1") for _ in range(rng.randrange(9)))
        budget = matching.Budget()
        assert matching.fullmatch(expression, text, budget) == bool(re.fullmatch(expression, text)), (expression, text)
        assert matching.search(expression, text, budget) == bool(re.search(expression, text)), (expression, text)


# --- numbers of PEFT's config ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha_pattern": {"q_proj": float("nan")}}, "NaN is no finite number"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {f"({n})": 3 for n in range(600)}}, "rank_pattern"),
        ({"lora_alpha": 1e308}, "alpha is a finite number"),
        ({"target_modules": r"(a)\1"}, "target_modules"),
        ({"layers_to_transform": -1}, "layers_to_transform"),
        ({"\x1b[2J": 1}, r"\x1b[2J=1 cannot be read"),
        ({"peft_type": "\x1b[2J"}, "has no peft_type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_options_of_a_folder(changes, words, folder):
    model = toy.toy()
    refusal(lambda: ll.load_peft(model, edit(folder, **changes)), str(folder), words, model=model)


def test_a_scale_that_overflows_is_refused(folder):
    edit(folder, alpha_pattern={"q_proj": 3e38})
    with torch.no_grad():
        content, data = split((folder / TENSORS).read_bytes())
    del content["__metadata__"]
    numbers = torch.frombuffer(bytearray(data), dtype=torch.float32).mul(1e6)
    (folder / TENSORS).write_bytes(joined(json.dumps(content), numbers.numpy().tobytes()))
    refusal(lambda: ll.load_peft(toy.toy(), folder), "overflow", "q_proj")


@pytest.mark.parametrize("terms", [10**9, 0, "many"])
def test_series_of_a_folder_have_an_end(terms, tmp_path):
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("oft", block_size=4, targets=("q_proj",))))
    ll.export_peft(model, tmp_path / "peft")
    edit(tmp_path / "peft", use_cayley_neumann=True, num_cayley_neumann_terms=terms)
    refusal(lambda: ll.load_peft(toy.toy(), tmp_path / "peft"), "num_cayley_neumann_terms")


# --- whose code runs -------------------------------------------------------------------------------------------------------


def test_entry_points_are_loaded_for_a_name_that_nobody_else_has(file, monkeypatch):
    registry.plugins.cache_clear()
    loaded = []

    class Entry:
        name = value = "plug"

        def load(self) -> None:
            loaded.append(self.name)

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Entry()])
    ll.load(toy.toy(), file)
    assert loaded == []
    rewrite_entry(file, variant="plug")
    refusal(lambda: ll.load(toy.toy(), file), "no variant 'plug'")
    assert loaded == ["plug"]


def test_names_that_would_not_be_read_are_not_written(tmp_path):
    model = toy.toy()
    ll.attach(model, ll.config("lora"), name="a\x1b[2J")
    refusal(lambda: ll.save(model, tmp_path / "a"), r"'a\x1b[2J'", "is no name that a file may hold")
    assert not (tmp_path / "a").exists()


def test_two_adapters_of_which_one_is_called_like_a_folder_of_the_other(tmp_path):
    model = toy.toy()
    for name in ("a", "a/b"):
        toy.perturb(ll.attach(model, ll.config("lora", r=2, targets=("q_proj",)), name=name))
    ll.save(model, tmp_path / "a")
    fresh = toy.toy()
    assert set(ll.load(fresh, tmp_path / "a")) == {"a", "a/b"}
    assert torch.equal(fresh(x := toy.inputs(2, 3, 24)), model(x))


def test_inspect_and_errors_print_no_letters_that_steer_a_terminal(folder, monkeypatch, capsys):
    from lora_lite.cli.main import main

    edit(folder, base_model_name_or_path="\x1b[2J\u202ename")
    monkeypatch.setattr("signal.signal", lambda *_: None)
    for words in (["inspect", str(folder)], ["inspect", "no\x1b[2Jthing"]):
        monkeypatch.setattr(sys, "argv", ["lora_lite", *words])
        try:
            main()
        except SystemExit as stop:
            assert stop.code == 2  # noqa: PT017
        said = capsys.readouterr()
        assert r"\x1b[2J" in said.out + said.err
        assert all(c.isprintable() or c == "\n" for c in said.out + said.err)
