"""just bench-full: full fine-tuning with the benchmark's data, steps and schedule; the record that adapters stand beside."""

import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from benchmarks.common.places import RESULTS
from benchmarks.common.records import environment, write_json
from benchmarks.embedded.bench import progress_over
from benchmarks.embedded.report import final
from benchmarks.embedded.run import FULL, Settings, load_base, make_task, run_full, settings_json


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
