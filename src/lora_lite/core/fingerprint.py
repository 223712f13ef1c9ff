"""The fingerprint of a base weight: is this the base that an adapter was trained on?"""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraLiteError, some
from ..sites.layer import Layer, sizes
from ..sites.quantised import is_packed, parts
from ..sites.sharded import whole
from .checkpoint import VERSION, memory
from .reading import DTYPES

WHOLE_BELOW = 2**18  # numbers of a weight that are hashed entirely
RUNS, RUN = 2**9, 4  # of a larger one, in files of version 3: evenly spaced runs of neighbours
SAMPLES = 2**11  # of a larger one since
DENSE = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}  # whose numbers are compared as numbers


def fingerprint(layer: Layer, version: int = VERSION) -> dict[str, Any]:
    """Shape, and hashes of weight and bias: of all numbers up to 2^18, of 2^11 at a stride coprime to the width above.

    Such a stride comes to every column and every row. Numbers are compared as numbers: a base that holds them in a wider dtype
    is the same base. Of a packed weight the format, and a hash of every tensor it consists of, take the place of the numbers.
    The dtype stands beside them to be read. Files of versions 1 to 3 are compared by it, and by other samples of the weight.
    """
    if is_packed(layer):
        stored, tensors = parts(layer)
        hashes = "".join(digest(sampled(tensor, version)) for tensor in tensors)
        sha256 = hashlib.sha256(hashes.encode()).hexdigest()[:32]
        return {"shape": list(reversed(sizes(layer))), "dtype": stored, "sha256": sha256} | bias_of(layer, version)
    weight = whole(layer.weight.detach())
    numbers = sampled(weight, version) if version < 4 else sampled(weight, version).double()
    dtype = str(weight.dtype).removeprefix("torch.")
    return {"shape": list(weight.shape), "dtype": dtype, "sha256": digest(numbers)} | bias_of(layer, version)


def bias_of(layer: Layer, version: int) -> dict[str, Any]:
    if version < 4:
        return {}
    return {"bias": None if layer.bias is None else digest(sampled(whole(layer.bias.detach()), version).double())}


def sampled(weight: Tensor, version: int) -> Tensor:
    """The numbers that are hashed."""
    flat = weight.reshape(-1)
    if flat.numel() <= WHOLE_BELOW:
        return flat
    if version == 1:
        return flat[torch.linspace(0, flat.numel() - 1, 2**14, dtype=torch.float64).long().to(flat.device)]
    if version == 2:
        return flat[:: -(-flat.numel() // 2**12)]
    if version == 3:
        every = flat.numel() // RUNS
        return flat.as_strided((RUNS, RUN), (every, 1))
    return strided(weight, SAMPLES)


def strided(weight: Tensor, count: int) -> Tensor:
    """About `count` numbers (n,) of a tensor, at a stride that has no divisor in common with its width; all of a small one."""
    flat = weight.reshape(-1)
    stride = max(1, flat.numel() // count)
    while stride > 1 and math.gcd(stride, weight.shape[-1]) > 1:
        stride -= 1
    return flat[::stride]


def digest(tensor: Tensor) -> str:
    """Hash of the numbers as they are stored."""
    return hashlib.sha256(memory(tensor.detach().contiguous().cpu())).hexdigest()[:32]


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
        here, there = fingerprint(layer, version), saved[layer_path]
        formats = [one.get("dtype") for one in (here, there)]
        dense = version >= 4 and all(name in DENSE for name in formats)
        for field in ("shape", *(() if dense else ("dtype",)), "sha256", "bias"):
            if here.get(field) != there.get(field):
                told = f"{field} {here.get(field)}, saved {there.get(field)}"
                different.append(f"{layer_path} ({dict(sha256='content', bias='bias').get(field, told)})")
                break
    return different
