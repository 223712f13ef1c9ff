"""What the committed records of bench-sequential show, each as a sentence with its figures and whether it holds on these."""

from statistics import fmean as mean
from typing import NamedTuple

from benchmarks.sequential.figures import Records, ends, gains, intrusions, of_metric, on_route, span
from benchmarks.sequential.findings import HELPING, OBJECTIVES, alone, found, kept

SECOND = ("B_rehearsal", "B_related", "B_strong", "N_neutral")


class Claim(NamedTuple):
    """about: which part of the page; holds: on the figures of the records; text: the sentence, with them."""

    about: str
    holds: bool
    text: str


def claims(records: Records) -> list[Claim]:
    return [
        *forgetting(records),
        *rehearsal(records),
        *ledgers(records),
        *objectives(records),
        *routes(records),
        *base(records),
    ]


def forgetting(records: Records) -> list[Claim]:
    conflict, neutral = records["conflict"], records["neutral_last"]
    acc_a, acc_c, intruded = ends(conflict, "A", "acc"), ends(conflict, "C_conflict", "acc"), intrusions(conflict)
    lead, lead_neutral = ends(conflict, "A", "lead"), ends(neutral, "A", "lead")
    line, line_neutral = ends(conflict, "A", "line"), ends(neutral, "A", "line")
    together = [min(task["acc"] for task in run["joint"]["tasks"].values()) for run in conflict["runs"]]
    return [
        Claim(
            "forgetting",
            min(acc_c) >= 0.95 and max(acc_a) <= 0.05 and min(intruded) >= 0.6,
            f"The conflicting task overwrites the first: after C acc of C is {span(acc_c)}, of A {span(acc_a)}, and intrusion "
            f"{span(intruded)}.",
        ),
        Claim(
            "forgetting",
            min(together) >= 0.95,
            f"The order does this and not the tasks: trained on all of them at once, the lowest acc is {span(together)}.",
        ),
        Claim(
            "forgetting",
            max(intrusions(neutral)) <= 0.05 and max(lead_neutral) < min(lead),
            f"A neutral last task does less: intrusion {span(intrusions(neutral))}, and the loss of A's first value ends at "
            f"{span(lead_neutral)} nats instead of {span(lead)}.",
        ),
        Claim(
            "forgetting",
            all(n > c for n, c in zip(line_neutral, line)),
            f"The loss of whole lines would say the opposite, on every seed: A's ends at {span(line_neutral)} after the "
            f"neutral task and at {span(line)} after the conflicting one, because other text disturbs the format.",
        ),
    ]


def rehearsal(records: Records) -> list[Claim]:
    found = []
    for regime, words in (("full", "lr 5e-3, 16 lines a step"), ("half", "lr 2e-3, 8 lines a step")):
        line = {task: of_metric(records[f"{regime}_{task}"], "line", "accretion_a") for task in SECOND}
        others = [line[task] for task in SECOND if task != "N_neutral"]
        ordered = all(r > b for r, b in zip(line["B_rehearsal"], line["B_related"]))
        lowest = all(n < other for n, *rest in zip(line["N_neutral"], *others) for other in rest)
        shown = ", ".join(f"{task} {span(values, '+.3f')}" for task, values in line.items())
        found.append(
            Claim(
                "rehearsal",
                ordered and lowest and min(line["B_rehearsal"]) > 0,
                f"Rehearsal helps, on every seed more than a related task, and a neutral one is the worst; accretion_a in line "
                f"loss at {words}: {shown}.",
            )
        )
    accuracy = {
        task: (ends(records[f"half_{task}"], "A", "acc", 1), ends(records[f"half_{task}"], "A", "acc")) for task in SECOND
    }
    shown = ", ".join(f"{task} {span(after)}" for task, (_, after) in accuracy.items())
    first, after = accuracy["B_rehearsal"]
    found.append(
        Claim(
            "rehearsal",
            all(b >= a for a, b in zip(first, after)) and mean(after) > mean(first) and mean(accuracy["N_neutral"][1]) < 0.5,
            f"Where A was learned in part (lr 2e-3, 8 lines a step), its acc goes from {span(first)} to: {shown}.",
        )
    )
    return found


def ledgers(records: Records) -> list[Claim]:
    long, short = records["continual_160"], records["continual_80"]
    p_before, p_after, q_after = ends(long, "P", "acc", 1), ends(long, "P", "acc"), ends(long, "Q", "acc")
    together = [min(task["acc"] for task in run["joint"]["tasks"].values()) for run in long["runs"]]
    forgot = of_metric(short, "line", "forgetting_a")
    return [
        Claim(
            "ledgers",
            min(p_before) >= 0.95 and max(p_after) <= 0.05 and min(q_after) >= 0.95 and min(together) >= 0.95,
            f"Q replaces P (160 steps): acc of P {span(p_before)} and then {span(p_after)}, of Q {span(q_after)}; trained on "
            f"both at once the lower is {span(together)}.",
        ),
        Claim(
            "ledgers",
            min(forgot) > 0.2,
            f"With 80 steps P's line loss rises by {span(forgot)} nats.",
        ),
    ]


