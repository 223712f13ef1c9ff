"""Checkpoints with other contents than `ll.save` wrote: a header entry, an entry of an adapter, or tensors changed."""

import json

from lora_lite.core.checkpoint import checksum, read, serialized, write_atomically


def rewrite(path, tensors=None, *, without=(), **entries):
    """The same file with other tensors and their checksum, header entries exchanged, those in `without` gone."""
    header, held = read(path)
    if tensors is not None and "checksum" in header:
        header["checksum"] = checksum(tensors)
    header = {entry: text for entry, text in (header | entries).items() if entry not in without}
    write_atomically(path, serialized(held if tensors is None else tensors, header))


def entry(path):
    """What the header says of the only adapter of a file."""
    (found,) = json.loads(read(path)[0]["adapters"]).values()
    return found


def rewrite_entry(path, *, without=(), **changes):
    """The same file with other entries of its only adapter; those in `without` gone."""
    ((name, found),) = json.loads(read(path)[0]["adapters"]).items()
    kept = {key: value for key, value in (found | changes).items() if key not in without}
    rewrite(path, adapters=json.dumps({name: kept}))


def own(path, name="default"):
    """The tensors of one adapter, without its name."""
    return {key.removeprefix(f"{name}/"): t for key, t in read(path)[1].items() if key.startswith(f"{name}/")}
