"""The tokens of a batch: its one or two streams, their masks, and the rows of an activation that a mask keeps.

A batch has one stream of tokens, that of an encoder-decoder two: attention_mask belongs to the encoder's,
decoder_attention_mask and labels to the decoder's. scopes.py says which stream a layer sees.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoraLiteError

OWN = {"source": ("input_ids", "inputs_embeds"), "target": ("decoder_input_ids", "decoder_inputs_embeds")}
BESIDE = ("attention_mask", "decoder_attention_mask", "labels")


class Stream(NamedTuple):
    """shape   (b, t), or (n,) of rows that are no sequences; None where the batch does not tell
    mask    of that shape: what is no padding; None: all
    labels  of that shape: what has a label other than -100 besides; None: labels are of samples, pixels or not there
    misfit  the sentence about a mask or labels that belong to no tensor of the batch
    """

    shape: torch.Size | None = None
    mask: Tensor | None = None
    labels: Tensor | None = None
    misfit: str = ""

    def counted(self, position: str) -> Tensor | None:
        return self.labels if position == "labels" and self.labels is not None else self.mask

    def drops(self, position: str) -> bool:
        """Whether some tokens do not count."""
        counted = self.counted(position)
        if counted is not None and counted is self.labels and self.shape is not None and counted.numel() != self.shape.numel():
            return True  # to be refused
        return position == "last" or bool(self.misfit) or (counted is not None and not bool(counted.all()))


NOWHERE = Stream()


def tensors(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what a batch holds; the name is empty where it has none."""
    if isinstance(batch, Mapping):
        yield from ((name, value) for name, value in batch.items() if isinstance(value, Tensor))
    else:
        yield from (
            ("", value) for value in (batch if isinstance(batch, (tuple, list)) else (batch,)) if isinstance(value, Tensor)
        )


def leading(name: str, tensor: Tensor) -> torch.Size:
    """The axes of a tensor that are no features: all of numbers of tokens, all but the last of vectors."""
    return tensor.shape if not tensor.is_floating_point() or name in BESIDE else tensor.shape[:-1]


def streams(batch: Any, two: bool) -> dict[str, Stream]:
    """{"source": ..., "target": ...} of a batch, both the same where the model is no encoder-decoder (two=False)."""
    fields = batch if isinstance(batch, Mapping) else {}
    labels = fields.get("labels")
    labels = labels if isinstance(labels, Tensor) and not labels.is_floating_point() else None
    source = side("source", batch, binary(fields.get("attention_mask"), "attention_mask"))
    if not two:
        source = with_labels(source, labels)
        return {"source": source, "target": source}
    mask = binary(fields.get("decoder_attention_mask"), "decoder_attention_mask")
    own = [name for name in OWN["target"] if fields.get(name) is not None]
    words = labels is not None and labels.ndim == 2 and (not own or labels.shape == fields[own[0]].shape[:2])
    if mask is None and labels is not None and words:
        mask = labels != -100  # what the decoder is fed there is the padding that stands for it
    if mask is None and not own:
        return {"source": source, "target": source}  # the decoder is fed with input_ids, one place further on
    return {"source": source, "target": with_labels(side("target", batch, mask), labels if words else None)}


def side(which: str, batch: Any, mask: Tensor | None) -> Stream:
    found = list(tensors(batch))
    own = [leading(name, t) for name, t in found if name in OWN[which]]
    if which == "source" and not own:
        own = [leading(name, t) for name, t in found if name not in (*BESIDE, *OWN["target"])]
    if mask is None:
        return Stream(own[0] if own else None)
    beside = which == "target" or any(fits(mask, name, t) for name, t in found if name not in BESIDE) or not own
    misfit = "" if beside else f"attention_mask of shape {tuple(mask.shape)} must cover the same tokens."
    return Stream(mask.shape, mask.bool(), None, misfit)


def fits(mask: Tensor, name: str, tensor: Tensor) -> bool:
    """Whether the mask can be one of this tensor: of its tokens, or of frames that stand on any of its axes."""
    lead = leading(name, tensor)
    if len(lead) == mask.ndim and lead.numel() == mask.numel():
        return lead == mask.shape  # not time first
    return mask.numel() in (tensor.numel(), tensor.shape[:-1].numel()) or all(size in tensor.shape for size in mask.shape)


def with_labels(stream: Stream, labels: Tensor | None) -> Stream:
    if labels is None or stream.shape is None:
        return stream
    if labels.numel() == stream.shape.numel() and labels.ndim <= len(stream.shape):
        counted = labels != -100
        mask = stream.mask
        shape = stream.shape if len(stream.shape) > 1 else labels.shape
        counted = counted.reshape(shape)
        return stream._replace(labels=counted if mask is None else counted & mask.reshape(shape))
    if labels.ndim == 2 and len(stream.shape) == 2 and labels.shape[0] == stream.shape[0]:
        return stream._replace(labels=labels != -100)  # of another length: refused where it is asked for
    return stream


def binary(mask: Any, what: str) -> Tensor | None:
    if not isinstance(mask, Tensor):
        return None
    if not ((mask == 0) | (mask == 1)).all():
        raise LoraLiteError(
            f"{what} holds other numbers than 0 and 1.",
            expected="1 for tokens, 0 for padding.",
            fix="attention_mask = input_ids != pad_token_id",
        )
    return mask


def follows(lead: torch.Size, stream: Stream) -> bool:
    """Whether activations (*lead, d) are those of the stream's tokens, as they are or flattened."""
    if stream.shape is None or lead.numel() != stream.shape.numel():
        return False
    return lead == stream.shape or len(lead) != len(stream.shape) or 1 in lead


def last_of(mask: Tensor) -> Tensor:
    """The mask (..., t) of the last kept token of each row."""
    position = torch.arange(mask.shape[-1], device=mask.device)
    return mask & (position == torch.where(mask, position, -1).amax(-1, keepdim=True))


def as_rows(tensor: Tensor) -> Tensor:
    """All tokens as rows (n, d); of a nested tensor those of its parts in turn."""
    return torch.cat(tensor.unbind()) if tensor.is_nested else tensor.reshape(-1, tensor.shape[-1])


def whole(shape: torch.Size, device: torch.device) -> Tensor:
    """The mask that keeps every token; of rows that are no sequences each is one of its own."""
    return torch.ones(shape if len(shape) > 1 else (*shape, 1), dtype=torch.bool, device=device)
