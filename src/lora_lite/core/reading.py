"""A safetensors file from bytes in memory: every length, name, type and number is checked before a tensor is made.

Nothing is mapped, so that another process which changes the file changes nothing of what was read. Each byte belongs to one
tensor at most, so that a small file says nothing large.
"""

import math
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..contract.strict import is_count, is_name, parsed, shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_HEADER, MOST_TENSORS, MOST_KEY, MOST_AXES, MOST_NUMBERS = 2**26, 2**18, 1024, 8, 2**48
METADATA, SAID = "__metadata__", {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Place:
    """Where a tensor's numbers are, in bytes from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def content_of(path: str | Path) -> bytearray:
    """The bytes of a regular file. Raises OSError, and ValueError for a pipe, a device and what does not fit into memory."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError("it is no regular file")
        try:
            content = bytearray(found.st_size)
        except (MemoryError, OverflowError) as error:
            raise ValueError(f"its {found.st_size} bytes do not fit into memory") from error
        if file.readinto(content) < len(content):
            raise ValueError("it grew shorter while it was read")
    return content


def tensors_of(content: bytearray) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a file. Raises ValueError, which says what is wrong where."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError(f"it ends within its header, after {len(content)} bytes")
    if length > MOST_HEADER:
        raise ValueError(f"its header has {length} bytes, at most {MOST_HEADER} are read")
    header = parsed(content[8 : 8 + length], "its header")
    if not isinstance(header, dict):
        raise ValueError("its header is no table")
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError(f"{METADATA} is no table of texts")
    if len(header) > MOST_TENSORS:
        raise ValueError(f"it has {len(header)} tensors, at most {MOST_TENSORS} are read")
    places = {key: place_of(key, said) for key, said in header.items()}
    end = 0
    for key, place in sorted(places.items(), key=lambda item: (item[1].start, item[1].stop)):
        if place.start != end:
            raise ValueError(f"data_offsets of {key} begin at {place.start}, the tensor before it ends at {end}")
        end = place.stop
    if end != len(content) - 8 - length:
        raise ValueError(f"its tensors end at {end}, and {len(content) - 8 - length} bytes follow the header")
    return metadata, {key: tensor_at(content, place, 8 + length) for key, place in places.items()}


def place_of(key: Any, said: Any) -> Place:
    if not is_name(key, MOST_KEY):
        raise ValueError(f"{shown(key)} is no name of a tensor, printed in at most {MOST_KEY} letters")
    if not isinstance(said, dict) or said.keys() != SAID:
        raise ValueError(f"{key} has not the entries dtype, shape, data_offsets")
    dtype, shape, offsets = said["dtype"], said["shape"], said["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"dtype of {key} is {shown(dtype)}, none of {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MOST_AXES or not all(is_count(n, 0, MOST_NUMBERS) for n in shape):
        raise ValueError(f"shape of {key} is {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_count, offsets)):
        raise ValueError(f"data_offsets of {key} are {shown(offsets)}")
    size = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"data_offsets of {key} hold {offsets[1] - offsets[0]} bytes, its shape {shape} of {dtype} {size}")
    return Place(DTYPES[dtype], tuple(shape), *offsets)


def tensor_at(content: bytearray, place: Place, begin: int) -> Tensor:
    """A view of the file's bytes; a copy where they are not aligned to the numbers. An empty one allocates nothing."""
    if place.start == place.stop:
        return torch.empty([min(n, 1) for n in place.shape], dtype=place.dtype).expand(place.shape)
    start = begin + place.start
    if start % place.dtype.itemsize:
        content, start = content[start : begin + place.stop], 0
    count = math.prod(place.shape)
    return torch.frombuffer(content, dtype=place.dtype, count=count, offset=start).reshape(place.shape)
