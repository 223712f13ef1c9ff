"""PEFT's type VERA: one pair for all layers, as large as the largest; without save_projection it is drawn from a key."""

import torch

from ..layout import Key, Layout, Options, Sizes, Stored, kaiming_uniform

A, B = "vera_A", "vera_B"


def prepare(options: Options, stored: Stored, sizes: Sizes) -> Stored:
    """PEFT draws the pair from projection_prng_key, A first, where the option says that it is not stored."""
    rows = {len(tensors["vera_lambda_d"]) for path, tensors in stored.items() if path and "vera_lambda_d" in tensors}
    if options.get("save_projection", True) or rows != {options.get("r")}:  # others are left to the check of shapes
        return stored
    generator = torch.Generator().manual_seed(options.get("projection_prng_key") or 0)
    d_in, d_out = (max(side) for side in zip(*sizes.values()))
    pair = [kaiming_uniform(shape, generator) for shape in ((options["r"], d_in), (d_out, options["r"]))]
    return {**stored, "": dict(zip((A, B), pair))}


LAYOUT = Layout(
    peft_type="VERA",
    tensors={"lambda_b": Key("vera_lambda_b"), "lambda_d": Key("vera_lambda_d")},
    shared={"A": Key(A), "B": Key(B)},
    options={"r": "r"},
    unread=("projection_prng_key", "save_projection", "d_initial", "init_weights"),
    conv1d=True,
    derived=lambda adapter: {"save_projection": True, "projection_prng_key": 0},
    prepare=prepare,
)
