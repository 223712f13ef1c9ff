"""Outputs and gradients equal those of PEFT's layer at the same random parameters, method by method.

Methods whose start is compared too, or whose parameters PEFT draws in several forms, have tests of their own.
"""

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite.testing import toy
from tests.oracles.layer import check_agree, check_parity
from tests.variants.test_randlora import repaired

peft = pytest.importorskip("peft")

LAYER: dict[str, Any] = {"target_modules": ["o_proj"]}
DRAWN: dict[str, Any] = {**LAYER, "init_weights": False}


class Peer(NamedTuple):
    """A tensor of PEFT's layer, and how its values and its gradient become ours."""

    name: str
    values: Any = torch.clone
    gradient: Any = torch.clone


def plain(prefix, *names):
    """Tensors that are the same numbers in the same layout."""
    return {name: Peer(prefix + name) for name in names}


LORA = plain("lora_", "A", "B")
SCALED: dict[str, Any] = {"r": 4, "lora_alpha": 8, **LAYER, "init_lora_weights": False, "lora_dropout": 0.0}
IA3 = {"g": Peer("ia3_l", lambda l: l.flatten() - 1, torch.flatten)}
TURNED = {"q": Peer("oft_R", torch.neg, torch.neg)}
RANDLORA = {
    "A": Peer("randlora_A", lambda A: A[:, 0]),
    "B": Peer("randlora_B", repaired),
    "lam": Peer("randlora_lambda", torch.t, torch.t),
    "gam": Peer("randlora_gamma"),
}

CASES = {
    **{
        f"{name}-rslora={root}": (
            ll.config(name, r=4, alpha=8, rslora=root),
            peft.LoraConfig(**SCALED, use_rslora=root),
            LORA,
            {},
        )
        for name in ("lora", "eva")
        for root in (False, True)
    },
    **{
        f"dora-rslora={root}-bias={bias}": (
            ll.DoRAConfig(r=4, alpha=8, rslora=root),
            peft.LoraConfig(**SCALED, use_rslora=root, use_dora=True),
            {**LORA, "m": Peer("lora_magnitude_vector")},
            {"bias": bias},
        )
        for root in (False, True)
        for bias in (False, True)
    },
    **{
        f"loha-r={r}": (  # the two forms of test_loha.py
            ll.LoHaConfig(r=r, alpha=8),
            peft.LoHaConfig(r=r, alpha=8, **DRAWN),
            plain("hada_", "w1_a", "w1_b", "w2_a", "w2_b"),
            {},
        )
        for r in (3, 4)
    },
    **{
        f"vera-{'-'.join(map(str, shape.values())) or 'plain'}": (
            ll.VeRAConfig(r=6),
            peft.VeraConfig(r=6, vera_dropout=0.0, **DRAWN),
            plain("vera_", "A", "B", "lambda_b", "lambda_d"),
            shape,
        )
        for shape in ({}, {"d_in": 32, "d_out": 24, "bias": False})
    },
    **{
        f"{'ia3_ff' if inputs else 'ia3'}-bias={bias}": (
            ll.IA3FFConfig() if inputs else ll.IA3Config(),
            peft.IA3Config(**LAYER, feedforward_modules=inputs, init_ia3_weights=False),
            IA3,
            {"bias": bias},
        )
        for inputs in ([], ["o_proj"])
        for bias in (True, False)
    },
    **{
        f"randlora-{d_in}-{d_out}-{r}": (
            ll.RandLoRAConfig(r=r, alpha=3 * r),
            peft.RandLoraConfig(r=r, randlora_alpha=3 * r, randlora_dropout=0.0, **DRAWN),
            RANDLORA,
            {"d_in": d_in, "d_out": d_out, "bias": r != 5},
        )
        for d_in, d_out, r in ((24, 32, 8), (32, 24, 8), (24, 32, 5), (32, 24, 5), (24, 24, 24))
    },
    "hra": (ll.HRAConfig(r=8), peft.HRAConfig(r=8, **DRAWN), {"V": Peer("hra_u", torch.t, torch.t)}, {}),
    **{
        f"oft-{b}": (
            ll.OFTConfig(block_size=b),
            peft.OFTConfig(r=0, oft_block_size=b, use_cayley_neumann=False, **DRAWN),
            TURNED,
            {},
        )
        for b in (4, 24)
    },
}


def tensor(theirs, peer):
    held = getattr(theirs, peer.name)["default"]
    return held.weight if isinstance(held, nn.Module) else held


@pytest.mark.parametrize(("cfg", "config", "peers", "shape"), CASES.values(), ids=CASES)
def test_parity_with_peft(cfg, config, peers, shape):
    def fill(ours, theirs):
        for name, peer in peers.items():
            getattr(ours, name).copy_(peer.values(tensor(theirs, peer)))

    def pairs(ours, theirs):
        trained = dict(ours.named_parameters())
        return [
            (trained[name].grad, peer.gradient(tensor(theirs, peer).grad)) for name, peer in peers.items() if name in trained
        ]

    check_parity(cfg, config, pairs, fill, **shape)


WIDE: dict[str, Any] = {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"], "init_weights": False}


@pytest.mark.parametrize(
    ("cfg", "config", "pair", "trained", "less"),
    [
        (
            ll.VeRAConfig(r=6),
            peft.VeraConfig(r=6, **WIDE),
            plain("vera_", "A", "B"),
            plain("vera_", "lambda_b", "lambda_d"),
            ("vera_lambda_b", 0.3),
        ),
        (
            ll.RandLoRAConfig(r=6),  # at its default scale
            peft.RandLoraConfig(r=6, randlora_alpha=120, randlora_dropout=0.0, **WIDE),
            {  # A as wide as any layer needs, PEFT's has 48; all layers have 4 bases here, PEFT's B 8: the columns of the first
                "A": Peer("randlora_A", lambda A: A[:, 0, :24]),
                "B": Peer("randlora_B", lambda B: repaired(B[:, :4])),
            },
            {"lam": RANDLORA["lam"], "gam": RANDLORA["gam"]},
            ("randlora_lambda", 0.03),
        ),
    ],
    ids=["vera", "randlora"],
)
def test_parity_with_peft_over_layers_of_several_widths(cfg, config, pair, trained, less):
    """The same rows and columns of the shared pair go to each layer."""
    theirs, ours = peft.get_peft_model(toy.toy(), config), toy.toy()
    layers = {a: theirs.base_model.model.get_submodule(path) for path, a in ll.attach(ours, cfg).layers.items()}
    with torch.no_grad():
        for a, layer in layers.items():
            getattr(layer, less[0])["default"].mul_(less[1])
            for name, peer in pair.items():
                a.shared[name].tensor.copy_(peer.values(tensor(layer, peer)))
            for name, peer in trained.items():
                getattr(a, name).copy_(peer.values(tensor(layer, peer)))

    def gradients():
        return [
            (getattr(a, name).grad, peer.gradient(tensor(layer, peer).grad))
            for a, layer in layers.items()
            for name, peer in trained.items()
        ]

    check_agree(ours, theirs, toy.inputs(3, 5, 24), gradients)
