"""The fingerprint of a base weight: is this the base that an adapter was trained on?"""

import ctypes
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraLiteError, some
from ..sites.layer import Layer, sizes
from ..sites.quantised import is_packed, parts
from ..sites.sharded import whole
from .checkpoint import VERSION

WHOLE_BELOW = 2**18  # numbers of a weight that are hashed entirely
RUNS, RUN = 2**9, 4  # of a larger one: evenly spaced runs of neighbours, since every place is a miss of the cache


def fingerprint(layer: Layer, version: int = VERSION) -> dict[str, Any]:
    """Shape, dtype and a hash of the stored weight: of all of it up to 2^18 numbers, of 2^9 evenly spaced runs of 4 above.

    A training step moves them all, and with up to 2^9 rows every row has one. Files of version 1 hold the hash of 2^14
    evenly spaced numbers, those of version 2 of up to 2^12.
    Of a packed weight the dense shape, the format in the place of the dtype, and a hash of every tensor it consists of.
    """
    if is_packed(layer):
        stored, tensors = parts(layer)
        hashes = "".join(digest(sampled(tensor, version)) for tensor in tensors)
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()[:32]
        return {"shape": list(reversed(sizes(layer))), "dtype": stored, "sha256": sha256}
    weight = whole(layer.weight.detach())
    return {
        "shape": list(weight.shape),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "sha256": digest(sampled(weight, version)),
    }


def sampled(weight: Tensor, version: int) -> Tensor:
    """The numbers that are hashed."""
    flat = weight.reshape(-1)
    if flat.numel() <= WHOLE_BELOW:
        return flat
    if version == 1:
        return flat[torch.linspace(0, flat.numel() - 1, 2**14, dtype=torch.float64).long().to(flat.device)]
    if version == 2:
        return flat[:: -(-flat.numel() // 2**12)]
    every = flat.numel() // RUNS
    return flat.as_strided((RUNS, RUN), (every, 1))


def digest(tensor: Tensor) -> str:
    """Hash of the numbers as they are stored."""
    flat = tensor.detach().contiguous().cpu()
    return hashlib.sha256(ctypes.string_at(flat.data_ptr(), flat.nbytes)).hexdigest()[:32]


def refuse_other_base(path: str | Path, targets: dict[str, Layer], saved: dict[str, Any], version: int) -> None:
    if different := changes_of_base(targets, saved, version):
        raise LoraLiteError(
            f"{path} was trained on another base.",
            expected="Base weights equal to those at save.",
            found=f"Different: {some(different)}.",
            fix="ll.load(model, path, strict_base=False)  # if the other base is meant",
        )


def changes_of_base(targets: dict[str, Layer], saved: dict[str, Any], version: int = VERSION) -> list[str]:
    """'path (what differs)' of every layer whose weight has another fingerprint than the saved one."""
    different = []
    for layer_path, layer in targets.items():
        here = fingerprint(layer, version)
        for field in ("shape", "dtype", "sha256"):
            if here[field] != saved[layer_path][field]:
                what = "content" if field == "sha256" else f"{field} {here[field]}, saved {saved[layer_path][field]}"
                different.append(f"{layer_path} ({what})")
                break
    return different
