"""Pages and variant files say what is there: links, paths, names, tests, figures, fields, lengths; their code runs."""

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_lite as ll
import lora_lite.testing
import lora_lite.variants
from lora_lite.contract.registry import CARD_FIELDS, card
from lora_lite.testing import toy
from tests import ROOT

PAGES = ROOT / "docs" / "reviews"
VARIANTS = Path(lora_lite.variants.__file__).parent
FILES = sorted(p for p in VARIANTS.glob("*.py") if p.name != "__init__.py")
PLUMBING = re.compile(r"\.to\(|\.data\b|\.float\(\)|requires_grad|register_(forward|full|buffer|parameter)|\.cuda\(")


def defined_tests(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_variant_has_a_file_and_a_page_of_its_name():
    for name in ll.names():
        assert (VARIANTS / f"{name}.py").exists()
        assert (PAGES / f"{name}.md").exists()
    assert {p.stem for p in PAGES.glob("*.md")} <= set(ll.names())


@pytest.mark.parametrize("page", sorted(PAGES.glob("*.md")), ids=lambda p: p.stem)
def test_page_names_tests_that_exist_and_a_verdict_for_every_claim(page):
    text = page.read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", text)
    assert named, "no test is named"
    for path, function in named:
        assert function in defined_tests(ROOT / path if "test_contract" not in path else CONTRACT), f"{path}::{function}"
    for check in re.findall(r"\((check_\w+)\)", text):
        assert check in CHECKS, check
    claims = [line for line in text.splitlines() if re.match(r"\| *[\w.]+ *\|", line) and "claim" not in line]
    assert len(claims) >= 3
    for line in claims:
        assert re.search(r"MATCHES|DEVIATES-OK|BUG", line), line
        assert "tests/" in line, f"a claim without a test: {line}"
    for part in ("Observations", "Inference", "Verdict"):
        assert part in text


@pytest.mark.parametrize("page", ["reliability", "security"])
def test_a_page_of_promises_names_tests_that_exist(page):
    """Of a cell, `file.py::test` first and `::test` of the same file after it; files without a folder are of tests/core."""
    rows = [
        line for line in (ROOT / "docs" / f"{page}.md").read_text().splitlines() if "test_" in line and line.startswith("|")
    ]
    assert len(rows) > 8
    for row in rows:
        path = None
        for file, function in re.findall(r"`([\w/]*\.py)?(?:::(\w+))?`", row):
            path = ROOT / (file if "/" in file else f"tests/core/{file}") if file else path
            assert path is not None, row
            assert not function or function in defined_tests(path), f"{path}::{function}"


CONTRACT = Path(ll.__file__).parent / "testing" / "test_contract.py"
CHECKS = {check.__name__ for check in lora_lite.testing.CHECKS}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_variant_file_is_short_mathematics_with_every_field(path):
    text = path.read_text()
    assert 15 <= len(text.splitlines()) <= 80
    assert not PLUMBING.findall(text)
    fields = card(ll.get(path.stem))
    assert set(CARD_FIELDS) <= set(fields)
    assert all(fields[field] for field in CARD_FIELDS)
    assert re.search(r"\d{4}", fields["paper"])


def test_no_six_lines_stand_in_two_variant_files():
    seen = {}
    for path in FILES:
        body = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        for start in range(len(body) - 5):
            run = "\n".join(body[start : start + 6])
            assert seen.setdefault(run, path.stem) == path.stem, f"{path.stem} and {seen[run]} both say:\n{run}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_name_of_a_variant_stands_in_its_own_file_only(path):
    source = Path(ll.__file__).parent
    elsewhere = [
        other.relative_to(source).as_posix()
        for other in source.rglob("*.py")
        if other != path and re.search(rf"['\"]{path.stem}['\"]", other.read_text())
    ]
    # an orientation carries the name of the paper that the words come from
    orientation = {"corda": {"families/basis.py", "families/subspace.py", "variants/antipasto_corda.py"}}
    assert not set(elsewhere) - orientation.get(path.stem, set()), elsewhere


def test_generated_documents_are_fresh():
    from benchmarks.table import pages

    for path, content in pages().items():
        assert path.read_text() == content, "just table"


DOCUMENTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(r"(?<![\w/.])(?:src/lora_lite|tests|benchmarks|docs)/[\w/.-]*\w(?:/(?=`))?")


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_named_paths_lead_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.S)):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+://", link):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    made = {"src/lora_lite/variants/NAME.py", "tests/variants/test_NAME.py", "docs/reviews/NAME.md", "benchmarks/runs"}
    missing = [path for path in NAMED.findall(text) if not (ROOT / path).exists() and path not in made]
    assert not missing, missing


def test_the_contents_lead_to_every_page():
    text = (ROOT / "docs" / "README.md").read_text()
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in DOCUMENTS[2:]} - {"README.md"}
    assert {p for p in pages if not p.startswith("reviews/")} == set(re.findall(r"\]\(([\w/-]+\.md)\)", text))


def test_contribute_names_every_recipe_and_every_room():
    from docs.rooms import floor_of

    text = (ROOT / "docs" / "contribute.md").read_text()
    recipes = re.findall(r"^([a-z][\w-]*)(?: [^:=\n]*)?:(?!=)", (ROOT / "justfile").read_text(), flags=re.MULTILINE)
    assert set(recipes) - {"default"} == set(re.findall(r"^\| `just ([\w-]+)", text, flags=re.MULTILINE))
    assert set(floor_of) - {"lora_lite", "templates", "errors", "version"} == set(
        re.findall(r"\| `(\w+)` \|$", text, flags=re.MULTILINE)
    )


def test_table_lists_every_variant_and_its_record():
    from benchmarks.table import record, row

    page = (ROOT / "docs" / "variants.md").read_text()
    for name in ll.names():
        assert row(name) in page
        assert record(name) is not None, f"just bench-variant {name} out=benchmarks/results && just table"


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.o_proj = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        return self.o_proj(torch.tanh(self.q_proj(x)) * self.v_proj(x))


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)


def test_the_first_block_of_the_readme_runs_and_learns_what_the_page_says(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    first, whole = blocks("README.md")
    assert len(first.splitlines()) <= 12
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    (tmp_path / "LICENSE").symlink_to(ROOT / "LICENSE")
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "first"}
    exec(first, names)
    assert capsys.readouterr().out.startswith("loss: 0.0")
    model, text = names["model"], names["text"]
    with torch.no_grad():
        after = model(text, labels=text).loss
        with ll.disabled(model):
            before = model(text, labels=text).loss
    told = re.search(r"loss falls from (\d\.\d\d) to (\d\.\d\d)", (ROOT / "README.md").read_text())
    assert told.groups() == (f"{before:.2f}", f"{after:.2f}")
    assert whole in {p.read_text() for p in FILES}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 105


def test_examples_of_everyday_use_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, later, which, several, data = blocks("docs/use.md")
    names = {"torch": torch, "model": toy.seeded(Attention), "x": toy.inputs(3, 5, 24)}
    exec(train, names)
    names |= {"model": toy.seeded(Attention), "batches": [(toy.inputs(4, 6, 24),)]}
    exec(later, names)
    exec(which, names)
    exec(several, names)
    exec(data, names)
    assert len(ll.status(names["model"]).layers) == 3


def test_the_changelog_counts_the_variants():
    words = {11: "Eleven", 25: "Twenty-five", 26: "Twenty-six", 27: "Twenty-seven"}
    assert f"- {words[len(ll.names())]} variants" in (ROOT / "CHANGELOG.md").read_text()
