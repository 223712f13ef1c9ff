"""The kinds of input that the zoo's models take: mappings of keyword arguments, two samples each, the same at every call."""

from collections.abc import Callable

import torch
from torch import Tensor

IMAGE_TOKEN = 95
VISION_START = 93


def numbers(*shape: int) -> Tensor:
    """Standard normal draws that depend on the shape alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def ids(batch: int = 2, time: int = 9) -> Tensor:
    """Tokens from 5 to 89: no special one of the tiny configs, whose vocabulary is 96."""
    return torch.randint(5, 90, (batch, time), generator=torch.Generator().manual_seed(time))


def tokens(input_ids: Tensor | None = None) -> dict[str, Tensor]:
    input_ids = ids() if input_ids is None else input_ids
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def with_images(*before: int, places: int) -> dict[str, Tensor]:
    """Text behind the places that the model fills with its image's features."""
    image = torch.tensor([[*before, *[IMAGE_TOKEN] * places]] * 2)
    return tokens(torch.cat([image, ids(time=6)], dim=1))


def patches() -> dict[str, Tensor]:
    """Qwen-VL: images as flat patches of 2 frames of 3 colours of 4 x 4, on a grid of 4 x 4 that is merged two by two."""
    text = with_images(VISION_START, places=4)
    grid = torch.tensor([[1, 4, 4]] * 2)
    return {
        **text,
        "pixel_values": numbers(32, 96),
        "image_grid_thw": grid,
        "mm_token_type_ids": (text["input_ids"] == IMAGE_TOKEN).long(),
    }


def lagged() -> dict[str, Tensor]:
    """Series with a context of 8 behind lags of up to 2, and 4 values to predict."""
    past = {"past_values": numbers(2, 10), "past_time_features": numbers(2, 10, 1), "past_observed_mask": torch.ones(2, 10)}
    return {**past, "future_values": numbers(2, 4), "future_time_features": numbers(2, 4, 1)}


def packed() -> dict[str, Tensor]:
    """Flux: an image as 16 patches on a grid of 4 x 4, behind text of 5 vectors."""
    grid = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0))
    image = {"hidden_states": numbers(2, 16, 4), "img_ids": grid}
    text = {"encoder_hidden_states": numbers(2, 5, 32), "pooled_projections": numbers(2, 32), "txt_ids": torch.zeros(5, 3)}
    return {**image, **text, "timestep": torch.tensor([0.3, 0.7])}


def noisy() -> dict[str, Tensor]:
    return {"timestep": torch.tensor([3, 7])}


def pixels(*frames: int) -> dict[str, Tensor]:
    return {"pixel_values": numbers(2, *frames, 3, 32, 32)}


BATCHES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "tokens": tokens,
    "tokens and types": lambda: {**with_images(places=4), **pixels(), "token_type_ids": torch.tensor([[0] * 4 + [1] * 6] * 2)},
    "ends": lambda: tokens(torch.cat([ids(), torch.full((2, 1), 2)], dim=1)),
    "seq2seq": lambda: {**tokens(), "decoder_input_ids": ids(time=5)},
    "pixels": pixels,
    "masked pixels": lambda: {**pixels(), "noise": numbers(2, 4)},
    "waveform": lambda: {"input_values": numbers(2, 400)},
    "spectrogram": lambda: {"input_features": numbers(2, 8, 32), "decoder_input_ids": ids(time=5)},
    "frames": lambda: {"input_features": numbers(2, 12, 8)},
    "spectral values": lambda: {"input_values": numbers(2, 24, 16)},
    "text and image": lambda: {**tokens(), **pixels()},
    "image in text": lambda: {**with_images(places=4), **pixels()},
    "merged image in text": lambda: {**with_images(places=1), **pixels(1)},
    "patches": patches,
    "series": lambda: {"past_values": numbers(2, 16, 2)},
    "lagged series": lagged,
    "noisy with text": lambda: {**noisy(), "sample": numbers(2, 4, 8, 8), "encoder_hidden_states": numbers(2, 5, 32)},
    "noisy with class": lambda: {**noisy(), "hidden_states": numbers(2, 4, 8, 8), "class_labels": torch.tensor([1, 2])},
    "packed with text": packed,
    "x": lambda: {"x": pixels()["pixel_values"]},
    "input": lambda: {"input": numbers(2, 5, 32)},
    "vectors": lambda: {"src": numbers(2, 5, 32)},
    "two vectors": lambda: {"src": numbers(2, 5, 32), "tgt": numbers(2, 4, 32)},
}
