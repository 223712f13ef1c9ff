"""Writers that are killed, and several at one place: run in a process of its own, which forks one for every kill.

`python -m tests.oracles.killing kill JOB COUNT SEED FOLDER`, `... crowd PROCESSES ROUNDS FOLDER` and `... moments FOLDER` print
what they found.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.core import writing
from lora_lite.core.writing import new_folder, write_atomically
from lora_lite.testing import toy
from tests import ROOT

JOBS = ("save", "export", "merge")
MOMENTS = {"open": (os, "open"), "write": (os, "fdopen"), "fsync": (os, "fsync"), "replace": (os, "replace")}
MOMENTS |= {"flock": (writing.fcntl, "flock"), "sync": (writing, "sync")}
Content = bytes | dict[str, bytes] | None


def content(path: Path) -> Content:
    """Of a file, or of all files of a folder; None: there is nothing."""
    if path.is_dir():
        return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
    return path.read_bytes() if path.exists() else None


def adapted(seed: int) -> Any:
    model = toy.toy()
    toy.perturb(ll.attach(model, ll.config("lora", r=8)), seed=seed)
    next(iter(model.modules())).get_submodule("blocks.0.q_proj").default.group.lineage.id = f"{seed:032x}"
    return model


def forked(work: Callable[[int], object]) -> tuple[int, int]:
    """(process, pipe): a child that does the work, which is given the writing end of the pipe, and ends."""
    reading, ending = os.pipe()
    child = os.fork()
    if child:
        os.close(ending)
        return child, reading
    try:
        work(ending)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child: int, pipe: int) -> int:
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    return os.waitstatus_to_exitcode(status)


class Job:
    """Something that writes to `place`: prepared once, run in a child; `old` and `new` are what may stand there."""

    def __init__(self, name: str, folder: Path):
        self.name, self.place, self.rng = name, folder / "place", random.Random(0)
        self.models = [adapted(1), adapted(2)] if name != "merge" else []
        if name == "save":
            self.wanted = []
            for model in self.models:
                ll.save(model, self.place)
                self.wanted.append(content(self.place))
        elif name == "export":
            ll.export_peft(self.models[0], self.place)
            self.wanted = [content(self.place)]
        else:
            self.arguments = prepared(folder.parent / f"{folder.name}_base", self.place)
            merged(self.arguments, -1)
            self.wanted = [content(self.place)]

    def before(self) -> list[Content]:
        """Prepare the place; what may stand there if nothing of this run arrives."""
        if self.name == "save":
            return [content(self.place)]
        writing.remove(self.place)
        if self.rng.random() < 0.5:
            self.place.mkdir()
            return [{}]
        return [None]

    def run(self, pipe: int) -> None:
        if self.name == "merge":
            return merged(self.arguments, pipe)
        os.write(pipe, b".")
        if self.name == "save":
            return ll.save(self.models[content(self.place) == self.wanted[0]], self.place)
        ll.export_peft(self.models[0], self.place)


def prepared(folder: Path, place: Path) -> argparse.Namespace:
    """A model folder and a checkpoint on it, to be merged."""
    from tests.oracles.peft_cases import NAMES, qwen

    folder.mkdir()
    qwen().save_pretrained(folder / "base")
    model = qwen()
    toy.perturb(ll.attach(model, ll.config("lora", r=4, targets=NAMES[qwen])))
    ll.save(model, folder / "a")
    return argparse.Namespace(
        adapter=folder / "a", folder=place, base=folder / "base", dtype="auto", any_base=False, limit=None
    )


def merged(arguments: argparse.Namespace, pipe: int) -> None:
    """The command; says through the pipe when it begins to write."""
    from lora_lite.cli import folders

    @contextlib.contextmanager
    def announced(folder: Path) -> Iterator[Path]:
        if pipe >= 0:
            os.write(pipe, b".")
        with new_folder(folder) as place:
            yield place

    before, folders.new_folder = folders.new_folder, announced
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            folders.merged(arguments)
    finally:
        folders.new_folder = before


def killed(job: Job, after: float | None) -> tuple[int, float]:
    """(exit code, seconds from the beginning of its writing): a run in a child that is killed so many seconds later, or not."""
    child, pipe = forked(job.run)
    os.read(pipe, 1)
    started = time.perf_counter()
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    return ended(child, pipe), time.perf_counter() - started


def kill_here(name: str, count: int, seed: int, folder: Path) -> dict[str, Any]:
    job, rng = Job(name, folder), random.Random(seed)
    took = []
    for _ in range(3):
        job.before()
        code, seconds = killed(job, None)
        if code:
            raise SystemExit(f"{name} does not work")
        took.append(seconds)
    found: Counter[str] = Counter(kills=count, old=0, new=0, torn=0, left=0, cleaned=0)
    for _ in range(count):
        old = job.before()
        killed(job, rng.uniform(0, 1.5 * sorted(took)[1]))
        now = content(job.place)
        found["old" if now in old else "new" if now in job.wanted else "torn"] += 1
        found["cleaned"] += len(os.listdir(folder)) > 1
        write_atomically(folder / "next", b"next")
        os.unlink(folder / "next")
        found["left"] += bool(set(os.listdir(folder)) - {job.place.name})
    return dict(found)


def crowd_here(processes: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Every process saves, loads and exports to the same places; each writes down what became of that."""
    models = [adapted(seed) for seed in range(processes)]
    wanted = []
    for model in models:
        ll.save(model, folder / "a")
        wanted.append(content(folder / "a"))

    def work(number: int, pipe: int) -> None:
        rng, won, foreign, refused = random.Random(number), [], Counter(), 0
        fresh = toy.toy()
        for turn in range(rounds):
            for what in rng.sample(("save", "load", "export"), 3):
                try:
                    if what == "save":
                        ll.save(models[number], folder / "a")
                    elif what == "load":
                        ll.load(fresh, folder / "a").detach()
                    else:
                        ll.export_peft(models[number], folder / f"e{turn}")
                        won.append(turn)
                except ll.LoraLiteError:
                    refused += 1
                except Exception as error:
                    foreign[f"{what}: {type(error).__name__}: {error}"] += 1
        os.write(pipe, json.dumps([won, foreign, refused]).encode())

    children = [forked(lambda pipe, n=n: work(n, pipe)) for n in range(processes)]
    told = [json.loads(os.read(pipe, 2**16)) for _, pipe in children]
    for child, pipe in children:
        ended(child, pipe)
    foreign: Counter[str] = Counter()
    for _, errors, _ in told:
        foreign.update(errors)
    whole = {"adapter_config.json", "adapter_model.safetensors"}
    folders = [content(folder / f"e{turn}") for turn in range(rounds)]
    return {
        "processes": processes,
        "calls": 3 * processes * rounds,
        "refused": sum(refused for _, _, refused in told),
        "foreign": dict(foreign),
        "torn": (content(folder / "a") not in wanted) + sum(not isinstance(f, dict) or f.keys() != whole for f in folders),
        "left": sum(name.startswith(writing.BEGIN) for name in os.listdir(folder)),
        "places": rounds,
        "won": sum(Counter(turn for won, _, _ in told for turn in won)[turn] == 1 for turn in range(rounds)),
    }


