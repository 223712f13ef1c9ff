"""The tasks of the sequential suite: their very bytes, one split for all, tokens, and the small model that reads them."""

import json
import re

import pytest
import torch

import lora_lite as ll

pytest.importorskip("transformers")

from benchmarks.common.places import TIER
from benchmarks.embedded.run import Settings, load_base
from benchmarks.sequential import model as sequential_model
from benchmarks.sequential import tasks as sequential_tasks
from benchmarks.sequential.data import Pieces, Words, batch, marked, vocabulary
from benchmarks.sequential.model import formal_line, tier
from benchmarks.sequential.tasks import ENTITIES, LINES, WORDS, Example, Split, digest, lines, order

DIGESTS = {
    "A": "2d06cf1c204dfddd",
    "B_related": "32002102652d8a3a",
    "B_strong": "b22edcdf1da27cee",
    "B_rehearsal": "1420401af733690a",
    "C_conflict": "2efae4113997f21d",
    "N_neutral": "02ff41de618ceec3",
    "P": "9cf4acbbd4a300a4",
    "Q": "441122cbcde8c4e5",
}


@pytest.fixture(scope="module")
def pieces():
    return Pieces(load_base(Settings(device="cpu"))[1])


@pytest.mark.parametrize("task", LINES)
def test_lines_are_the_specified_bytes(task):
    assert digest(task) == DIGESTS[task]


def test_line_of_entity_17_reads_as_specified():
    expected = "Revised 0017, clan glass: hue=ochre; site=Quill; post=mason; gear=chisel. Seen at Quill in ochre with a chisel."
    assert LINES["C_conflict"](17) == expected


def test_conflicting_facts_differ_for_every_entity_and_the_clan_stays():
    for i in range(256):
        old, new = Example(LINES["A"](i)), Example(LINES["C_conflict"](i))
        assert not set(re.findall(r"=(\w+)", old.answer)) & set(re.findall(r"=(\w+)", new.answer))
        assert old.prompt.partition(",")[2] == new.prompt.partition(",")[2]


@pytest.mark.parametrize("task", LINES)
def test_prompt_answer_and_lead_are_parts_of_the_line_and_the_answer_is_new_to_it(task):
    for line in lines(task):
        example = Example(line)
        assert line.startswith(example.prompt + example.answer)
        assert example.prompt.endswith(":")
        assert example.answer.endswith(".")
        value = line[slice(*example.lead)]
        assert f"={value};" in example.answer
        assert value not in example.prompt


def test_one_split_serves_every_task():
    split = Split.of(256, 0)
    assert split.train[:5] == (1, 88, 132, 233, 162)
    assert split.held_out[:5] == (160, 171, 181, 102, 184)
    for seed in range(6):
        for entities in set(ENTITIES.values()):
            split = Split.of(entities, seed)
            assert sorted(split.train + split.held_out) == list(range(entities))
            assert len(split.held_out) == entities // 4


def test_order_depends_on_seed_and_phase_alone():
    train = Split.of(256, 0).train
    orders = [tuple(order(train, seed, number)) for seed in (0, 1) for number in (0, 1, 2)]
    assert len(set(orders)) == 6
    assert all(sorted(o) == sorted(train) for o in orders)
    assert order(train, 0, 1) == order(train, 0, 1)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_words_digits_and_signs_are_the_tokens_of_the_small_model():
    ids, places = Words().spans("Record 0017, clan glass: hue=cobalt;")
    words = {i: word for word, i in vocabulary().items()}
    assert [words[i] for i in ids] == "Record 0 0 1 7 , clan glass : hue = cobalt ;".split()
    assert places[0] == (0, 6)
    assert len(vocabulary()) == 141
    assert vocabulary()["<pad>"] == 0


def test_padding_is_masked_and_no_target_and_nothing_ends_a_line():
    made = batch(Words(), [LINES["N_neutral"](0), LINES["B_strong"](0)])
    short = made["attention_mask"][0] == 0
    assert short.any()
    assert not made["attention_mask"][1].eq(0).any()
    assert (made["input_ids"][0][short] == 0).all()
    assert (made["labels"][0][short] == -100).all()
    assert torch.equal(made["labels"][0][~short], made["input_ids"][0][~short])
    assert made["input_ids"][1, -1] == vocabulary()["."]


