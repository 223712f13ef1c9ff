"""docs/sequential.md, from the committed records of bench-sequential alone."""

import textwrap
from typing import Any

from benchmarks.common.statistics import CLAIM, LEAST
from benchmarks.sequential.claims import Claim, claims
from benchmarks.sequential.figures import Records, cosines, ends, gains, mean, span
from benchmarks.sequential.findings import OBJECTIVES, compared, findings, objective
from benchmarks.sequential.measures import MEASURES
from benchmarks.sequential.summary import good
from benchmarks.sequential.tasks import ENTITIES, LINES, digest

TASKS = {
    "A": "the facts of a record",
    "B_related": "the same facts, in another kind of line",
    "B_strong": "the same, twice",
    "B_rehearsal": "the very lines of A, and a sentence",
    "C_conflict": "other facts for the same entities",
    "N_neutral": "lines with no fact of A",
    "P": "facts that follow from the last digit",
    "Q": "other values for the same keys and entities",
}
DEFINITIONS = (
    ("learning_a, learning_b, learning_c", "R0A - R1A, R1B - R2B, R2C - R3C: what a phase adds to its own task"),
    ("learning_b_total", "R0B - R2B, phase A included"),
    ("forward_transfer_b, forward_transfer_c", "R0B - R1B, R0C - R2C: what earlier phases give a task before it is trained"),
    ("forgetting_a", "R2A - R1A"),
    ("accretion_a", "R1A - R2A: what phase B adds to A"),
    ("interference_a, interference_b", "R3A - R2A, R3B - R2B: what phase C does to A and B"),
    ("retention_a_b, retention_a_c, retention_b_c", "R1A / R2A, R1A / R3A, R2B / R3B"),
)


def filled(text: str) -> str:
    return textwrap.fill(text, 125, break_long_words=False, break_on_hyphens=False)


def rows(head: tuple[str, ...], body: list[tuple[str, ...]], right: int) -> str:
    """A table whose first columns are text; the last `right` ones are figures."""
    marks = ["---"] * (len(head) - right) + ["--:"] * right
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, tuple(marks), *body))


def examples() -> str:
    lines = [(f"`{name}`", what, f"`{LINES[name](17)}`") for name, what in TASKS.items()]
    return rows(("task", "what it holds", "the line of entity 17"), lines, 0)


def definitions() -> str:
    body = [(names, text, good(names.partition(",")[0])) for names, text in DEFINITIONS]
    return rows(("metric", "definition", "better"), body, 0)


def matrix(record: dict[str, Any]) -> str:
    """Every measure of every task before and after each phase, means over the seeds."""
    tasks = list(record["tasks"])
    body = [
        (task, measure, good(measure), *(f"{mean(ends(record, task, measure, p)):.2f}" for p in range(len(tasks) + 1)))
        for task in tasks
        for measure in MEASURES
    ]
    shares = [mean([run["rows"][p]["intrusion"] for run in record["runs"]]) for p in range(len(tasks) + 1)]
    body.append(("", "intrusion", "lower", *(f"{share:.2f}" for share in shares)))
    return rows(("task", "measure", "better", "before", *(f"after {task}" for task in tasks)), body, len(tasks) + 1)


def geometry(records: Records) -> str:
    """Effective rank and sigma ratio at the end, and the paired differences to plain lora."""
    plain = records["conflict"]["runs"]
    body = [
        (
            "the base, untrained",
            *(f"{mean([run['geometry']['before'][name] for run in plain]):.2f}" for name in GEOMETRY),
            "",
            "",
        ),
        (
            "none",
            *(f"{mean([run['geometry']['after'][name] for run in plain]):.2f}" for name in GEOMETRY),
            f"{mean(ends(records['conflict'], 'C_conflict', 'line')):.4f}",
            "",
        ),
    ]
    for name in OBJECTIVES:
        record = records[name]
        body.append(
            (
                f"`{record['settings']['objective']}`",
                *(f"{mean([run['geometry']['after'][figure] for run in record['runs']]):.2f}" for figure in GEOMETRY),
                f"{mean(ends(record, 'C_conflict', 'line')):.4f}",
                span(gains(record, "geometry.eff_rank"), "+.2f"),
            )
        )
    return rows(("objective", "eff_rank", "sigma_ratio", "line loss of C", "eff_rank less plain lora"), body, 4)


GEOMETRY = ("eff_rank", "sigma_ratio")


def differing(records: Records) -> str:
    columns = [f"`{objective(records[name])}`" for name in compared(records)]
    return rows(
        ("figure", "better", *columns), [(n, good(n.split(".")[-1]), *cells) for n, *cells in findings(records)], len(columns)
    )


def routes(record: dict[str, Any]) -> str:
    names = ("interference_a", "interference_b", "learning_c")
    parts = [("the sequence itself", [{"row": run["rows"][-1], "metrics": run["metrics"]["answer"]} for run in record["runs"]])]
    parts += [
        (f"`{r['route']}`", [run["routes"][k] for run in record["runs"]]) for k, r in enumerate(record["runs"][0]["routes"])
    ]
    chosen = [run["oracle"] for run in record["runs"]]
    gained = " ".join(f"{phase} {mean([part['gains'][phase] for part in chosen]):.2f}" for phase in "ABC")
    parts.append((f"by score, on other lines: {gained}", chosen))
    body = [
        (
            name,
            *(f"{mean([part['row']['tasks'][task]['acc'] for part in found]):.2f}" for task in record["tasks"]),
            *(f"{mean([part['metrics'][metric] for part in found]):.3f}" for metric in names),
        )
        for name, found in parts
    ]
    return rows(("route", "acc A", "acc B", "acc C", *names), body, 6)


