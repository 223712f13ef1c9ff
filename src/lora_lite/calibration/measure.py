"""measure: stream calibration data through the base model and add up the statistics that statistics.py names.

Activations are never kept: every call's share is added and forgotten.
"""

import warnings
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from torch import nn

from ..errors import LoraLiteError, LoraLiteWarning, some
from ..sites.layer import Layer, sizes
from ..sites.quantised import as_stored, keep_trainable
from .batches import is_empty, named, place, told, unread, with_padding
from .calls import call, evaluating, of_this_thread, on_device
from .losses import Loss, Losses, backward
from .norms import Norms
from .positions import Positions
from .recorder import Recorder
from .scopes import Scopes
from .statistics import Stats, Weights, labelled, parse

LACKING = "lacking"
"""Of what `measure` returns with partly=True: {path: the error about what the data did not give that layer}."""


def measure(
    model: nn.Module,
    layers: dict[str, Layer],
    wanted: Iterable[str],
    data: Any,
    loss_fn: Loss | None = None,
    *,
    partly: bool = False,
    say: bool = True,
) -> Stats:
    """Stream the data once through the base model; {name: {path: sum}} in float64 for the wanted statistics.

    data     batches, or {"positive": batches, "negative": batches}; a batch is a mapping (whose attention_mask drops padding),
             a tuple or list, by the names of the forward, or a tensor. Those without a row are skipped
    loss_fn  (model, batch) -> scalar or (mean, number of its terms), for wgrad; None: see `default_loss`
    partly   layers that were not called with a token that counts are named under "lacking", unless all are
    say      warn of padding that counts, and of batches that are skipped
    Calls of the model in other threads do not count. Raises LoraLiteError, naming batch and layer, for no batches, a batch that
    the model does not take, a layer that was never called, non-finite activations or gradients, a mask that belongs to no
    tensor of the batch, and a loss without a gradient.
    """
    requests = {name: parse(name) for name in wanted}
    parts = labelled(data)
    for name, request in requests.items():
        if request.label is not None and request.label not in parts:
            raise LoraLiteError(
                f"The statistic {name} needs labelled calibration data.",
                found="The batches carry no labels.",
                fix='calibration_data={"positive": batches, "negative": other_batches}',
            )
    gradients = any(request.statistic == "wgrad" for request in requests.values())
    losses, positions = Losses(loss_fn), Positions(model, loss_fn is None)
    norms = Norms(model, layers.values()) if "norm" in requests else None
    scopes = Scopes(model, layers, {request.position for request in requests.values()})
    recorder = Recorder(requests, scopes, norms.saw if norms else None)
    handles: list[Any] = [
        layer.register_forward_hook(
            of_this_thread(partial(recorder.hook, path, layers[path]), also=recorder.repeats), with_kwargs=True
        )
        for path, layer in layers.items()
    ]
    handles += [scopes, *([norms] if norms else []), *keep_trainable(model)]
    unclear: dict[str, None] = {}  # what may be padding and is not read as such
    skipped: list[str] = []

    def run(label: str | None, index: int, batch: Any) -> bool:
        recorder.idle = True
        batch = on_device(model, batch)
        fields = named(model, batch)
        if is_empty(fields):
            skipped.append(place(label, index))
            return False
        known = with_padding(model, fields)
        batch = positions.complete(batch, fields, known.get("attention_mask") if isinstance(known, Mapping) else None)
        recorder.begin(label, known)
        unclear.update(dict.fromkeys(unread(known, scopes.streams)))
        if gradients:
            loss, terms = losses(model, batch, known)
            recorder.weigh(terms)
            backward(loss)
        else:
            call(model, batch)
        if norms:
            norms.remove()
        return True

    try:
        with evaluating(model, gradients), as_stored(model):
            for label, batches in parts.items():
                count = 0
                for index, batch in enumerate(batches):
                    with told(label, index, batch):
                        count += run(label, index, batch)
                if count == 0:
                    raise LoraLiteError(
                        f"calibration_data{f'[{label!r}]' if label else ''} is empty.",
                        expected="At least one batch with a row.",
                        fix="calibration_data=[batch, ...]  # a list, not a generator that was read before",
                    )
    finally:
        for handle in handles:
            handle.remove()
    sums, errors = recorder.totals(layers)
    lacking = {path: error for error in reversed(errors) for path in error.lacking}
    if errors and (not partly or len(lacking) == len(layers)):
        raise errors[0]
    if norms:
        sums["norm"] = norms.effective({path: sizes(layer)[1] for path, layer in layers.items()})
    if say:
        warn(scopes.whole, unclear, skipped)
    return {**sums, "weight": Weights(layers), **({LACKING: lacking} if partly else {})}  # type: ignore[dict-item]


def warn(whole: Mapping[str, str], unclear: Iterable[str], skipped: list[str]) -> None:
    """One warning for each kind of what counts other than the user may think."""
    if whole:
        told_of = (
            f"{some(whole)}: their activations do not follow {next(iter(whole.values()))}. All of their tokens "
            "count, padding included."
        )
        warnings.warn(told_of, LoraLiteWarning, stacklevel=3)
    if names := list(unclear):
        told_of = (
            f"{some(names)} may say which tokens are padding and is not read as such: all tokens count. Give "
            '{"attention_mask": mask} in each batch, 1 for tokens, 0 for padding; a model that takes none is called without it.'
        )
        warnings.warn(told_of, LoraLiteWarning, stacklevel=3)
    if skipped:
        told_of = f"Batches without a row are skipped ({len(skipped)}): {some(skipped)}."
        warnings.warn(told_of, LoraLiteWarning, stacklevel=3)
