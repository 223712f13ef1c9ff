"""One run of the sequential suite: phases of training with one adapter, scores after each, routes from its snapshots."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lora_lite as ll
from benchmarks.embedded.run import best_rate, fitting
from benchmarks.sequential.compose import cosines, oracle, routed
from benchmarks.sequential.data import Tokens, batch
from benchmarks.sequential.measures import MEASURES, Scored, crossed, metrics, prepared, scores
from benchmarks.sequential.tasks import ENTITIES, LINES, RIVALS, Split, order
from lora_lite.contract.registry import variant_of
from lora_lite.observe.objectives.base import Summand

CALIBRATION_BATCHES = 16
Step = Callable[[], None]


@dataclass(frozen=True)
class Plan:
    """What every run of a record shares. tasks: of the phases in order; lines: held-out ones that are scored, at most."""

    tasks: tuple[str, ...]
    tokens: Tokens
    bare: nn.Module
    objective: str
    steps: int
    batch: int
    lines: int
    routes: tuple[str, ...]
    joint: bool
    device: str

    def split(self, seed: int) -> Split:
        return Split.of(ENTITIES[self.tasks[0]], seed)

    def texts(self, task: str, entities: Sequence[int]) -> list[str]:
        return [LINES[task](i) for i in entities]

    def work(self) -> int:
        """Training steps of one run."""
        return self.steps * len(self.tasks) * (2 if self.joint else 1)


@dataclass(frozen=True)
class HeldOut:
    """Held-out lines of every task, and prompts of the first task with its rival's answer, which show an intrusion."""

    tasks: dict[str, list[Scored]]
    rival: list[Scored]

    @classmethod
    def of(cls, plan: Plan, entities: Sequence[int]) -> "HeldOut":
        rival = RIVALS.get(plan.tasks[0])
        pairs = [] if rival is None else [crossed(LINES[plan.tasks[0]](i), LINES[rival](i)) for i in entities]
        tasks = {task: prepared(plan.tokens, plan.texts(task, entities), plan.device) for task in plan.tasks}
        return cls(tasks, prepared(plan.tokens, pairs, plan.device))

    def row(self, model: nn.Module) -> dict[str, Any]:
        """{"tasks": scores of each, "intrusion": share or None}."""
        return {
            "tasks": {task: scores(model, lines) for task, lines in self.tasks.items()},
            "intrusion": scores(model, self.rival)["acc"] if self.rival else None,
        }

    def geometry(self, model: nn.Module) -> dict[str, float]:
        """Of the last task's lines."""
        return ll.geometry.measure(model, [lines.batch for lines in list(self.tasks.values())[-1]])


def rounds(texts: Sequence[str], size: int, steps: int) -> Iterator[list[str]]:
    """Batches that walk through the texts, again and again."""
    for step in range(steps):
        yield [texts[(step * size + k) % len(texts)] for k in range(size)]


def configured(name: str, fields: dict[str, Any], bare: nn.Module, seed: int) -> ll.AdapterConfig:
    """The config of a run: the rate that the variant's sweep on the embedded base found, unless one is given."""
    rate = best_rate(name)
    swept = {} if rate is None else {"lr": rate}
    return fitting(bare, ll.config(name, **{"seed": seed, **swept, **fields}))


def prepare(plan: Plan, cfg: ll.AdapterConfig, texts: Sequence[str], seed: int) -> tuple[nn.Module, Summand]:
    """(a copy of the base with a fresh adapter, the objective); what starts from data takes it from these training lines."""
    model, cls = copy.deepcopy(plan.bare), variant_of(cfg)
    objective = ll.objectives.parse(plan.objective).evaluating(seed)
    data = [batch(plan.tokens, part, plan.device) for part in rounds(texts, plan.batch, CALIBRATION_BATCHES)]
    objective.calibrate(model, data)
    ll.attach(model, cfg, data if cls.needs(cfg) or cls.wants(cfg) else None)
    return model, objective


def phase(model: nn.Module, objective: Summand, batches: Iterator[list[str]], plan: Plan, step: Step) -> dict[str, float]:
    """Train the adapter further with a new AdamW at a constant rate; mean task loss of the last tenth of the steps, and the
    objective's mean parts there."""
    optimizer = torch.optim.AdamW(ll.param_groups(model))
    history: list[dict[str, float]] = []
    model.train()
    for texts in batches:
        with ll.capture(model, objective) as seen:
            loss = model(**batch(plan.tokens, texts, plan.device)).loss
        total = loss + objective(seen)
        if not total.isfinite():
            raise ll.LoraLiteError(
                f"The loss is {total.item()} at step {len(history)}.", expected="A finite loss.", fix="a smaller lr=..."
            )
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append({"loss": loss.item(), **{name: part.item() for name, part in objective.parts.items()}})
        step()
    model.eval()
    last = history[-max(1, len(history) // 10) :]
    return {name: sum(point[name] for point in last) / len(last) for name in last[0]} if last else {}


def sequence(plan: Plan, name: str, fields: dict[str, Any], seed: int, step: Step) -> dict[str, Any]:
    """Train through the phases; the record of one run. Raises LoraLiteError for a loss that is not finite."""
    torch.manual_seed(seed)
    split = plan.split(seed)
    held = split.held_out[: plan.lines]
    scored = HeldOut.of(plan, held)
    texts = [plan.texts(task, order(split.train, seed, number)) for number, task in enumerate(plan.tasks)]
    cfg = configured(name, fields, plan.bare, seed)
    model, objective = prepare(plan, cfg, texts[0], seed)
    with ll.disabled(model):
        rows, shapes = [scored.row(model)], [scored.geometry(model)]
    chain, training = [], []
    for walk in texts:
        training.append(phase(model, objective, rounds(walk, plan.batch, plan.steps), plan, step))
        rows.append(scored.row(model))
        chain.append(ll.snapshot(model))
    shapes.append(scored.geometry(model))
    record: dict[str, Any] = {
        "seed": seed,
        "lr": cfg.lr,
        "trainable": ll.status(model).trainable,
        "rows": rows,
        "training": training,
        "geometry": {"before": shapes[0], "after": shapes[1]},
        "metrics": of_rows(rows, plan.tasks),
    }
    ll.detach(model)
    if variant_of(cfg).claims.affine:
        record["delta_cosines"], record["zero_norms"] = cosines(chain)
        record["routes"] = [routed(model, chain, route, rows, scored.row, plan.tasks) for route in plan.routes]
        select, report = (HeldOut.of(plan, part).row for part in (held[::2], held[1::2]))
        record["oracle"] = oracle(model, chain, select, report, plan.tasks) if len(chain) == 3 else None
    if plan.joint:
        record["joint"] = together(plan, cfg, texts, scored, seed, step)
    return record


def together(
    plan: Plan, cfg: ll.AdapterConfig, texts: list[list[str]], scored: HeldOut, seed: int, step: Step
) -> dict[str, Any]:
    """Scores of a fresh adapter trained on all tasks at once, for as many steps: whether they go together at all."""
    mixed = [text for walk in texts for text in walk]
    random.Random(seed).shuffle(mixed)
    model, objective = prepare(plan, cfg, mixed, seed)
    phase(model, objective, rounds(mixed, plan.batch, plan.steps * len(plan.tasks)), plan, step)
    return scored.row(model)


def of_rows(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """{measure: metrics}."""
    return {measure: metrics([row["tasks"] for row in rows], tasks, measure) for measure in MEASURES}
