"""What objectives change beside plain lora, from all paired figures of the records and not from the one that was looked for."""

from typing import Any

from benchmarks.sequential.figures import Records, span

HELPING = ("repulsion_2", "gossip_5", "gossip_12.5")
OBJECTIVES = (*HELPING, "repulsion_preset", "l1")
MEASURED = ("answer", "lead", "acc")  # of a task's lines, beside the loss of whole lines


def objective(record: dict[str, Any]) -> str:
    return record["settings"]["objective"]


def found(record: dict[str, Any]) -> list[str]:
    """The figures that differ from plain lora by the rules of statistics.py."""
    return [name for name, result in record["paired"].items() if result["finding"]]


def compared(records: Records) -> list[str]:
    """The records with a peer, the known objectives first."""
    return [*OBJECTIVES, *sorted(name for name in records.keys() - set(OBJECTIVES) if records[name]["paired"])]


def smallest(result: dict[str, Any]) -> float:
    """The p of t, or of sign flips where there is no spread."""
    return result["sign_flip_p"] if result["p"] is None else result["p"]


def findings(records: Records) -> list[tuple[str, ...]]:
    """(figure, a cell for each of `compared`): every figure that differs in any record; empty where it is no finding there."""
    columns = compared(records)
    named = {figure: None for name in columns for figure in records[name]["paired"]}
    table = []
    for figure in named:
        results = [records[name]["paired"].get(figure, {"finding": False}) for name in columns]
        if any(result["finding"] for result in results):
            table.append((figure, *(f"{r['mean']:+.4g} ({smallest(r):.1g})" if r["finding"] else "" for r in results)))
    return table


def each(records: Records, figure: str, form: str = "+.3f") -> str:
    """One figure of the helping objectives: mean, lowest to highest, and the p of t, or the larger p where it is no finding."""

    def one(name: str) -> str:
        result = records[name]["paired"][figure]
        p = smallest(result) if result["finding"] else max(smallest(result), result["sign_flip_p"])
        return f"{span(result['differences'], form)}, p = {p:.2g} ({objective(records[name])})"

    return ", ".join(map(one, HELPING))


def kept(records: Records) -> list[tuple[bool, str]]:
    """(whether it holds, sentence) on what is kept of A: through B, in the answer, through C, at the end."""
    paired = [records[name]["paired"] for name in HELPING]
    end = [f"end.A.{measure}" for measure in ("line", *MEASURED)] + ["end.intrusion"]
    answers = [f"{measure}.{metric}_a" for measure in MEASURED for metric in ("forgetting", "interference")]
    lost = [(name, figure) for name in HELPING for figure in end if records[name]["paired"][figure]["finding"]]
    return [
        (
            all(p["line.forgetting_a"]["finding"] and max(p["line.forgetting_a"]["differences"]) < 0 for p in paired),
            f"Through phase B they keep the lines of A, on every seed: line.forgetting_a {each(records, 'line.forgetting_a')}.",
        ),
        (
            not any(p[figure]["finding"] for p in paired for figure in answers),
            "Of A's answer nothing is found to be kept, neither loss nor first value nor accuracy: answer.forgetting_a "
            f"{each(records, 'answer.forgetting_a', '+.4f')}; answer.interference_a {each(records, 'answer.interference_a')}.",
        ),
        (
            all(p["line.interference_a"]["finding"] and min(p["line.interference_a"]["differences"]) > 0 for p in paired),
            f"Phase C takes it back, on every seed: line.interference_a {each(records, 'line.interference_a')}.",
        ),
        (
            not lost and all(max(p["answer.learning_a"]["differences"]) < 0 for p in paired),
            f"At the end nothing of it is left: no loss and no accuracy of A after C is a finding; end.A.line "
            f"{each(records, 'end.A.line')}. Where retention_a_c rises, A was learned less to begin with, on every seed: "
            f"answer.learning_a {each(records, 'answer.learning_a')}.",
        ),
    ]


def alone(records: Records, name: str) -> str:
    """All findings of one record with their figures."""
    paired = records[name]["paired"]
    return ", ".join(f"{figure} {paired[figure]['mean']:+.2g}" for figure in found(records[name]))