def listed(found: list[Claim], about: str) -> str:
    return "\n".join(
        textwrap.fill(
            f"{'' if claim.holds else '(does not hold) '}{claim.text}", 125, initial_indent="- ", subsequent_indent="  "
        )
        for claim in found
        if claim.about == about
    )


def conditions(record: dict[str, Any]) -> str:
    settings, runs = record["settings"], record["runs"]
    return f"lr {runs[0]['lr']:g}, {settings['steps']} steps of {settings['batch']} lines for each task, {len(runs)} seeds"


def page(records: Records) -> str:
    """The page. Raises KeyError where a record is missing: just sequential-records."""
    found, conflict, on_base = claims(records), records["conflict"], records["base_conflict"]
    where, small, real = conflict["environment"], conditions(conflict), conditions(on_base)
    hashes = filled(", ".join(f"{name} {digest(name)}" for name in TASKS))
    moved = filled(f"Cosines of the changes that the phases made: {cosines(conflict)}.")
    return f"""# Tasks that follow one another

`just bench-sequential NAME` trains one adapter on one task after the other and scores every task after each: what the
adapter learns, keeps, gains and forgets, for any variant, objective and causal language model. `just table` writes this page
from the [records](../benchmarks/results/sequential), which `just sequential-records` makes; each has the command that made it.

```
just bench-sequential lora                                # the embedded base, three seeds
just bench-sequential lora model=tier objective=gossip:5,tau=.5 seeds=0,1,2,3,4,5
just bench-sequential dora model=tier phases=A,B_rehearsal,C_conflict routes=A+0.9B+0.25C
just bench-sequential ia3 suite=continual model=FOLDER    # any causal language model that transformers loads
```

![Loss and accuracy of every task over the phases](sequential.png)

Plain lora on the embedded base, {real} (thin lines), held-out entities. A
task is trained where its panel is shaded; the third contradicts the first two. Hollow: a route, a weighted sum of snapshots.

## The tasks

{examples()}

There are {ENTITIES["A"]} entities ({ENTITIES["P"]} of P and Q) in groups that the clan, or the last digit, tells.
The prompt of a line ends with its first colon and the answer with its first full stop; an answer cannot be copied from its
line. One split by seed holds for all tasks of a suite: a quarter of the entities is scored, and no phase trains on it.
Padding is no target, and nothing marks the end of a line. SHA-256 of the files, first 16 digits:

{hashes}.

## What is measured

R[p][t] is a loss on the held-out lines of task t after phase p (0: before training), in nats: `line` of all tokens, `answer`
of the answer's, `lead` of the answer's first value, the only one that earlier ones do not imply. `acc` is the share of answers
that greedy decoding writes exactly; in metrics of `acc` every difference is turned round, so that a name keeps its meaning.
`intrusion` is the share of the first task's prompts that get exactly the answer of the conflicting task.

{definitions()}

A retention over 0 is no number. `delta_cosine_x_y` is the mean over modules of the cosine of what phases x and y added to the
weight; modules that a phase did not move are left out and counted. A phase starts a new AdamW on the same adapter, at a
constant rate: `lr` where it is given, else the one that the variant's sweep on the embedded base found, and on a model of your
own the config's. Beside every other variant, and beside lora with an objective, runs plain lora from the same seeds.

## What plain lora does

`model=tier`, r 8, scale 2, {small}. This model has 74,784 parameters and
words for tokens, and was trained on lines of all forms with words drawn independently of one another
([recipe](../benchmarks/tier/pretrain.json)): it knows the formats and no fact. In brackets lowest to highest over the seeds.

{matrix(conflict)}

{listed(found, "forgetting")}
{listed(found, "rehearsal")}
{listed(found, "ledgers")}

{moved}

## Objectives

Geometry of the hidden states of C's held-out lines after the last phase, on the same conditions.

{geometry(records)}

{listed(found, "objectives")}

Every figure that is a finding for any of them, as mean difference to plain lora and p; an empty cell is no finding.

{differing(records)}

## Routes

A route is a sum of what the phases added, made by `ll.compose` from snapshots between them. Its metrics are those of the
sequence with the route in the place of the last phase. By score: `ll.route` chooses a gain for each phase by `ll.frontier` on
half of the held-out lines, and its row is measured on the other half.

{routes(conflict)}

{listed(found, "routes")}

## On the embedded base

The default model, a pretrained one that reads bytes; lora at its swept rate: {real}.
Nothing is claimed by statistics below {CLAIM} seeds; these effects are far larger than their spread.

{matrix(on_base)}

{listed(found, "base")}

## Statistics

Runs of one seed share split, order, start and base, and are compared pair by pair: mean, sample deviation, t with n - 1
degrees of freedom, two-sided p, 95 % t interval, exact sign-flip p, and a bootstrap interval as an extra. Below {LEAST} seeds
no statistic is computed. A finding needs {CLAIM} seeds and both p below .05; the smallest sign-flip p of six seeds is .031. The
tables hold many figures, and none is corrected for their number. Percentages are given only where the baseline is positive
and above twice its standard error. Where the conflicting task adds less than 1 nat to the first value of A's answer for plain
lora, the suite is too weak and gives no verdict.

Figures of trained models move with thread count and torch version; here {where["device"]}, {where["threads"]} thread, torch
{where["torch"]}, Python {where["python"]}.
"""
