"""Calling a model on calibration batches: the device, the mode, the precision, and the loss where the batch gives one."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.spec import seeded
from ..errors import LoraLiteError, LoraLiteWarning

Loss = Callable[[nn.Module, Any], Tensor]


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss where it returns one; of logits for input_ids the cross-entropy of the next token; else of a tensor
    its product with fixed random signs, which starts the adapter without labels and is said in a warning.
    """
    output = call(model, batch)
    fields = batch if isinstance(batch, Mapping) else {}
    if (loss := field(output, "loss")) is not None:
        return loss
    mask = fields.get("attention_mask")
    if (logits := field(output, "logits")) is not None and "input_ids" in fields:
        ids = fields["input_ids"]
        targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten())
    if isinstance(output, Tensor):
        warnings.warn(
            "the calibration data gives no loss: gradients are those of a random combination of outputs. "
            "Give labels that the model turns into output.loss, or loss_fn=lambda model, batch: ...",
            LoraLiteWarning,
            stacklevel=2,
        )
        with seeded("probe"):
            signs = torch.randn(output.shape[1:]).sign().to(output.device)
        kept = output * signs  # in float32 or better: a sum of float16 overflows
        return kept.sum() if mask is None or mask.shape != output.shape[:-1] else kept[mask.bool()].sum()
    raise LoraLiteError(
        f"{type(model).__name__} returns {type(output).__name__} without a loss.",
        expected="output.loss, or output.logits for input_ids, or a tensor.",
        fix="loss_fn=lambda model, batch: ...  # in the config",
    )


def field(output: Any, name: str) -> Tensor | None:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def backward(loss: Tensor) -> None:
    """Raises LoraLiteError for a loss that is no finite scalar or that no adapted layer has a part in."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad or not loss.isfinite():
        raise LoraLiteError(
            f"The loss of the calibration data is {loss!r}.",
            expected="One finite number that depends on the adapted layers.",
            fix="loss_fn=lambda model, batch: model(**batch).loss  # in the config, and outside torch.no_grad",
        )
    loss.backward()


def on_device(model: nn.Module, batch: Any) -> Any:
    """The batch, a mapping, a tuple or list, or a tensor, with its tensors on the model's device."""
    device = next(model.parameters()).device

    def move(value: Any) -> Any:
        return value.detach().to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return {name: move(value) for name, value in batch.items()}
    return tuple(map(move, batch)) if isinstance(batch, (tuple, list)) else move(batch)


def call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


@contextlib.contextmanager
def evaluating(model: nn.Module, gradients: bool = False) -> Iterator[None]:
    """eval mode, every parameter frozen, grad mode as asked; modes and flags come back, also after an error."""
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.eval()
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            parameter.requires_grad_(True)


def refuse_one_batch(batches: Any) -> None:
    """Raise LoraLiteError for what is no iterable of batches, above all for one batch itself."""
    if isinstance(batches, (Mapping, Tensor)) or not isinstance(batches, Iterable):
        raise LoraLiteError(f"batches is a {type(batches).__name__}.", expected="An iterable of batches.", fix="[batch]")


def ambient(device: str) -> torch.autocast:
    """The autocast of the moment, to enter again."""
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """float32 products without autocast and TF32, whose 8 and 10 bits would be the accuracy of the sums."""
    matmul = torch.backends.cuda.matmul
    setting, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    before = getattr(matmul, setting)
    setattr(matmul, setting, exact)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        setattr(matmul, setting, before)
