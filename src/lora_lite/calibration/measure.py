"""measure: stream calibration data through the base model and add up the statistics that statistics.py names.

Activations are never kept: every call's share is added and forgotten.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import LoraLiteError
from ..sites.layer import Layer
from ..sites.quantised import as_stored, keep_trainable
from .calls import Loss, backward, call, default_loss, evaluating, on_device
from .recorder import Recorder
from .statistics import Stats, Weights, labelled, parse


def measure(model: nn.Module, layers: dict[str, Layer], wanted: Iterable[str], data: Any, loss_fn: Loss | None = None) -> Stats:
    """Stream the data once through the base model; {name: {path: sum}} in float64 for the wanted statistics.

    data     batches, or {"positive": batches, "negative": batches}; a batch is a mapping (whose attention_mask drops padding),
             a tuple or a tensor.
    loss_fn  (model, batch) -> scalar, for wgrad; None: see `default_loss`
    Raises LoraLiteError, naming the layer, for no batches, a layer that was never called, non-finite activations or gradients,
    a mask that does not fit, and a loss without a gradient.
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
    recorder = Recorder(requests)
    handles = [
        layer.register_forward_hook(
            lambda _, args, kwargs, y, path=path: recorder.observe(path, layers[path], args, kwargs, y), with_kwargs=True
        )
        for path, layer in layers.items()
    ]
    handles += keep_trainable(model)
    try:
        with evaluating(model, gradients), as_stored(model):
            for label, batches in parts.items():
                count = 0
                for batch in batches:
                    batch = on_device(model, batch)
                    recorder.begin(label, batch)
                    if gradients:
                        loss = (loss_fn or default_loss)(model, batch)
                        recorder.again = True
                        backward(loss)
                    else:
                        call(model, batch)
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
    return {**recorder.totals(layers), "weight": Weights(layers)}
