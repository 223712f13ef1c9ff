"""Run one function in two processes joined by gloo, without a port, and never longer than a deadline."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests import ROOT


def watched(commands: list[list[str]], environments: list[dict[str, str]], seconds: float, folder: Path) -> None:
    """Run the commands side by side; the first failure or the deadline ends all. Raises AssertionError with their output."""
    logs = [folder / f"log{index}" for index in range(len(commands))]
    running = []
    try:
        for command, environment, log in zip(commands, environments, logs):
            with log.open("w") as file:
                running.append(
                    subprocess.Popen(
                        command,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
                    )
                )
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(p.poll() is None for p in running) and not any(p.poll() for p in running):
            time.sleep(0.05)
        time.sleep(1.0 if any(p.poll() for p in running) else 0.0)  # the others may have something to say as well
    finally:
        late = [p for p in running if p.poll() is None]
        for process in late:
            process.terminate()  # a launcher ends its own children
        for process in late:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if late or any(process.returncode for process in running):
        said = "\n".join(f"--- process {index}\n{log.read_text()[-4000:]}" for index, log in enumerate(logs))
        raise AssertionError(f"{len(late)} of {len(running)} processes had to be ended\n{said}")


def in_two_processes(task: str, *arguments: Any, seconds: float = 180) -> list[Any]:
    """What "module:function" returns in each process, called inside a gloo group with arguments that JSON can carry."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "tests.oracles.two_processes", name, task, json.dumps(arguments)]
        group = {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}  # nobody connects
        ranks = [{**group, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
        watched([command, command], ranks, seconds, folder)
        return [json.loads((folder / f"result{rank}").read_text()) for rank in (0, 1)]


def main(folder: str, task: str, arguments: str) -> None:
    import torch
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    module, _, function = task.partition(":")
    result = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    Path(folder, f"result{rank}").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may still run, and abort a process whose interpreter is being taken down around them


if __name__ == "__main__":
    main(*sys.argv[1:])
