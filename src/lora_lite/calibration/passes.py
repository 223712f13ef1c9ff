"""Calibration in as many passes over the data as memory asks for: where the sums of all layers would take too much of it,
groups of layers take turns. Layers that share an input stay together, since they hold one sum of it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..sites.layer import Layer, sizes
from .calls import ambient
from .losses import Loss
from .measure import LACKING, measure
from .statistics import Request, Stats, Weights, labelled, numbers, parse

SHARE = 20  # sums may take this part of what the model takes
LEAST = 2**29  # bytes that they may take beside any model


def collect(
    model: nn.Module,
    layers: dict[str, Layer],
    wanted: Iterable[str],
    data: Any,
    loss_fn: Loss | None = None,
    *,
    partly: bool = False,
) -> Stats:
    """`measure`, so that no more than a twentieth of the model's bytes (at least 512 MiB, at least one input's layers) is held.

    Within that, or for data that can be read only once, one pass; else one that sees which layers share an input, and one
    for each group when `group_init` first asks for a layer of it, which forgets the group before. Going through the layers in
    their order therefore reads the data once per group.
    """
    wanted = tuple(wanted)
    requests = [parse(name) for name in wanted]
    most = max(LEAST, sum(p.numel() * p.element_size() for p in model.parameters()) // SHARE)
    alone = sum(size_of(requests, [sizes(layer)]) for layer in layers.values())
    if alone <= most or any(isinstance(batches, Iterator) for batches in labelled(data).values()):
        return measure(model, layers, wanted, data, loss_fn, partly=partly)
    inputs: dict[int, list[str]] = {}
    tokens = [f"n{'/' * bool(r.position)}{r.position}{':' * bool(r.label)}{r.label or ''}" for r in requests]
    first = measure(model, layers, dict.fromkeys(("calls", *(tokens if partly else ()))), data, partly=partly)
    lacking: Any = first.get(LACKING, {})
    for path, count in first["calls"].items():
        if path not in lacking:
            inputs.setdefault(id(count), []).append(path)  # one tensor for one input
    groups = grouped({tuple(paths): size_of(requests, [sizes(layers[p]) for p in paths]) for paths in inputs.values()}, most)
    autocast = ambient(next(iter(layers.values())).weight.device.type)

    def run(paths: tuple[str, ...]) -> Stats:
        with autocast:  # as where the first pass ran
            return measure(model, {path: layers[path] for path in paths}, wanted, data, loss_fn, say=False)

    turns = Turns(groups, run)
    met = [path for path in layers if path not in lacking]
    columns = {name: Column(turns, name, met) for name in wanted}
    return {**columns, "weight": Weights(layers), **({LACKING: lacking} if partly else {})}


def size_of(requests: list[Request], shapes: list[tuple[int, int]]) -> int:
    """Bytes of the sums of layers of (d_in, d_out) that share one input."""
    narrow = all(i > o for i, o in shapes)
    met = [request.narrow if narrow and request.narrow else request for request in requests]
    return 8 * sum(numbers(r, *shapes[0]) if r.of_input else sum(numbers(r, i, o) for i, o in shapes) for r in met)


def grouped(sizes: Mapping[tuple[str, ...], int], most: int) -> list[tuple[str, ...]]:
    """Neighbours put together as long as they take no more than `most`."""
    groups: list[tuple[str, ...]] = []
    room = 0
    for paths, size in sizes.items():
        if groups and size <= room:
            groups[-1] += paths
        else:
            groups.append(paths)
            room = most
        room -= size
    return groups


class Turns:
    """The sums of the group of layers that was asked for last."""

    def __init__(self, groups: list[tuple[str, ...]], run: Callable[[tuple[str, ...]], Stats]):
        self.run, self.held, self.sums = run, (), {}
        self.group = {path: group for group in groups for path in group}

    def at(self, path: str) -> Stats:
        if path not in self.held:
            group = self.group[path]
            self.held, self.sums = (), {}  # forgotten before the next are made
            self.sums = self.run(group)
            self.held = group
        return self.sums


class Column(Mapping[str, Tensor]):
    """{path: sum} of one statistic."""

    def __init__(self, turns: Turns, name: str, layers: Iterable[str]):
        self.turns, self.name, self.layers = turns, name, list(layers)

    def __getitem__(self, path: str) -> Tensor:
        return self.turns.at(path)[self.name][path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)