def killed_at(moment: str, path: Path, new: bytes) -> None:
    """Write in a child that is killed where it comes to a call of the system."""
    owner, name = MOMENTS[moment]

    def stop(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work(_: int) -> None:
        real = getattr(owner, name)
        created = name != "open"
        setattr(owner, name, stop if created else lambda *a, **k: stop() if a[1] & os.O_CREAT else real(*a, **k))
        write_atomically(path, new)

    if (code := ended(*forked(work))) != -signal.SIGKILL:
        raise AssertionError(f"{moment}: exit code {code}")


def moments_here(folder: Path) -> dict[str, list[str]]:
    """{call of the system: [what stands at the place after a kill there, and beside it after the next writing]}."""
    found = {}
    for moment in MOMENTS:
        write_atomically(folder / "a", b"old")
        killed_at(moment, folder / "a", b"new")
        stands = (folder / "a").read_text()
        write_atomically(folder / "a", b"next")
        found[moment] = [stands, *sorted(set(os.listdir(folder)) - {"a"})]
    return found


def elsewhere(*words: object) -> dict[str, Any]:
    """What this file prints as a program, which has one thread and so may fork."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.oracles.killing", *map(str, words)]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if found.returncode:
        raise AssertionError(found.stderr)
    return json.loads(found.stdout.splitlines()[-1])


def kill(job: str, count: int, folder: Path, seed: int) -> dict[str, int]:
    """{kills, old, new, torn, left, cleaned} of a job that is killed `count` times."""
    return elsewhere("kill", job, count, seed, folder)


def moments(folder: Path) -> dict[str, list[str]]:
    return elsewhere("moments", folder)


def crowd(folder: Path, processes: int, rounds: int) -> dict[str, Any]:
    return elsewhere("crowd", processes, rounds, folder)


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "kill":
        print(json.dumps(kill_here(words[0], int(words[1]), int(words[2]), Path(words[3]))))
    elif what == "crowd":
        print(json.dumps(crowd_here(int(words[0]), int(words[1]), Path(words[2]))))
    else:
        print(json.dumps(moments_here(Path(words[0]))))
