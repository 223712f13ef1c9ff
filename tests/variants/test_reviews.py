"""The pages of the reviews and the cards say whose statement they mean: of every verdict, of every default rate and scale."""

import re
from pathlib import Path

import pytest

import lora_lite as ll
from lora_lite.contract.registry import card
from tests import ROOT

PAGES = sorted((ROOT / "docs" / "reviews").glob("*.md"))
WHOSE = {
    "paper": r"sec\.|eqs?\.|theorem|algorithm|table|proposition|app\.|\d{4}\.\d{5}|title",
    "code": r"\bcodes?\b|authors|scripts|LyCORIS|conversion",
    "PEFT": r"PEFT|peft|\bcodes\b",
    "reference": r"reference|\bits\b",
    "formula": r"\| - |follows|fact",
}
ONE = "(?:paper|code|PEFT|reference|formula)"
VERDICT = re.compile(rf"(MATCHES {ONE}(?:, {ONE})*|DEVIATES-OK)$")
SOURCES = r"PEFT's|[Pp]aper|authors'|wassname/|: ours"


def claims(page: Path) -> list[list[str]]:
    """The cells of a review's rows: number, claim, source, ours, verdict, proof."""
    lines = [line for line in page.read_text().splitlines() if re.match(r"\| *[A-Z]?\d+ *\|", line)]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_verdict_names_whose_statement_it_matches(page):
    found = claims(page)
    assert len(found) >= 8
    for number, claim, source, ours, verdict, proof in found:
        assert VERDICT.match(verdict), f"{number}: {verdict}"
        if verdict.startswith("MATCHES"):
            for who in verdict.removeprefix("MATCHES ").split(", "):
                row = f"{claim} | {source} | {ours} {proof}"
                assert re.search(WHOSE[who], row), f"{number}: nothing of {who} is cited"
                assert who in ("PEFT", "formula") or source != "-", f"{number}: no place in {who}"


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("road", "5", "2i - 1 and 2i; PEFT"),
        ("lokr", "3", "PEFT, against eq. 5; LyCORIS swaps"),
        ("delora", "5", "scalar Frobenius norm"),
        ("delora", "16", "eq. 9; the authors' code"),
        ("randlora", "9", "2 / sqrt(n); PEFT"),
        ("antipasto_rot", "8", "eq. 8"),
        ("antipasto_rot", "16", "eq. 7"),
    ],
)
def test_where_the_paper_and_a_code_differ_the_row_says_so_and_matches_neither_in_silence(name, number, words):
    row = next(row for row in claims(ROOT / "docs" / "reviews" / f"{name}.md") if row[0] == number)
    assert words in row[2]
    assert row[4] == "DEVIATES-OK"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_source_that_tells_two_statements_apart_is_a_deviation(page):
    for number, _, source, _, verdict, _ in claims(page):
        if re.search(r"(paper|eqs?\.)[^;]*: [^;]*; (PEFT|LyCORIS|codes?): ", source):
            assert verdict == "DEVIATES-OK", number


def scale(text: str, r: int | None) -> float | None:
    """The s that a card's text tells for rank r."""
    for pattern, value in (
        (r"alpha = (\d+) r\b", lambda k: float(k)),
        (r"alpha = r/(\d+)", lambda k: 1 / float(k)),
        (r"alpha = r\b", lambda: 1.0),
        (r"\bs = (\d+)\b", lambda k: float(k)),
        (r"alpha = (\d+) and rslora", lambda k: float(k) / r**0.5),
        (r"alpha = (\d+) at r = \d+", lambda k: float(k) / r),
    ):
        found = re.search(pattern, text)
        if found:
            return value(*found.groups())
    return None


@pytest.mark.parametrize("name", ll.names())
def test_a_card_names_the_source_of_the_default_rate_and_scale_and_tells_both_truly(name):
    cfg, text = ll.config(name), card(ll.get(name))["rate"]
    first = re.split(r"[;.] ", text)[0]
    assert float(re.match(r"[\d.e-]+", text)[0].rstrip(".,:")) == cfg.lr
    assert re.search(SOURCES, first), "whose rate is it?"
    if "No scale" in text:
        assert (cfg.alpha, cfg.s) == (None, 1)
    elif "lambda0" in first:
        assert float(re.search(r"lambda0 = (\d+)", first)[1]) == cfg.lambda0
    else:
        assert scale(first, cfg.r) == pytest.approx(cfg.s)
    for r in re.findall(r"\br = (\d+)", first):
        assert int(r) == cfg.r


def test_adam_moves_eva_as_far_as_its_source_does():
    assert (ll.config("eva").s, ll.config("eva").lr) == (1 / 16, 5e-4)
    assert (ll.config("loha").s, ll.config("lokr").s, ll.config("olora").s, ll.config("randlora").s) == (2, 2, 0.5, 20)


def test_no_page_calls_every_default_rate_a_published_one():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        assert not re.search(r"lr` is the published one", path.read_text()), path
