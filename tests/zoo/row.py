"""One architecture of the zoo as data, and how it becomes a model and a batch."""

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .batches import BATCHES

GENERATING = ("CausalLM", "Seq2SeqLM", "SpeechSeq2Seq", "ImageTextToText")


class Row:
    """A row of the zoo's tables.

    kind   transformers' model_type               head   of AutoModelFor..., "Model" for AutoModel, or a class's own name
    sizes  of the config, several mappings and keywords, later ones win; a mapping under ..._config is a config inside
    batch  the kind of input, see batches.py      name   of the row, where one model_type has several
    """

    def __init__(self, kind: str, head: str, *sizes: Mapping[str, Any], batch: str = "tokens", name: str = "", **own: Any):
        self.kind, self.head, self.kind_of_batch = kind, head, batch
        self.name = name or kind.replace("-", "_")
        self.sizes: dict[str, Any] = {}
        for part in (*sizes, own):
            self.sizes.update(part)

    needs = "transformers"

    @property
    def here(self) -> bool:
        """Whether the library that the model is of is installed."""
        return importlib.util.find_spec(self.needs) is not None

    @property
    def generates(self) -> bool:
        return self.head in GENERATING

    def build(self) -> nn.Module:
        """The model in eval mode, with the same random weights at every call."""
        return seeded(lambda: lively(self.make())).eval()

    def make(self) -> nn.Module:
        config = CONFIG_MAPPING[self.kind](**copy.deepcopy(self.sizes))
        auto = f"AutoModelFor{self.head}" if self.head != "Model" else "AutoModel"
        if hasattr(transformers, auto):
            return getattr(transformers, auto).from_config(config)
        return getattr(transformers, self.head)(config)

    def batch(self) -> dict[str, Tensor]:
        return BATCHES[self.kind_of_batch]()


def lively(model: nn.Module) -> nn.Module:
    """Parameters that start at zero (biases, gates, gemma3's way from images to text) are drawn, else nothing passes them."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model


class TorchRow(Row):
    """A row that is no model of transformers: a function builds it."""

    def __init__(self, name: str, make: Callable[[], nn.Module], batch: str):
        super().__init__(name, "", batch=batch)
        self.make = make  # type: ignore[method-assign]


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()
