"""What somebody may have meant by an option's value that cannot be: the repair of an error, as code."""

import typing
from collections.abc import Iterable
from typing import Any, Literal

import torch

from ..errors import closest
from .kinds import DTYPES, accepts, bounds, normalised

SHORT = {"bf16": "bfloat16", "fp16": "float16", "f16": "float16", "fp32": "float32", "f32": "float32", "fp64": "float64"}


def meant(name: str, value: Any, hint: Any, default: Any) -> str:
    """`name=` with the nearest lawful value to one of the wrong kind, else with the default."""
    found = [one for guess in guesses(value, hint) if accepts(one := normalised(guess, hint), hint) and not bounds(one, name)]
    return f"{name}={(found or [default])[0]!r}"


def guesses(value: Any, hint: Any) -> Iterable[Any]:
    if isinstance(value, str):
        word = value.strip().lower().removeprefix("torch.")
        if (dtype := DTYPES.get(SHORT.get(word, word))) is not None:
            yield dtype
        options = [hint, *typing.get_args(hint)]
        texts = [text for one in options if typing.get_origin(one) is Literal for text in typing.get_args(one)]
        near = closest(value, [text for text in texts if isinstance(text, str)])
        yield near.removeprefix("Closest name: ").removesuffix(".")
        for kind in (int, float):
            try:
                yield kind(word)
            except ValueError:
                continue
    elif isinstance(value, float) and value.is_integer():
        yield int(value)
    elif isinstance(value, (set, frozenset, range)):
        yield list(value) if isinstance(value, range) else sorted(value, key=repr)
    elif not isinstance(value, (torch.Tensor, dict)):
        yield (value,)