def objectives(records: Records) -> list[Claim]:
    ranks = {name: gains(records[name], "geometry.eff_rank") for name in OBJECTIVES}
    ratios = {name: gains(records[name], "geometry.sigma_ratio") for name in HELPING}
    costs = {name: gains(records[name], "end.C_conflict.line") for name in HELPING}
    text = {name: records[name]["settings"]["objective"] for name in ranks}
    plain = mean(ends(records["conflict"], "C_conflict", "line"))
    return [
        Claim(
            "objectives",
            all(min(ranks[name]) > 0 > max(ratios[name]) for name in HELPING),
            "Repulsion and gossip flatten the spectrum on every seed: effective rank "
            + ", ".join(f"{text[name]} {span(ranks[name], '+.2f')}" for name in HELPING)
            + " above plain lora.",
        ),
        Claim(
            "objectives",
            all(0 < mean(costs[name]) < 0.1 * plain for name in HELPING),
            "It costs little of the task: the final line loss of C rises by "
            + ", ".join(f"{span(costs[name], '.4f')} ({text[name]})" for name in HELPING)
            + f" from {plain:.3f} nats.",
        ),
        Claim(
            "objectives",
            max(ranks["l1"]) < 0 and all(figure.startswith("geometry.") for figure in found(records["repulsion_preset"])),
            f"The preset of repulsion, weight .02, changes no figure of a task; its findings are "
            f"{alone(records, 'repulsion_preset')}. {text['l1']} lowers the rank ({span(ranks['l1'], '+.2f')}).",
        ),
        *(Claim("objectives", holds, text) for holds, text in kept(records)),
    ]


def routes(records: Records) -> list[Claim]:
    record, route = records["conflict"], "A+0.9B+0.25C"
    a, b, c = (of_metric(record, "answer", name) for name in ("interference_a", "interference_b", "learning_c"))
    ra, rb, rc = (
        on_route(record, route, lambda r, n=n: r["metrics"][n]) for n in ("interference_a", "interference_b", "learning_c")
    )
    names = [r["route"] for r in record["runs"][0]["routes"]]
    lower = {
        name: mean(on_route(record, name, lambda r: min(r["row"]["tasks"]["A"]["acc"], r["row"]["tasks"]["C_conflict"]["acc"])))
        for name in names
    }
    best = max(lower, key=lambda name: lower[name])
    kept = [on_route(record, route, lambda r, t=t: r["row"]["tasks"][t]["acc"]) for t in record["tasks"]]
    return [
        Claim(
            "routes",
            mean(ra) <= 0.2 * mean(a) and mean(rb) <= 0.2 * mean(b) and mean(rc) < mean(c),
            f"{route} takes back the harm of C, and nearly all of its answers: interference_a {mean(a):.3f} becomes "
            f"{mean(ra):.3f}, interference_b {mean(b):.3f} becomes {mean(rb):.3f}, learning_c {mean(c):.3f} becomes "
            f"{mean(rc):.3f}; acc of A, B, C {', '.join(f'{mean(k):.2f}' for k in kept)}.",
        ),
        Claim(
            "routes",
            max(lower.values()) < 0.8,
            f"No coefficient of C keeps both: of the {len(names)} above {best} is the best for the worse of A and C, with acc "
            f"{lower[best]:.2f}. Scaling afterwards trades one task for the other.",
        ),
    ]


def base(records: Records) -> list[Claim]:
    conflict, helped, other = (records[f"base_{name}"] for name in ("conflict", "B_rehearsal", "N_neutral"))
    acc_a, acc_c, intruded = ends(conflict, "A", "acc"), ends(conflict, "C_conflict", "acc"), intrusions(conflict)
    before, after, neutral = ends(helped, "A", "acc", 1), ends(helped, "A", "acc"), ends(other, "A", "acc")
    lead, lead_neutral = ends(conflict, "A", "lead"), ends(other, "A", "lead")
    return [
        Claim(
            "base",
            min(acc_c) >= 0.95 and max(acc_a) <= 0.05 and min(intruded) >= 0.6,
            f"The conflicting task hurts here too: after C acc of C is {span(acc_c)}, of A {span(acc_a)}, intrusion "
            f"{span(intruded)}.",
        ),
        Claim(
            "base",
            all(b > a for a, b in zip(before, after)) and all(n < a for n, a in zip(neutral, after)),
            f"Rehearsal helps where A was learned in part (20 steps): acc of A goes from {span(before)} to {span(after)}; "
            f"after the neutral task it is {span(neutral)}.",
        ),
        Claim(
            "base",
            min(lead_neutral) > max(lead),
            f"A neutral task does no less harm here: a model that had never seen such lines loses their form, and A's first "
            f"value costs {span(lead_neutral)} nats after it, {span(lead)} after the conflicting one. Intrusion alone tells "
            f"the two apart ({span(intrusions(other))}).",
        ),
    ]
