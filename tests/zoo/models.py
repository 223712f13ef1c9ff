"""The zoo: tiny models of the architectures that people adapt, with random weights, by family and by name."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from .decoders import DENSE, EXPERT, STATE
from .encoders import ENCODER, ENCODER_DECODER
from .media import AUDIO, TIME_SERIES, VISION_LANGUAGE, VISION_ONLY
from .others import OTHERS
from .row import Row
from .torchs import TORCH

FAMILIES = {
    "dense": DENSE,
    "fused experts": EXPERT,
    "state": STATE,
    "encoder-decoder": ENCODER_DECODER,
    "encoder": ENCODER,
    "vision": VISION_ONLY,
    "audio": AUDIO,
    "vision-language": VISION_LANGUAGE,
    "time series": TIME_SERIES,
    "torch": TORCH,
    "other libraries": OTHERS,
}
ZOO: dict[str, Row] = {row.name: row for rows in FAMILIES.values() for row in rows}
FAMILY = {row.name: family for family, rows in FAMILIES.items() for row in rows}


@torch.no_grad()
def forward(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The floating tensors of one pass; what draws at random in eval mode too (vilt, vit_mae) draws the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(model(**batch))


def tensors(output: object, name: str = "output") -> dict[str, Tensor]:
    """{name: tensor} of all floating tensors that a forward pass returned, inside mappings and tuples too; no caches."""
    return dict(floating(output, name))


def floating(output: object, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from floating(value, f"{name}.{key}")
    elif type(output) in (tuple, list):
        for i, value in enumerate(output):
            yield from floating(value, f"{name}.{i}")
