"""What the sequential suite measures, each figure by one definition, for a trained sequence and for a composed route alike.

p counts phases from 0, before training; R[p][t] is a loss on the held-out lines of task t after phase p, a b c are the tasks of
phases 1 2 3. Losses in nats; `acc` counts, so in metrics made of it every difference is turned round and keeps its meaning.

    line     mean NLL of all targets                       answer   mean NLL of the answer's tokens
    lead     NLL of the first value of the answer          acc      share of greedy continuations that equal the whole answer
    intrusion  share of the first task's prompts answered with exactly what the conflicting task says
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.sequential.data import Tokens, batch, marked
from benchmarks.sequential.tasks import Example

MEASURES = {"line": "lower", "answer": "lower", "lead": "lower", "acc": "higher"}
CHUNK = 32  # lines at once
Row = dict[str, dict[str, float]]
"""{task: {measure: value}} of one model."""


class Scored(NamedTuple):
    """Lines to score: a batch, and masks (B, T) of the tokens of answer and lead."""

    batch: dict[str, Tensor]
    answer: Tensor
    lead: Tensor


def prepared(tokens: Tokens, texts: Sequence[str], device: str) -> list[Scored]:
    parts = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
    return [Scored(batch(tokens, part, device), *(m.to(device) for m in marked(tokens, part))) for part in parts]


def crossed(text: str, other: str) -> str:
    """The prompt of one line followed by the answer of another."""
    return Example(text).prompt + Example(other).answer


@torch.no_grad()
def scores(model: nn.Module, lines: list[Scored]) -> dict[str, float]:
    """line, answer, lead, acc. One forward tells what greedy decoding does: it writes an answer where the likeliest token is
    right at each of its places, given the right ones before."""
    nats = {"line": 0.0, "answer": 0.0, "lead": 0.0}
    counts, right, seen = {"line": 0, "answer": 0}, 0, 0
    for part in lines:
        targets = part.batch["labels"][:, 1:]
        answer, lead = part.answer[:, 1:], part.lead[:, 1:]
        logits = model(input_ids=part.batch["input_ids"], attention_mask=part.batch["attention_mask"]).logits[:, :-1].float()
        nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")  # 0 where -100
        for name, mask in (("line", targets != -100), ("answer", answer), ("lead", lead)):
            nats[name] += float(nll[mask].double().sum())
        counts["line"] += int((targets != -100).sum())
        counts["answer"] += int(answer.sum())
        right += int(((logits.argmax(-1) == targets) | ~answer).all(1).sum())
        seen += len(targets)
    return {
        "line": nats["line"] / counts["line"],
        "answer": nats["answer"] / counts["answer"],
        "lead": nats["lead"] / seen,
        "acc": right / seen,
    }


def metrics(rows: Sequence[Mapping[str, Mapping[str, float]]], tasks: Sequence[str], measure: str) -> dict[str, float]:
    """Every metric of rows R[0] ... R[n] over the n = 2 or 3 tasks; retention for losses alone."""
    sign = -1.0 if measure == "acc" else 1.0

    def R(p: int, t: int) -> float:
        return sign * rows[p][tasks[t]][measure]

    a, b, c = range(3)
    found = {f"learning_{x}": R(t, t) - R(t + 1, t) for t, x in zip(range(len(tasks)), "abc")}
    found["learning_b_total"] = R(0, b) - R(2, b)
    found["forward_transfer_b"] = R(0, b) - R(1, b)
    found["forgetting_a"] = R(2, a) - R(1, a)
    found["accretion_a"] = -found["forgetting_a"]
    if len(tasks) == 3:
        found["forward_transfer_c"] = R(0, c) - R(2, c)
        found["interference_a"] = R(3, a) - R(2, a)
        found["interference_b"] = R(3, b) - R(2, b)
    if measure != "acc":
        found["retention_a_b"] = ratio(R(1, a), R(2, a))
        if len(tasks) == 3:
            found["retention_a_c"] = ratio(R(1, a), R(3, a))
            found["retention_b_c"] = ratio(R(2, b), R(3, b))
    return found


def ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
