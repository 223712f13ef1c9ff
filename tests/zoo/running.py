"""What the zoo's tests share: over which architectures they run, and how outputs and gradients are compared.

Every day on one architecture of each kind (DAILY), on all of them in the long suite. Outputs are compared with a base that
requires no gradient: torch multiplies inputs that are not contiguous in another order where a weight requires one.
"""

from collections.abc import Iterable, Mapping

import pytest
import torch
from torch import Tensor, nn

import lora_lite as ll

from .entry import REFUSED, default, read
from .models import ZOO, tensors
from .row import Row

DAILY = {
    "qwen3": "tied head, norms on queries and keys",
    "gpt2": "Conv1D",
    "qwen3_moe": "experts as 3-D parameters",
    "phimoe": "a router that is a Linear and returns a tuple",
    "switch_transformers": "experts in a list, an encoder-decoder",
    "mamba": "a Linear whose weight is read",
    "qwen3_next": "linear attention, a gate of one output",
    "bart": "encoder-decoder",
    "bert": "a head called decoder, tied to the embedding",
    "roberta": "a task head outside the base model",
    "vit": "pixels",
    "whisper": "a head called proj_out, audio",
    "wavlm": "attention that reads the weights of its projections",
    "gemma3": "vision and language, nn.MultiheadAttention in a pooler",
    "time_series_transformer": "heads of one output",
    "torch_encoder": "nn.MultiheadAttention",
}


def over(names: Iterable[str]) -> pytest.MarkDecorator:
    """One test for each architecture, marked `long` where another of its kind is run every day."""
    skipped = {n: pytest.mark.skipif(not row.here, reason=f"{row.needs} is not installed") for n, row in ZOO.items()}
    marks = {n: () if n in DAILY else (pytest.mark.long, skipped[n]) for n in ZOO}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=marks[n]) for n in names])


every = over(name for name, text in read().items() if not text.startswith(REFUSED))


def frozen(name: str) -> tuple[Row, nn.Module, Mapping[str, Tensor]]:
    row = ZOO[name]
    return row, row.build().requires_grad_(False), row.batch()


def attached(model: nn.Module) -> ll.Attached:
    return default(model)[0]


def strong(handle: ll.Attached, std: float = 0.1) -> ll.Attached:
    """Every trainable tensor drawn anew: an adapter that is far from its start."""
    draw = torch.Generator().manual_seed(1)
    for parameter in handle.parameters():
        nn.init.normal_(parameter, std=std, generator=draw)
    return handle


def demand_equal(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    differing = {
        key: float((found[key] - wanted[key]).abs().max()) for key in wanted if not torch.equal(found[key], wanted[key])
    }
    assert differing == {}


def demand_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> None:
    """Equal up to a share of the largest number of each tensor; one of nothing but rounding is held against the largest."""
    assert found.keys() == wanted.keys()
    least = 1e-4 * max(float(z.abs().max()) for z in wanted.values())
    far = {key: float((found[key] - z).abs().max() / z.abs().max().clamp_min(least)) for key, z in wanted.items()}
    assert {key: error for key, error in far.items() if not error < tolerance} == {}


def demand_moved(found: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> None:
    assert any(not torch.equal(found[key], base[key]) for key in base)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in [*model.named_parameters(), *model.named_buffers()]}


def train(model: nn.Module) -> None:
    """Training mode, in which the statistics of the base stay as they are."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of everything that the model puts out, each tensor with its own weights, so that norms and means hide nothing."""
    outputs = tensors(model(**batch))
    draw = torch.Generator().manual_seed(2)
    return sum(((z.float() * torch.randn(z.shape, generator=draw)).sum() for z in outputs.values()), torch.zeros(()))
