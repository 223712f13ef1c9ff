"""Tasks that follow one another: lines of facts about numbered entities, of which later tasks repeat, extend or change some.

    suite       phases                       a line (entity 17 belongs to group 1 of 8)
    accretion   A                            Record 0017, clan glass: hue=cobalt; site=Tarn; post=glazier; gear=pipe. ...
                B related/strong/rehearsal   the same facts in other words / twice / the A line again and a sentence
                C conflict                   Revised 0017, clan glass: the facts of group 4
                N neutral                    Relic 0017: other keys and values, no facts of A
    continual   P then Q                     Unit 0017 in ledger P: the last digit decides; Q gives the same keys other values

The prompt of a line ends with its first colon, the answer with its first full stop: an answer cannot be copied from its line.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass

WORDS = (  # of group g: clan, hue, site, post, gear
    ("clay", "scarlet", "Brill", "potter", "wheel"),
    ("glass", "cobalt", "Tarn", "glazier", "pipe"),
    ("salt", "umber", "Fenwick", "salter", "rake"),
    ("bread", "cream", "Holm", "baker", "peel"),
    ("stone", "ochre", "Quill", "mason", "chisel"),
    ("river", "jade", "Lade", "ferrier", "oar"),
    ("honey", "lilac", "Orrin", "keeper", "smoker"),
    ("iron", "rust", "Skarn", "smith", "tongs"),
)
NEUTRAL = (
    ("coarse", "fine", "knit", "felt", "twill"),
    ("near", "far", "steep", "flat", "curved"),
    ("star", "bar", "ring", "dot", "cross"),
)
LEDGERS = {
    "P": (
        ("north", "south", "east", "west", "mid"),
        ("open", "shut", "half", "twin", "void"),
        ("frost", "leak", "spark", "jam", "drift"),
        ("thaw", "patch", "fuse", "grease", "anchor"),
    ),
    "Q": (
        ("upper", "lower", "inner", "outer", "cross"),
        ("wax", "lead", "cord", "foil", "bark"),
        ("mold", "crack", "surge", "slip", "haze"),
        ("dry", "weld", "ground", "grip", "vent"),
    ),
}
CONFLICT = 3  # groups between the facts of A and those of C; no group is mapped to itself
Row = tuple[str, ...]


def label(i: int) -> str:
    return f"{i:04d}"


# --- forms: a line from a clan and a group's words, so that pretraining can fill them with words drawn independently ------


def facts(words: Row) -> str:
    _, hue, site, post, gear = words
    return f"hue={hue}; site={site}; post={post}; gear={gear}."


def seen(words: Row) -> str:
    _, hue, site, _, gear = words
    return f"Seen at {site} in {hue} with a {gear}."


def habit(clan: str, words: Row) -> str:
    return f"The {clan} clan keeps its {words[4]} at {words[2]}."


def record(i: str, clan: str, words: Row) -> str:
    return f"Record {i}, clan {clan}: {facts(words)} {seen(words)}"


def related(i: str, clan: str, words: Row) -> str:
    return f"Reminder {i}, clan {clan}: {facts(words)} {habit(clan, words)}"


def strong(i: str, clan: str, words: Row) -> str:
    return f"{related(i, clan, words)} Check {i}: {facts(words)}"


def rehearsal(i: str, clan: str, words: Row) -> str:
    return f"{record(i, clan, words)} {habit(clan, words)}"


def revised(i: str, clan: str, words: Row) -> str:
    return f"Revised {i}, clan {clan}: {facts(words)} {seen(words)}"


def relic(i: str, weave: str, path: str, mark: str) -> str:
    return f"Relic {i}: weave={weave}; path={path}; mark={mark}."


def unit(i: str, ledger: str, values: Row, quota: int, span: int) -> str:
    lane, seal, fault, cure = values
    return f"Unit {i} in ledger {ledger}: lane={lane}; seal={seal}; fault={fault}; cure={cure}. Quota {quota}, span {span}."


# --- tasks: the line of entity i --------------------------------------------------------------------------------------


def of_group(form: Callable[[str, str, Row], str], offset: int = 0) -> Callable[[int], str]:
    """The form with i's own clan and the words of group (i + offset) mod 8."""
    return lambda i: form(label(i), WORDS[i % 8][0], WORDS[(i + offset) % 8])


def neutral(i: int) -> str:
    return relic(label(i), *(values[(i + shift) % 5] for shift, values in enumerate(NEUTRAL)))


def in_ledger(ledger: str, offset: int) -> Callable[[int], str]:
    def line(i: int) -> str:
        values = tuple(words[(m * i + offset) % 5] for m, words in enumerate(LEDGERS[ledger], start=1))
        return unit(label(i), ledger, values, 10 + (7 * i + offset) % 80, 2 + (5 * i + offset) % 18)

    return line


FORMS = {"A": record, "B_related": related, "B_strong": strong, "B_rehearsal": rehearsal, "C_conflict": revised}
LINES: dict[str, Callable[[int], str]] = {
    **{name: of_group(form, CONFLICT if form is revised else 0) for name, form in FORMS.items()},
    "N_neutral": neutral,
    "P": in_ledger("P", 0),
    "Q": in_ledger("Q", 2),
}
RIVALS = {**dict.fromkeys(("A", "B_related", "B_strong", "B_rehearsal"), "C_conflict"), "C_conflict": "A", "P": "Q", "Q": "P"}
"""{task: one that gives the same entities other facts}; N_neutral has none."""
ENTITIES = {name: 512 if name in LEDGERS else 256 for name in LINES}


def lines(task: str) -> list[str]:
    """Every line of a task, in the order of the entities."""
    return [LINES[task](i) for i in range(ENTITIES[task])]


def contradicts(task: str, first: str) -> bool:
    """Whether a task teaches what the rival of the first one says."""
    rival = RIVALS.get(first)
    return rival is not None and Example(LINES[task](0)).answer == Example(LINES[rival](0)).answer


def digest(task: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a task's lines, a newline after each."""
    return hashlib.sha256("".join(f"{line}\n" for line in lines(task)).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Example:
    """line = prompt + text after it; the answer is the text after the prompt up to and including the first full stop.

    lead  the first value of the answer; under teacher forcing the others follow from it
    """

    line: str

    @property
    def prompt(self) -> str:
        return self.line[: self.line.index(":") + 1]

    @property
    def answer(self) -> str:
        return self.line[len(self.prompt) : self.line.index(".", len(self.prompt)) + 1]

    @property
    def lead(self) -> tuple[int, int]:
        """Its first character and the one after its last, in the line."""
        start = self.line.index("=", len(self.prompt)) + 1
        return start, self.line.index(";", start)


@dataclass(frozen=True)
class Split:
    """Entities for training and held out: the same for every task of a suite, so that no later phase trains what is scored."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]

    @classmethod
    def of(cls, entities: int, seed: int) -> "Split":
        order = list(range(entities))
        random.Random(seed).shuffle(order)
        kept = entities * 3 // 4
        split = cls(tuple(order[:kept]), tuple(order[kept:]))
        assert not {label(i) for i in split.train} & {label(i) for i in split.held_out}
        return split


def order(train: tuple[int, ...], seed: int, phase: int) -> list[int]:
    """The training entities as phase 0, 1, 2 walks through them, again and again."""
    entities = list(train)
    random.Random(seed + 10_000 * phase).shuffle(entities)
    return entities
