"""Lines as tokens: by words for the CPU tier, by any tokenizer of transformers; and which targets are answer and lead."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import lora_lite as ll
from benchmarks.sequential.tasks import LINES, Example, lines

WORD = re.compile(r"[A-Za-z]+|[0-9]|\S")


class Spans(NamedTuple):
    """ids and, for each, its first character and the one after its last in the line."""

    ids: list[int]
    places: list[tuple[int, int]]


class Tokens(Protocol):
    def spans(self, line: str) -> Spans: ...


class Words:
    """Runs of letters, single digits, other single characters; id 0 pads."""

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        return vocabulary()

    def spans(self, line: str) -> Spans:
        found = list(WORD.finditer(line))
        return Spans([self.vocabulary[word[0]] for word in found], [word.span() for word in found])


@functools.cache
def vocabulary() -> dict[str, int]:
    """{word: id} of the eight files and the ten digits."""
    words = {word for task in LINES for line in lines(task) for word in WORD.findall(line)} | set("0123456789")
    return {word: i for i, word in enumerate(["<pad>", *sorted(words)])}


class Pieces:
    """A fast tokenizer of transformers; nothing is put before or after a line."""

    def __init__(self, tokenizer: Any):
        if not getattr(tokenizer, "is_fast", False):
            raise ll.LoraLiteError(
                "The model's tokenizer does not say where in the text its tokens stand.",
                expected="A fast tokenizer, one with offsets.",
                fix="AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)",
            )
        self.tokenizer = tokenizer

    def spans(self, line: str) -> Spans:
        found = self.tokenizer(line, add_special_tokens=False, return_offsets_mapping=True)
        return Spans(found["input_ids"], found["offset_mapping"])


def batch(tokens: Tokens, texts: Sequence[str], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """input_ids, attention_mask, labels (B, T), padded on the right with id 0; no target there and no end of text."""
    rows = [torch.tensor(tokens.spans(text).ids) for text in texts]
    pad = torch.nn.utils.rnn.pad_sequence
    ids, mask = pad(rows, batch_first=True), pad([torch.ones_like(row) for row in rows], batch_first=True)
    made = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return {name: tensor.to(device) for name, tensor in made.items()}


def marked(tokens: Tokens, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """(answer, lead), (B, T) bool: tokens whose last character is one of the answer, of its first value."""
    rows = []
    for text in texts:
        example = Example(text)
        start, end = len(example.prompt), len(example.prompt) + len(example.answer)
        ends = torch.tensor([last for _, last in tokens.spans(text).places])
        first, after = example.lead
        rows.append(torch.stack([(ends > start) & (ends <= end), (ends > first) & (ends <= after)], dim=-1))
    both = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return both[..., 0], both[..., 1]
