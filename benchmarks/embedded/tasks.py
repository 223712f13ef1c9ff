"""What is adapted to and how it is scored. A task gives training batches by step and scores a model; it chooses nothing.

code  the embedded default: Python source of the standard library; bits per byte and next-token accuracy on held-out modules
      (adaptation) and bits per byte on held-out prose (what was forgotten)
math  MetaMathQA -> GSM8K: supervised answers, exact match of the final number after greedy decoding; needs the hub, or local
      folders in its format
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.common import text
from lora_lite import LoraLiteError


class Task(Protocol):
    metric: str
    """Name of the score that adaptation is judged by."""
    lower_is_better: bool

    def batch(self, step: int) -> Mapping[str, Tensor]:
        """Training batch number `step`: a function of the task's seed and `step` alone."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Scores on held-out data."""
        ...

    def describe(self) -> dict[str, Any]:
        """What a record needs to say about the data."""
        ...


def score_windows(model: nn.Module, tokens: Tensor, bytes_per_token: float) -> dict[str, float]:
    """Bits per byte and next-token accuracy over rows of `tokens` (windows, window + 1), predicting all but the first."""
    nats, right, device = 0.0, 0, next(model.parameters()).device
    with torch.no_grad():
        for rows in tokens.split(16):
            rows = rows.to(device)
            logits = model(input_ids=rows[:, :-1]).logits.float()
            nats += nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
            right += int((logits.argmax(-1) == rows[:, 1:]).sum())
    predicted = tokens[:, 1:].numel()
    return {"bits_per_byte": nats / predicted / math.log(2) / bytes_per_token, "accuracy": right / predicted}


