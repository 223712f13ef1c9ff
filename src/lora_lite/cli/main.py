"""python -m lora_lite list | show NAME | inspect PATH | check NAME | new NAME
| export ADAPTER FOLDER | import FOLDER FILE | merge ADAPTER FOLDER, these with --base MODEL"""

import argparse
import dataclasses
import importlib
import json
import re
import signal
import sys
from importlib import resources
from pathlib import Path

from ..contract import registry
from ..contract.strict import printable
from ..core.checkpoint import contents
from ..errors import LoraLiteError
from . import folders
from .folders import say


def list_variants(_: argparse.Namespace) -> None:
    for name in registry.names():
        print(f"{name:20} {registry.card(registry.get(name))['title'].partition(': ')[2] or registry.get(name).__name__}")


def show(arguments: argparse.Namespace) -> None:
    """The card of a variant: docstring fields, options with defaults, needed statistics."""
    cls = registry.get(arguments.name)
    card = registry.card(cls)
    print(card.pop("title"))
    for field, text in card.items():
        print(f"  {field:10} {text}")
    print("options")
    for field in dataclasses.fields(cls.Config):
        print(f"  {field.name:16} {getattr(cls.Config(), field.name)!r}")
    if needed := cls.needs(cls.Config()):
        print(f"calibration data is needed for: {', '.join(needed)}")


def inspect(arguments: argparse.Namespace) -> None:
    """What a checkpoint or a PEFT folder holds, without a model."""
    if Path(arguments.file).is_dir():
        return folders.inspect_folder(Path(arguments.file))
    file = contents(arguments.file)
    say(f"{'version':10} {file.version}")
    say(f"{'written by':10} {', '.join(f'{k} {v}' for k, v in file.versions.items())}")
    for name, one in file.adapters.items():
        say(f"{'name':10} {name}")
        say(f"{'variant':10} {one.variant}")
        say(f"{'config':10} {one.config}")
        say(f"{'tensors':10} {len(one.tensors)} on {len(one.layers)} layers")
        for key, tensor in one.tensors.items():
            say(f"  {key}  {tuple(tensor.shape)}  {str(tensor.dtype).removeprefix('torch.')}")
        for tensor in one.drawn:
            say(f"  *.{tensor}  drawn again from seed {json.loads(one.config).get('seed')}")


def check(arguments: argparse.Namespace) -> None:
    from ..testing import checks

    promises, broken = checks(arguments.name), 0
    for promise in promises:
        try:
            promise()
            print(f"  holds   {promise}")
        except Exception as error:  # whatever a variant under development raises
            broken += 1
            print(f"  BROKEN  {promise}: {type(error).__name__} {error}")
    print(f"{len(promises) - broken} of {len(promises)} promises hold")
    if broken:
        sys.exit(1)


def new(arguments: argparse.Namespace) -> None:
    """Write a variant file, its fidelity test and its review page; refuses to write over anything."""
    name = arguments.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise LoraLiteError(
            f"A variant cannot be called {name!r}.", expected="Lower-case letters, digits, underscores.", fix="new mine"
        )
    if name in registry.names():
        raise LoraLiteError(f"There is a variant {name!r} already.", fix=f"python -m lora_lite show {name}")
    places = {
        "variant.py.txt": arguments.folder / f"{name}.py",
        "test.py.txt": arguments.tests / f"test_{name}.py",
        "review.md.txt": arguments.reviews / f"{name}.md",
    }
    for place in places.values():
        if place.exists():
            raise LoraLiteError(f"{place} exists.", expected="Nothing is written over.", fix=f"rm {place}")
    words = {"name": name, "Class": "".join(part.capitalize() for part in name.split("_"))}
    at_home = arguments.folder.resolve() == Path(importlib.import_module(registry.sources[0]).__path__[0]).resolve()
    words["registers"] = "" if at_home else f"import {name}  # noqa: F401  registers the variant\n\n"
    for template, place in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text((resources.files("lora_lite") / "templates" / template).read_text().format(**words))
        print(f"wrote {place}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="lora_lite", description="Adapters for frozen PyTorch models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, *positional: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        for word in positional:
            sub.add_argument(word)
        sub.set_defaults(run=run)
        return sub

    command("list", list_variants, "names and one line of every registered variant")
    command("show", show, "formula, start, cost and options of a variant", "name")
    command("inspect", inspect, "variant, config and tensors of a checkpoint, or of a PEFT folder", "file")
    command("check", check, "run the conformance suite on a variant", "name")
    writer = command("new", new, "write a variant file, its test and its review page from templates", "name")
    writer.add_argument("--folder", type=Path, default=Path("src/lora_lite/variants"))
    writer.add_argument("--tests", type=Path, default=Path("tests/variants"))
    writer.add_argument("--reviews", type=Path, default=Path("docs/reviews"))
    exporter = command("export", folders.export, "write a checkpoint as a PEFT folder", "adapter", "folder")
    exporter.add_argument("--rank", type=int, help="plain LoRA of this rank")
    exporter.add_argument("--plain", action="store_true", help="plain LoRA also where PEFT has the method")
    exporter.add_argument("--limit", type=float, default=0.1, help="largest share of a layer's change to cut off (0.1)")
    importer = command("import", folders.load, "write a PEFT folder as a checkpoint", "folder", "file")
    importer.add_argument("--name", default="default", help="of the adapter in the checkpoint")
    merger = command("merge", folders.merged, "write the base model with the adapter in its weights", "adapter", "folder")
    merger.add_argument("--limit", type=float, help="largest share of a layer's change that rounding may lose; default: any")
    for sub in (exporter, importer, merger):
        sub.add_argument("--base", type=Path, required=True, help="folder of the base model, as transformers saves it")
        sub.add_argument("--dtype", default="auto", help="of the base model: auto (as saved), float32, bfloat16")
    for sub in (exporter, merger):
        sub.add_argument("--any-base", action="store_true", help="also on a base with other weights than those of the training")
    arguments = parser.parse_args()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the command quietly
    try:
        arguments.run(arguments)
    except LoraLiteError as error:
        print("\n".join(map(printable, f"error: {error}".split("\n"))), file=sys.stderr)
        sys.exit(2)
