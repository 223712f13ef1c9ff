"""measure: stream calibration data through the base model and add up the statistics that statistics.py names.

Activations are never kept: every call's share is added and forgotten.
"""

import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import LoraLiteError, LoraLiteWarning, some
from ..sites.layer import Layer, sizes
from ..sites.quantised import as_stored, keep_trainable
from .calls import call, evaluating, on_device
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
             a tuple or a tensor.
    loss_fn  (model, batch) -> scalar or (mean, number of its terms), for wgrad; None: see `default_loss`
    partly   layers that were not called with a token that counts are named under "lacking", unless all are
    say      warn of layers whose tokens do not follow the mask: padding counts there
    Raises LoraLiteError, naming the layer, for no batches, a layer that was never called, non-finite activations or gradients,
    a mask that belongs to no tensor of the batch, and a loss without a gradient.
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
    losses, positions = Losses(loss_fn), Positions(model)
    norms = Norms(model, layers.values()) if "norm" in requests else None
    scopes = Scopes(model, layers, {request.position for request in requests.values()})
    recorder = Recorder(requests, scopes, norms.saw if norms else None)
    handles: list[Any] = [
        layer.register_forward_hook(
            lambda _, args, kwargs, y, path=path: recorder.observe(path, layers[path], args, kwargs, y), with_kwargs=True
        )
        for path, layer in layers.items()
    ]
    handles += [scopes, *([norms] if norms else []), *keep_trainable(model)]
    try:
        with evaluating(model, gradients), as_stored(model):
            for label, batches in parts.items():
                count = 0
                for batch in batches:
                    recorder.idle = True
                    batch = positions.complete(on_device(model, batch))
                    recorder.begin(label, batch)
                    if gradients:
                        loss, terms = losses(model, batch)
                        recorder.weigh(terms)
                        backward(loss)
                    else:
                        call(model, batch)
                    if norms:
                        norms.remove()
                    count += 1
                if count == 0:
                    raise LoraLiteError(
                        f"calibration_data{f'[{label!r}]' if label else ''} is empty.",
                        expected="At least one batch.",
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
    if scopes.whole and say:
        warnings.warn(
            f"{some(scopes.whole)}: their activations do not follow {next(iter(scopes.whole.values()))}. All of their tokens "
            "count, padding included.",
            LoraLiteWarning,
            stacklevel=2,
        )
    return {**sums, "weight": Weights(layers), **({LACKING: lacking} if partly else {})}  # type: ignore[dict-item]
