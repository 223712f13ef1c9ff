"""just sweep [NAME ...]: learning rates for the embedded benchmark, one record per variant in benchmarks/results/sweep.

Every rate trains for STEPS steps of the default task and is scored on the validation modules: they belong to neither training
nor test, so that held-out text chooses nothing. Three rates first, then outwards until the best one has a worse one on both
sides. `full` sweeps full fine-tuning.
"""

import sys
from typing import Any

import transformers
from rich.console import Console

import lora_lite as ll
from benchmarks.common.places import SWEEP
from benchmarks.common.records import environment, write_json
from benchmarks.embedded.run import FULL, Settings, fitting, load_base, make_task, run_full, train_variant

STEPS = 40
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST = (1e-3, 3e-3, 1e-2)


def next_rate(scores: dict[float, float]) -> float | None:
    """The next rung to try: the first ones, then outwards while the best rate is the lowest or the highest tried."""
    for rate in FIRST:
        if rate not in scores:
            return rate
    best = LADDER.index(min(scores, key=lambda rate: scores[rate]))
    return next((LADDER[i] for i in (best - 1, best + 1) if 0 <= i < len(LADDER) and LADDER[i] not in scores), None)


def sweep(name: str, console: Console) -> dict[str, Any]:
    settings = Settings(steps=STEPS, eval_windows=64, eval_every=0)
    bare, tokenizer = load_base(settings)
    task = make_task(settings, tokenizer, seed=0, scored="validation")
    scores: dict[float, float] = {}
    with console.status(f"sweep {name}"):
        while (rate := next_rate(scores)) is not None:
            try:
                if name == FULL:
                    curve = run_full(settings, 0, lambda steps, _: steps, bare=bare, task=task, lr=rate)["curve"]
                else:
                    cfg = fitting(bare, ll.config(name, lr=rate))
                    curve = train_variant(cfg, settings, lambda steps, _: steps, bare=bare, task=task)
                scores[rate] = round(curve[-1][task.metric], 4)
            except ll.LoraLiteError as diverged:
                console.print(f"{name} at {rate:g}: {diverged}")
                scores[rate] = float("inf")
    return {
        "variant": name,
        "best": min(scores, key=lambda rate: scores[rate]),
        "validation_bits_per_byte": {f"{rate:g}": scores[rate] for rate in sorted(scores)},
        "untouched_base": round(task.evaluate(bare)[task.metric], 4),
        "steps": STEPS,
        "seeds": 1,
        "environment": environment(),
    }


def main() -> None:
    transformers.logging.set_verbosity_error()
    console = Console()
    SWEEP.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or [*ll.names(), FULL]:
        found = sweep(name, console)
        write_json(SWEEP / f"{name}.json", found)
        console.print(f"{name}: best {found['best']:g} of {found['validation_bits_per_byte']}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
