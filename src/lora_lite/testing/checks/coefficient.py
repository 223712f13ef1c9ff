"""The start is the base model, and so is the coefficient 0; between them the coefficient acts."""

import torch

from ...contract.config import AdapterConfig
from ...core.coefficients import disabled, scale
from .. import toy
from .judging import TOLERANCE, Variant, demand, error, perturbed


def check_starts_at_identity(cls: Variant, cfg: AdapterConfig) -> None:
    """Right after attach the output is the base model's: bit for bit, or within claims.start."""
    for dtype in (torch.float32, torch.bfloat16):
        model, x = toy.toy().to(dtype), toy.inputs(3, 5, toy.WIDTH, dtype=dtype)
        before = model(x)
        toy.attached(model, cls, cfg)
        if cls.claims.start == 0:
            demand(torch.equal(model(x), before), f"the start is not the base model in {dtype}")
        else:
            demand(error(model(x), before) <= cls.claims.start, f"the start is further off than {cls.claims.start}")


def check_coeff_zero_is_base(cls: Variant, cfg: AdapterConfig) -> None:
    """Perturbed, coeff = 0 and `disabled` give the base model bit for bit, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        model, x = toy.toy().to(dtype), toy.inputs(3, 5, toy.WIDTH, dtype=dtype)
        before = model(x)
        toy.perturb(toy.attached(model, cls, cfg), 3.0)
        with scale(model, 0.0):
            demand(torch.equal(model(x), before), f"coeff = 0 is not the base model in {dtype}")
        with disabled(model):
            demand(torch.equal(model(x), before), f"disabled is not the base model in {dtype}")
        with scale(model, torch.zeros(3)):
            demand(torch.equal(model(x), before), f"a tensor of zeros as coeff is not the base model in {dtype}")


def check_coeff_is_continuous(cls: Variant, cfg: AdapterConfig) -> None:
    """Perturbed: 0, 0.5 and 1 differ, and a small coeff makes a small change."""
    model, _ = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    outputs = {}
    for coeff in (0.0, 1e-4, 0.5, 1.0):
        with scale(model, coeff):
            outputs[coeff] = model(x)
    whole = error(outputs[1.0], outputs[0.0])
    demand(whole > 1e-4, "a perturbed adapter changes nothing at coeff = 1")
    demand(error(outputs[0.5], outputs[0.0]) > 1e-5, "coeff = 0.5 is the base")
    demand(error(outputs[0.5], outputs[1.0]) > 1e-5, "coeff = 0.5 is coeff = 1: the coefficient is ignored")
    demand(error(outputs[1e-4], outputs[0.0]) < 0.05 * whole, "a small coeff makes a large change")


def check_coeff_per_sample(cls: Variant, cfg: AdapterConfig) -> None:
    """A coefficient tensor, per sample or per token, equals separate runs with its numbers."""
    model, _ = perturbed(cls, cfg)
    x, values = toy.inputs(3, 5, toy.WIDTH), torch.tensor([0.0, 0.5, 1.0])
    wanted = []
    for sample, value in zip(x, values):
        with scale(model, float(value)):
            wanted.append(model(sample[None])[0])
    for coeff in (values, values[:, None].expand(3, 5)):
        with scale(model, coeff):
            got = model(x)
        demand(
            error(got, torch.stack(wanted)) < TOLERANCE,
            f"coeff of shape {tuple(coeff.shape)} differs from separate runs",
        )
