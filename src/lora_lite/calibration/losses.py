"""The loss of a calibration batch and the number of its terms, by which its gradients count: batches add up over tokens."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract.spec import seeded
from ..errors import LoraLiteError, LoraLiteWarning
from .calls import call, field
from .scopes import towers
from .tokens import tensors

Loss = Callable[[nn.Module, Any], Tensor | tuple[Tensor, float]]
"""(model, batch) -> a scalar, which counts once, or (a mean, the number of its terms)."""


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """The model's own loss where it returns one; of logits for input_ids the cross-entropy of the next token; else of a tensor
    its product with fixed random signs, which starts the adapter without labels and is said in a warning.
    """
    return Losses()(model, batch)[0]


class Losses:
    """(model, batch) -> (loss, number of terms). loss_fn: the user's own; None: see `default_loss`.

    A model's own loss is taken for a mean over the labels other than -100. Whether the first label of a row is among them, as
    it is not where each token predicts the next, is measured on the first batch: which mean is the loss.
    """

    def __init__(self, loss_fn: Loss | None = None):
        self.loss_fn = loss_fn
        self.shifted: bool | None = None

    def __call__(self, model: nn.Module, batch: Any, fields: Any = None) -> tuple[Tensor, float]:
        """fields: what the batch says by name (batches.py), where that is more."""
        fields = next((known for known in (fields, batch) if isinstance(known, Mapping)), {})
        if self.loss_fn is not None:
            refuse_unlabelled(fields, 0)
            found = self.loss_fn(model, batch)
            return (found[0], float(found[1])) if isinstance(found, tuple) else (found, 1.0)
        refuse_unlabelled(fields, 0)
        output = call(model, batch)
        if (loss := field(output, "loss")) is not None:
            return loss, self.terms(fields, loss, field(output, "logits"), batch)
        mask, logits = fields.get("attention_mask"), field(output, "logits")
        if isinstance(logits, Tensor) and "input_ids" in fields:
            return next_token(model, logits, fields["input_ids"], mask)
        if isinstance(output, Tensor):
            return probe(output, mask), 1.0
        raise no_loss(model, output)

    def terms(self, fields: Mapping[str, Any], loss: Tensor, logits: Tensor | None, batch: Any) -> float:
        """How many terms the model's own loss is the mean of."""
        labels = fields.get("labels")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim == 0:
            return float(next((len(t) for _, t in tensors(batch) if t.ndim), 1))
        every, behind = (int((part != -100).sum()) for part in (labels, labels[..., 1:]))
        if labels.ndim < 2 or every == behind:
            return float(every)
        if self.shifted is None and isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape:
            self.shifted = shifted(loss, logits, labels)
        count = behind if self.shifted else every
        refuse_unlabelled(fields, int(bool(self.shifted)))
        return float(count)


@torch.no_grad()
def shifted(loss: Tensor, logits: Tensor, labels: Tensor) -> bool:
    """Whether the loss is nearer to the mean of the next tokens' cross-entropies than to that of the tokens' own."""
    own = cross_entropy(logits, labels)
    following = cross_entropy(logits[:, :-1], labels[:, 1:])
    return not bool((loss - own).abs() < (loss - following).abs())  # without a following label that mean is no number


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def refuse_unlabelled(fields: Mapping[str, Any], first: int) -> None:
    """Raise for a batch of labels that are all -100, from the place `first` on: its loss is a mean over nothing."""
    labels = fields.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or not labels.numel() or (labels.ndim < 2 and first):
        return
    if not (labels[..., first:] != -100).any():
        where = " but those of first tokens, which nothing predicts," if first else ""
        raise LoraLiteError(
            f"All labels of a calibration batch{where} are -100, shape {tuple(labels.shape)}.",
            expected="At least one label that counts in every batch: a loss is their mean.",
            fix='calibration_data = [b for b in batches if (b["labels"][:, 1:] != -100).any()]',
        )


def next_token(model: nn.Module, logits: Tensor, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
    if towers(model)[0] or logits.shape[:-1] != ids.shape:
        raise LoraLiteError(
            f"{type(model).__name__} returns logits of shape {tuple(logits.shape)} that predict no next token of input_ids.",
            expected="Labels, from which the model makes output.loss.",
            fix='batch["labels"] = ...  # or loss_fn=lambda model, batch: ... in the config',
        )
    targets = ids[:, 1:] if mask is None else ids[:, 1:].masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), -100)
    count = int((targets != -100).sum())
    if not count:
        raise LoraLiteError(
            f"A calibration batch of shape {tuple(ids.shape)} has no next token to predict.",
            expected="At least one row with two tokens.",
            fix="calibration_data = longer texts",
        )
    return cross_entropy(logits[:, :-1], targets), float(count)


def probe(output: Tensor, mask: Tensor | None) -> Tensor:
    """The sum over tokens of the output's product with fixed random signs, in float32: a sum of float16 overflows."""
    warnings.warn(
        "the calibration data gives no loss: gradients are those of a random combination of outputs. "
        "Give labels that the model turns into output.loss, or loss_fn=lambda model, batch: ...",
        LoraLiteWarning,
        stacklevel=2,
    )
    with seeded("probe"):
        signs = torch.randn(output.shape[1:]).sign().to(output.device)
    kept = output * signs
    return kept.sum() if mask is None or mask.shape != output.shape[:-1] else kept[mask.bool()].sum()


def no_loss(model: nn.Module, output: Any) -> LoraLiteError:
    return LoraLiteError(
        f"{type(model).__name__} returns {type(output).__name__} without a loss.",
        expected="output.loss, or output.logits for input_ids, or a tensor.",
        fix="loss_fn=lambda model, batch: ...  # in the config",
    )


def backward(loss: Tensor) -> None:
    """Raises LoraLiteError for a loss that is no finite scalar or that no adapted layer has a part in."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad or not loss.isfinite():
        raise LoraLiteError(
            f"The loss of the calibration data is {loss!r}.",
            expected="One finite number that depends on the adapted layers.",
            fix="loss_fn=lambda model, batch: model(**batch).loss  # in the config, and outside torch.no_grad",
        )
    loss.backward()
