"""just bench-full: full fine-tuning with the benchmark's data, steps and schedule; the record that adapters stand beside."""

from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from benchmarks.bench_variant import progress_over
from benchmarks.report import final
from benchmarks.run import FULL, Settings, environment, load_base, make_task, run_full, settings_json, write_json

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, settings = Console(), Settings()
    bare, tokenizer = load_base(settings)
    task = make_task(settings, tokenizer, settings.seeds[0])
    base = task.evaluate(bare)
    torch.manual_seed(settings.seeds[0])
    with Progress(console=console, transient=True) as progress:
        run = run_full(settings, settings.seeds[0], progress_over(progress), bare=bare, task=task)
    record = {
        "variant": FULL,
        "metric": task.metric,
        "settings": settings_json(settings),
        "data": task.describe(),
        "environment": environment(),
        "base": base,
        "runs": [run],
    }
    write_json(RESULTS / f"{FULL}.json", record)
    console.print(f"{task.metric}: {base[task.metric]:.4f} -> {final(run)[task.metric]:.4f}")


if __name__ == "__main__":
    main()
