"""Does a variant work on this kind of base? One check per kind: "yes", or an AssertionError with the broken promise."""

import copy
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.contract.registry import get
from lora_lite.core.fingerprint import fingerprint
from lora_lite.errors import LoraLiteError, LoraLiteWarning
from lora_lite.sites.layer import dense_weight
from lora_lite.testing import toy
from lora_lite.testing.checks import demand, error

WIDTH, INNER = 64, 128


class Pair(nn.Module):
    """Two layers, (..., 64) -> (..., 64); attention_mask is only there to be calibrated with."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.down_proj(torch.tanh(self.up_proj(x)))


def replaced(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The model with every nn.Linear exchanged for what `make` says."""
    for path, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            model.set_submodule(path, make(layer))
    return model


def eight_bit(model: nn.Module, **options: Any) -> nn.Module:
    from bitsandbytes.nn import Linear8bitLt

    def make(layer: nn.Linear) -> nn.Module:
        new = Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, **options)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    return replaced(model, make)


def four_bit(model: nn.Module, quant_type: str = "nf4", **options: Any) -> nn.Module:
    from bitsandbytes.nn import Linear4bit

    def make(layer: nn.Linear) -> nn.Module:
        new = Linear4bit(layer.in_features, layer.out_features, layer.bias is not None, quant_type=quant_type, **options)
        new.load_state_dict(layer.state_dict())
        return new.to("cpu")

    return replaced(model, make)


def int8(model: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    return model


def conv1d(model: nn.Module) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    def make(layer: nn.Linear) -> nn.Module:
        new = Conv1D(layer.out_features, layer.in_features)
        new.weight.data = layer.weight.data.T.contiguous()
        if layer.bias is not None:
            new.bias.data = layer.bias.data
        return new

    return replaced(model, make)


def pair() -> nn.Module:
    return toy.seeded(Pair)


def dense_twin(model: Any) -> nn.Module:
    """A model of nn.Linears with the dequantised weights."""
    twin: Any = pair()
    with torch.no_grad():
        for name in ("up_proj", "down_proj"):
            layer = getattr(model, name)
            getattr(twin, name).weight.copy_(dense_weight(layer))
            if layer.bias is not None:
                getattr(twin, name).bias = nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    return twin


def adapted(model: nn.Module, variant: str) -> Any:
    """The variant on every layer, calibrated where it has to be."""
    cls = get(variant)
    cfg = toy.small(cls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoraLiteWarning)
        return ll.attach(model, cfg, toy.calibration(cls, cfg, WIDTH))


def stored(model: Any) -> list[dict[str, Any]]:
    return [fingerprint(model.up_proj), fingerprint(model.down_proj)]


def anatomy(model: nn.Module) -> dict[str, Any]:
    """What detach has to give back beside the numbers."""
    return {
        "keys": list(model.state_dict()),
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "modules": [(k, type(m), m.training) for k, m in model.named_modules()],
        "hooks": [len(vars(m)["_forward_hooks"]) + len(vars(m)["_forward_pre_hooks"]) for m in model.modules()],
    }


def step(model: nn.Module, x: Tensor) -> list[float]:
    """Losses before and after one step of the optimizer that `param_groups` sets up."""
    target = toy.inputs(*x.shape, seed=5)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.05))
    losses = []
    for _ in range(2):
        loss = (model(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def gradients(model: nn.Module, handle: Any, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    model(x).square().mean().backward()
    return [x.grad, *(p.grad for p in handle.parameters())]  # type: ignore[list-item]


def check(variant: str, quantise: Callable[[nn.Module], nn.Module], tolerance: float = 2e-5) -> str:
    """Every promise of an adapter on a base of this kind. Raises AssertionError with the broken one."""
    start = get(variant).claims.start
    model, x = quantise(pair()), toy.inputs(3, 5, WIDTH)
    packed = type(dict(model.named_parameters())["up_proj.weight"]) is not nn.Parameter
    before, weights, parts = model(x).detach(), stored(model), anatomy(model)
    pristine = copy.deepcopy(model)

    handle = adapted(model, variant)
    for training in (True, False):  # each mode has a kernel of its own
        with torch.no_grad():
            y, want = (copy.deepcopy(m).train(training)(x) for m in (model, pristine))
        demand(torch.equal(y, want) if start == 0 else error(y, want) <= start, f"the start is off, training={training}")

    losses = step(model, x)
    demand(losses[1] < losses[0], f"one step took the loss from {losses[0]} to {losses[1]}")
    demand(stored(model) == weights, "training changed the base")
    demand(all(p.grad is None for k, p in model.named_parameters() if ".default." not in k), "the base has a gradient")

    toy.perturb(handle)
    y = model(x)
    twin = dense_twin(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        handle.save(path)
        fresh = copy.deepcopy(pristine)
        again = ll.load(fresh, path)
        if packed:
            try:
                ll.load(twin, path)
            except LoraLiteError as refusal:
                demand("down_proj (dtype float32, saved " in str(refusal), f"the refusal names no layer: {refusal}")
            else:
                raise AssertionError("an adapter of the quantised base loads on the dense one")
        oracle = ll.load(twin, path, strict_base=False)
    x_grad = gradients(model, handle, x)
    demand(all(map(torch.equal, gradients(fresh, again, x), x_grad)), "gradients after load differ")
    demand(torch.equal(fresh(x), y), "save and load change the output")
    demand(error(y, twin(x)) <= tolerance, "the output is not that of the dequantised weights")
    for got, want in zip(x_grad, gradients(twin, oracle, x)):
        demand(error(got, want) <= tolerance, "a gradient is not that of the dequantised weights")

    if get(variant).claims.affine:
        delta, want = ll.delta_weight(model, "down_proj"), ll.delta_weight(twin, "down_proj")
        demand(torch.equal(delta, want), "delta_weight is not that of the dequantised weights")
        if packed:
            try:
                ll.merge(model)
            except LoraLiteError as refusal:
                demand("is quantised" in str(refusal), f"merge is refused for another reason: {refusal}")
            else:
                raise AssertionError("merge wrote into a quantised layer")

    with ll.scale(model, 0.0):
        demand(torch.equal(model(x), before), "scale 0 is not the base")
    with ll.scale(model, 0.5):
        half = model(x)
        demand(not torch.equal(half, before) and not torch.equal(half, y), "scale 0.5 has no effect of its own")
    handle.detach()
    demand(torch.equal(model(x), before), "detach does not give the base's output back")
    demand(anatomy(model) == parts, "detach leaves traces")
    demand(stored(model) == weights, "the base is not what it was")
    return "yes"


def check_8bit(variant: str) -> str:
    return check(variant, eight_bit)


def check_4bit(variant: str) -> str:
    return check(variant, four_bit)


def check_int8(variant: str) -> str:
    return check(variant, int8)


def check_conv1d(variant: str) -> str:
    return check(variant, conv1d)