@dataclass
class Code:
    """Continue the standard library's source code.

    window  tokens of a row; eval_windows  evenly spaced windows of each text that are scored
    scored  part of the code that `evaluate` reads; a sweep takes "validation", which no run trains on
    """

    tokenizer: Any
    seed: int
    batch_size: int
    window: int
    eval_windows: int
    scored: text.Part = "test"
    metric: str = field(default="code_bits_per_byte", init=False)
    lower_is_better: bool = field(default=True, init=False)

    @cached_property
    def training(self) -> str:
        return text.joined(text.code("train")).decode()

    @cached_property
    def held_out(self) -> dict[str, bytes]:
        return {"code": text.joined(text.code(self.scored)), "prose": text.joined(text.prose(held_out=True))}

    def tokens(self, passage: str) -> Tensor:
        return torch.tensor(self.tokenizer(passage, add_special_tokens=False).input_ids)

    @cached_property
    def characters(self) -> int:
        """Enough characters for a window of tokens, by the tokenizer's mean on a sample."""
        sample = self.training[:20_000]
        return int(self.window * 1.5 * len(sample) / len(self.tokens(sample))) + 16

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        rows = []
        while len(rows) < self.batch_size:
            start = int(torch.randint(len(self.training) - self.characters, (1,), generator=generator))
            row = self.tokens(self.training[start : start + self.characters])[: self.window]
            if len(row) == self.window:
                rows.append(row)
        ids = torch.stack(rows)
        return {"input_ids": ids, "labels": ids}

    @cached_property
    def windows(self) -> dict[str, tuple[Tensor, float]]:
        """{text: (rows of tokens, bytes per token)}: evenly spaced passages of the scored texts, a window of each."""
        chosen = {}
        for name, content in self.held_out.items():
            passage, last = content.decode(), len(content.decode()) - self.characters
            starts = torch.linspace(0, last, min(self.eval_windows, last // self.window)).long().tolist()
            passages = [passage[start : start + self.characters] for start in starts]
            tokens = [self.tokens(passage) for passage in passages]
            size = sum(len(passage.encode()) for passage in passages) / sum(map(len, tokens))
            chosen[name] = torch.stack([row[: self.window + 1] for row in tokens if len(row) > self.window]), size
        return chosen

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        code, prose = (score_windows(model, *self.windows[name]) for name in ("code", "prose"))
        return {
            "code_bits_per_byte": code["bits_per_byte"],
            "code_accuracy": code["accuracy"],
            "prose_bits_per_byte": prose["bits_per_byte"],
            "prose_accuracy": prose["accuracy"],
        }

    def describe(self) -> dict[str, Any]:
        return {
            "task": "code",
            "training": {"characters": len(self.training), "sha256": text.digest(self.training.encode())},
            **{f"held_out_{k}": {"bytes": len(v), "sha256": text.digest(v)} for k, v in self.held_out.items()},
            "scored_windows": {name: list(rows.shape) for name, (rows, _) in self.windows.items()},
        }


PROMPT = "Below is an instruction. Write a response that completes it.\n\n### Instruction:\n{question}\n\n### Response: "


def final_number(answer: str) -> str | None:
    """The number after 'The answer is' or '####', without separators and trailing zeros; None where there is none."""
    found = re.findall(r"(?:####|[Tt]he answer is:?)\s*\$?(-?[\d,]*\.?\d+)", answer)
    return f"{float(found[-1].replace(',', '')):g}" if found else None


def load(name: str, config: str | None, split: str) -> Any:
    """A data set of the hub or of a local folder. Raises LoraLiteError where there is none."""
    from datasets import load_dataset

    try:
        return load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise LoraLiteError(
            f"The data set {name} cannot be loaded: {str(error).splitlines()[0]}",
            expected="A name on the hub, or a local folder in its format.",
            fix="train_data=FOLDER test_data=FOLDER",
        ) from error


@dataclass
class Math:
    """Train on MetaMathQA (columns query, response), score on GSM8K (columns question, answer).

    train, test  data set names on the hub or local folders; examples  test questions, None for all
    """

    tokenizer: Any
    seed: int
    batch_size: int
    window: int
    train: str = "meta-math/MetaMathQA"
    test: str = "openai/gsm8k"
    test_config: str | None = "main"
    examples: int | None = None
    new_tokens: int = 256
    metric: str = field(default="exact_match", init=False)
    lower_is_better: bool = field(default=False, init=False)

    @cached_property
    def rows(self) -> Any:
        return load(self.train, None, "train").shuffle(seed=self.seed)

    @cached_property
    def questions(self) -> Any:
        data = load(self.test, self.test_config, "test")
        return data if self.examples is None else data.select(range(min(self.examples, len(data))))

    def batch(self, step: int) -> dict[str, Tensor]:
        ids, labels = [], []
        for index in range(step * self.batch_size, (step + 1) * self.batch_size):
            row = self.rows[index % len(self.rows)]
            prompt = self.tokenizer(PROMPT.format(question=row["query"])).input_ids
            answer = self.tokenizer(row["response"], add_special_tokens=False).input_ids
            answer = [*answer, self.tokenizer.eos_token_id]
            ids.append(torch.tensor((prompt + answer)[: self.window]))
            labels.append(torch.tensor(([-100] * len(prompt) + answer)[: self.window]))
        pad = nn.utils.rnn.pad_sequence
        padded = pad(ids, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        mask = pad([torch.ones_like(i) for i in ids], batch_first=True)
        return {"input_ids": padded, "labels": pad(labels, batch_first=True, padding_value=-100), "attention_mask": mask}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        right, device = 0, next(model.parameters()).device
        for row in self.questions:
            prompt = self.tokenizer(PROMPT.format(question=row["question"]), return_tensors="pt").to(device)
            with torch.no_grad():
                out = model.generate(  # type: ignore[operator]
                    input_ids=prompt.input_ids,
                    attention_mask=prompt.attention_mask,
                    max_new_tokens=self.new_tokens,
                    do_sample=False,
                    pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                )
            answer = self.tokenizer.decode(out[0, prompt.input_ids.shape[1] :], skip_special_tokens=True)
            right += final_number(answer) is not None and final_number(answer) == final_number(row["answer"])
        return {"exact_match": right / len(self.questions)}

    def describe(self) -> dict[str, Any]:
        return {"task": "math", "train": self.train, "test": self.test, "questions": len(self.questions)}