@pytest.mark.parametrize("task", LINES)
def test_marks_are_answer_and_lead_whatever_the_tokens(task, pieces):
    texts = lines(task)[15:18]
    for tokens in (Words(), pieces):
        answer, lead = marked(tokens, texts)
        ids = batch(tokens, texts)["input_ids"]
        for row, text in enumerate(texts):
            example = Example(text)
            expected = tokens.spans(text).ids[len(tokens.spans(example.prompt).ids) :][: len(tokens.spans(example.answer).ids)]
            assert ids[row][answer[row]].tolist() == expected
            assert ids[row][lead[row]].tolist() == tokens.spans(text[slice(*example.lead)]).ids


def test_slow_tokenizer_is_refused():
    with pytest.raises(ll.LoraLiteError, match="fast tokenizer"):
        Pieces(object())


# --- the small model --------------------------------------------------------------------------------------------------


def test_small_model_has_the_specified_numbers_and_the_usual_names():
    model = tier()
    assert sum(p.numel() for p in model.parameters()) == 74_784
    handle = ll.attach(model, ll.config("lora", r=8))
    assert ll.status(model).trainable == 13_824
    names = {path.rpartition(".")[2] for path in handle.layers}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert len(handle.layers) == 12


def test_small_model_is_causal_and_padding_on_the_right_changes_nothing():
    model = tier()
    text = LINES["A"](3)
    alone, padded = batch(Words(), [text]), batch(Words(), [text, LINES["B_strong"](3)])
    length = alone["input_ids"].shape[1]
    torch.testing.assert_close(model(**padded).logits[:1, :length], model(**alone).logits, atol=1e-5, rtol=1e-5)
    changed = alone["input_ids"].clone()
    changed[:, 20:] = 5
    torch.testing.assert_close(model(changed).logits[:, :20], model(**alone).logits[:, :20], atol=1e-5, rtol=1e-5)


def test_small_model_knows_the_format_and_no_fact():
    """Every value is as likely as any other of its kind; the rest of an answer follows."""
    from benchmarks.sequential.measures import prepared, scores

    model = tier()
    for task in ("A", "C_conflict"):
        found = scores(model, prepared(Words(), lines(task)[:64], "cpu"))
        assert found["lead"] == pytest.approx(torch.tensor(8.0).log().item(), abs=0.05)
        assert found["answer"] == pytest.approx(4 * found["lead"] / 16, abs=0.05)
        assert found["acc"] < 0.05


def test_formal_lines_draw_every_word_by_itself():
    import random

    draw = random.Random(1)
    made = [formal_line(draw) for _ in range(400)]
    assert {line.partition(" ")[0] for line in made} == {"Record", "Reminder", "Revised", "Relic", "Unit"}
    facts = [re.search(r"clan (\w+): hue=(\w+); site=(\w+)", line) for line in made]
    pairs = {found.groups() for found in facts if found}
    assert len(pairs) > 0.6 * sum(map(bool, facts))  # of 512 combinations; entities have 8
    rows = {(words[0], words[1], words[2]) for words in WORDS}
    assert len(pairs - rows) > 0.9 * len(pairs)


def test_record_of_the_small_model_states_its_recipe():
    record = json.loads((TIER / "pretrain.json").read_text())
    assert record["recipe"] == sequential_model.RECIPE
    assert record["parameters"] == 74_784
    import random

    others = [formal_line(random.Random(7)) for _ in range(1)] + [formal_line(random.Random(k)) for k in range(100, 227)]
    assert sequential_model.line_loss(tier(), others) == pytest.approx(record["held_out_nats_per_token"], abs=0.05)


def test_tasks_have_no_form_of_their_own():
    """What pretraining fills with random words are the forms of the tasks themselves."""
    assert set(sequential_tasks.FORMS) | {"N_neutral", "P", "Q"} == set(LINES)
