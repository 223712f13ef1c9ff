"""The promises of every variant, each as one function of (class, config). No check knows a variant by name.

"Perturbed" means that every trainable tensor was moved off its start: errors that cancel at the start show there.
Tolerances are relative to the largest value of the reference unless the promise is equality of bits.
"""

import copy
import io
import tempfile
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration.measure import measure
from ..contract.adapter import Adapter
from ..contract.config import AdapterConfig
from ..core.attach import attach
from ..core.checkpoint import read, serialized, write_atomically
from ..core.detach import detach
from ..core.finding import adapters
from ..core.load import load
from ..core.merge import delta_weight, effective, merge, unmerge
from ..core.runtime import disabled, param_groups, scale
from ..core.save import save
from ..errors import LoraLiteError
from ..sites.layer import Layer
from . import toy

TOLERANCE = 2e-5  # float32, layers of this size

Variant = type[Adapter]


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value of `want`, at least 1."""
    if got.shape != want.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1))


def demand(truth: Any, promise: str) -> None:
    if not truth:
        raise AssertionError(promise)


def photograph(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that attach may change and detach must restore."""
    return {
        "keys": list(model.state_dict()),
        "values": [t.clone() for t in model.state_dict().values()],
        "flags": {k: p.requires_grad for k, p in model.named_parameters()},
        "modules": [(k, type(m), m.training) for k, m in model.named_modules()],
        "hooks": [len(vars(m)["_forward_hooks"]) + len(vars(m)["_forward_pre_hooks"]) for m in model.modules()],
    }


def demand_same(model: nn.Module, before: dict[str, Any], when: str) -> None:
    after = photograph(model)
    for part in ("keys", "flags", "modules", "hooks"):
        demand(after[part] == before[part], f"{part} differ {when}")
    demand(all(map(torch.equal, after["values"], before["values"])), f"values differ {when}")


def perturbed(cls: Variant, cfg: AdapterConfig, size: float = 0.3) -> tuple[nn.Module, Any]:
    model = toy.toy()
    return model, toy.perturb(toy.attached(model, cls, cfg), size)


# --- declaration ------------------------------------------------------------------------------------------------------


def check_specs_are_declarative(cls: Variant, cfg: AdapterConfig) -> None:
    """param_specs says the same twice, draws nothing, and what is built equals it in name, shape and kind."""
    state = torch.random.get_rng_state()
    first, second = (cls.param_specs(24, 48, cfg) for _ in range(2))
    demand(torch.equal(state, torch.random.get_rng_state()), "param_specs draws random numbers")
    described = [{k: (s.shape, s.trainable, s.decay) for k, s in specs.items()} for specs in (first, second)]
    demand(described[0] == described[1], "param_specs differs between two calls")
    for adapter in toy.attached(toy.toy(), cls, cfg).layers.values():
        specs = cls.param_specs(adapter.d_in, adapter.d_out, adapter.cfg)
        trained = {k: tuple(p.shape) for k, p in adapter.named_parameters()}
        frozen = {k: tuple(b.shape) for k, b in adapter.named_buffers()}
        demand(
            trained == {k: s.shape for k, s in specs.items() if s.trainable},
            f"parameters {trained} are not as declared",
        )
        demand(frozen == {k: s.shape for k, s in specs.items() if not s.trainable}, f"buffers {frozen} are not as declared")
        demand(all(p.ndim > 0 for p in adapter.parameters()), "a 0-d parameter")
        demand(not list(adapter.children()), "an adapter with child modules: another library would adapt or quantise them")


def check_config_goes_to_json_and_back(cls: Variant, cfg: AdapterConfig) -> None:
    demand(cls.Config.from_json(cfg.to_json()) == cfg, "the config changes on the way to JSON and back")


def check_shapes_match_annotations(cls: Variant, cfg: AdapterConfig) -> None:
    """Each annotated tensor has the kind and axes it says; a letter means one size throughout a layer."""
    hints = {}
    for base in reversed(cls.__mro__):
        hints |= {k: h for k, h in vars(base).get("__annotations__", {}).items() if hasattr(h, "dim_str")}
    for path, adapter in toy.attached(toy.toy(), cls, cfg).layers.items():
        sizes = {"i": adapter.d_in, "o": adapter.d_out, **({} if adapter.cfg.r is None else {"r": adapter.cfg.r})}
        for name, tensor in adapter.tensors().items():
            demand(name in hints, f'{name} has no annotation such as {name}: Float[Parameter, "r i"]')
            letters = hints[name].dim_str.split()
            demand(len(letters) == tensor.ndim, f"{path}.{name}: {tuple(tensor.shape)} against {hints[name].dim_str!r}")
            for letter, size in zip(letters, tensor.shape):
                meant = int(letter) if letter.isdigit() else sizes.setdefault(letter, size)
                demand(meant == size, f"{path}.{name}: axis {letter} is {size}, elsewhere {meant}")
            kind = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
            demand(hints[name].array_type is kind, f"{name} is annotated as {hints[name].array_type.__name__}")


# --- identity and coefficient -----------------------------------------------------------------------------------------


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


# --- training ---------------------------------------------------------------------------------------------------------


def check_every_tensor_matters(cls: Variant, cfg: AdapterConfig) -> None:
    """Moving any one trainable tensor of a perturbed adapter changes the output."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    with torch.no_grad():
        before = model(x)
        for name in {name for adapter in handle.layers.values() for name, _ in adapter.named_parameters()}:
            for sign in (1, -1):
                state = copy.deepcopy(model.state_dict())
                for adapter in handle.layers.values():
                    parameter = dict(adapter.named_parameters()).get(name)
                    if parameter is not None:
                        moved = sign * 0.5 * float(parameter.abs().mean()) * toy.inputs(*parameter.shape, seed=3)
                        parameter.add_(moved.to(parameter.dtype))
                changed = error(model(x), before) > 1e-6
                model.load_state_dict(state)
                if changed:
                    break
            demand(changed, f"moving {name} changes nothing")


def check_reuses_nothing_stale(cls: Variant, cfg: AdapterConfig) -> None:
    """Without gradients a change of any tensor, of the base weight or of the coefficient acts at the next call."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    adapter = next(iter(handle.layers.values()))
    weight = cast(Tensor, model.get_submodule(adapter.path).weight)
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            model(x)
            tensor.data.mul_(1.25)  # leaves no trace in the tensor's version
            demand(torch.equal(model(x), copy.deepcopy(model)(x)), f"a change of {name} acts late")
        weight.mul_(1.25)
        demand(torch.equal(model(x), copy.deepcopy(model)(x)), "a change of the base weight acts late")
        with scale(model, 0.5):
            demand(torch.equal(model(x), copy.deepcopy(model)(x)), "a change of the coefficient acts late")


def check_gradients_flow(cls: Variant, cfg: AdapterConfig) -> None:
    """Some tensor has a gradient at step one, every one by step two, for a loss or its negative; the base never has."""
    x, probe = toy.inputs(4, 6, toy.WIDTH), toy.inputs(4, 6, toy.WIDTH, seed=5)
    seen: list[set[str]] = [set(), set()]
    for sign in (1.0, -1.0):
        model = toy.toy()
        handle = toy.attached(model, cls, cfg)
        optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2))
        for step in range(2):
            optimizer.zero_grad()
            (sign * (model(x) * probe).sum()).backward()
            for adapter in handle.layers.values():
                for name, parameter in adapter.named_parameters():
                    gradient = cast(Tensor, parameter.grad)
                    demand(gradient is not None, f"{name} takes no part in the output")
                    demand(gradient.isfinite().all(), f"the gradient of {name} is not finite")
                    if gradient.any():
                        seen[step].add(name)
            base = [k for k, p in model.named_parameters() if p.grad is not None and f".{handle.name}." not in k]
            demand(not base, f"the base has gradients: {base}")
            optimizer.step()
    names = {name for adapter in handle.layers.values() for name, _ in adapter.named_parameters()}
    demand(seen[0], "no tensor has a gradient at step one")
    demand(seen[0] | seen[1] == names, f"no gradient by step two: {sorted(names - seen[0] - seen[1])}")


def check_base_is_never_written(cls: Variant, cfg: AdapterConfig) -> None:
    """Values and version counters of the base survive attach, training, save, load and detach."""
    model = toy.toy()
    tensors = dict(model.named_parameters())
    before = {k: (t.detach().clone(), t._version) for k, t in tensors.items()}
    toy.attached(model, cls, cfg)
    optimizer = torch.optim.AdamW(param_groups(model, lr=1e-2, weight_decay=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        model(toy.inputs(3, 5, toy.WIDTH)).square().mean().backward()
        optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "a.safetensors")
        load(model, Path(folder) / "a.safetensors", name="again")
        model(toy.inputs(3, 5, toy.WIDTH))
    detach(model)
    for key, tensor in tensors.items():
        demand(torch.equal(tensor, before[key][0]), f"{key} was written")
        demand(tensor._version == before[key][1], f"{key} was written in place and put back")


def check_decay_spares_identity(cls: Variant, cfg: AdapterConfig) -> None:
    """Weight decay through param_groups shrinks the tensors that declare it and moves no other."""
    model, handle = perturbed(cls, cfg)
    before = {p: {k: t.detach().clone() for k, t in a.named_parameters()} for p, a in handle.layers.items()}
    optimizer = torch.optim.AdamW(param_groups(model, lr=0.1, weight_decay=1.0))
    for parameter in handle.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for path, adapter in handle.layers.items():
        for name, spec in adapter.specs().items():
            if spec.trainable:
                factor = 1 - (spec.lr or 0.1) * 1.0 if spec.decay else 1.0
                now, then = getattr(adapter, name).detach(), before[path][name]
                demand(
                    error(now, then * factor) < 1e-6,
                    f"decay moved {name} to {float(now.norm() / then.norm()):.2f} of it",
                )


# --- life cycle -------------------------------------------------------------------------------------------------------


def check_detach_is_exact(cls: Variant, cfg: AdapterConfig) -> None:
    """Values, key order, flags, hooks and classes are as before attach, also on a deep copy."""
    model = toy.toy()
    model.get_parameter("blocks.0.q_proj.weight").requires_grad_(False)
    before = photograph(model)
    handle = toy.perturb(toy.attached(model, cls, cfg))
    twin = copy.deepcopy(model)
    detach(twin)
    demand_same(twin, before, "after detach of a deep copy")
    demand(adapters(model), "detaching a copy detached the original")
    handle.detach()
    demand_same(model, before, "after detach")


def check_save_load_is_exact(cls: Variant, cfg: AdapterConfig) -> None:
    """Loaded on a fresh model: the same bits, tensors, flags and file; no init, factorization, data or random number."""
    model, attached = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    wanted = model(x)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "a.safetensors", Path(folder) / "b.safetensors"
        save(model, first)
        fresh = toy.toy()
        state = torch.random.get_rng_state()
        with forbidden(cls):
            handle = load(fresh, first)
        demand(torch.equal(state, torch.random.get_rng_state()), "load draws random numbers")
        demand(torch.equal(fresh(x), wanted), "the loaded adapter gives another output: some state was not saved")
        demand(handle.config == attached.config, "the config changed")
        demand(all(p.requires_grad for p in handle.parameters()), "a loaded parameter is frozen")
        save(fresh, second)
        demand(read(first)[0] == read(second)[0], "the header changed by load and save")
        demand(
            all(torch.equal(t, read(second)[1][k]) for k, t in read(first)[1].items()),
            "tensors changed by load and save",
        )
        fresh.zero_grad()


def forbidden(cls: Variant) -> Any:
    """Inside, starting and factorizing raise."""
    from contextlib import ExitStack

    stack = ExitStack()
    refuse = mock.Mock(side_effect=AssertionError("load must not start: init, group_init or a factorization was called"))
    for owner, name in ((cls, "init"), (cls, "group_init"), *((torch.linalg, n) for n in ("svd", "eigh", "qr"))):
        stack.enter_context(mock.patch.object(owner, name, refuse))
    return stack


def check_load_is_strict(cls: Variant, cfg: AdapterConfig) -> None:
    """A missing, extra or misshaped tensor and another base raise, name the key, and leave the model as it was."""
    model, _ = perturbed(cls, cfg)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        save(model, path)
        header, tensors = read(path)
        key = next(iter(tensors))
        damaged = {
            key: {k: t for k, t in tensors.items() if k != key},
            "stray.tensor": {**tensors, "stray.tensor": torch.zeros(1)},
            f"{key} has shape": {**tensors, key: torch.zeros(*tensors[key].shape, 1)},
        }
        for named, content in damaged.items():
            write_atomically(path, serialized(content, header))
            refused(path, toy.toy(), named)
        write_atomically(path, serialized(tensors, header))  # tensors may map the old file
        other = toy.toy()
        with torch.no_grad():
            other.get_parameter("blocks.1.down_proj.weight")[0, 0] += 1
        if any("blocks.1.down_proj" in k for k in tensors):
            refused(path, other, "blocks.1.down_proj")


def refused(path: Path, model: nn.Module, named: str) -> None:
    before = photograph(model)
    try:
        load(model, path)
    except LoraLiteError as refusal:
        demand(named in str(refusal), f"the error does not name {named}: {refusal}")
    else:
        raise AssertionError(f"load accepted a file with a fault at {named}")
    demand_same(model, before, "after a refused load")


def check_failed_attach_leaves_no_trace(cls: Variant, cfg: AdapterConfig) -> None:
    """A failure at the last layer, while filling or while installing, leaves the model untouched."""
    for method in ("start", "install"):
        model = toy.toy()
        before = photograph(model)
        original, calls, last = getattr(Adapter, method), [0], len(toy.attached(toy.toy(), cls, cfg).layers)

        def failing(self: Adapter, *args: Any, original: Any = original, calls: Any = calls, last: int = last) -> Any:
            calls[0] += 1
            if calls[0] == last:
                raise KeyboardInterrupt
            return original(self, *args)

        with mock.patch.object(Adapter, method, failing):
            try:
                toy.attached(model, cls, cfg)
            except KeyboardInterrupt:
                demand_same(model, before, f"after an interruption in {method}")
            else:
                raise AssertionError("the interruption was swallowed")


def check_deepcopy_is_independent(cls: Variant, cfg: AdapterConfig) -> None:
    """A deep copy gives the same output and ignores later changes of the original."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    wanted = model(x)
    twin = copy.deepcopy(model)
    demand(torch.equal(twin(x), wanted), "a deep copy gives another output")
    toy.perturb(handle, 1.0, seed=7)
    scale(model, 0.0)
    demand(torch.equal(twin(x), wanted), "the copy follows the original")


def check_pickles(cls: Variant, cfg: AdapterConfig) -> None:
    """torch.save of the whole model and back: equal output, exact detach."""
    model, _ = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    demand(torch.equal(again(x), model(x)), "a pickled model gives another output")
    detach(again)
    demand_same(again, photograph(toy.toy()), "after detach of an unpickled model")


def check_stacks(cls: Variant, cfg: AdapterConfig) -> None:
    """Two adapters of one model both act, each answers to its name, and both orders of detaching end at the base."""
    x = toy.inputs(3, 5, toy.WIDTH)
    for leaving in (("first", "second"), ("second", "first")):
        model = toy.toy()
        before, base = photograph(model), model(x)
        toy.perturb(toy.attached(model, cls, cfg, name="first"), seed=2)
        alone = model(x)
        toy.perturb(toy.attached(model, cls, cfg, name="second"), seed=3)
        both = model(x)
        demand(error(both, alone) > 1e-5, "the second adapter changes nothing")
        with disabled(model, "second"):
            demand(torch.equal(model(x), alone), "disabling the second does not leave the first")
        with disabled(model, "first"):
            demand(error(model(x), both) > 1e-5, "the first fell silent when the second came")
        with disabled(model):
            demand(torch.equal(model(x), base), "disabling both is not the base")
        detach(model, leaving[0])
        if leaving[0] == "second":
            demand(torch.equal(model(x), alone), "detaching the second does not leave the first")
        detach(model, leaving[1])
        demand_same(model, before, f"after detaching {leaving}")


# --- surroundings -----------------------------------------------------------------------------------------------------


def check_compiles(cls: Variant, cfg: AdapterConfig) -> None:
    """One graph without breaks, equal output; four compilations: a first number, any other, 0, and a number per sample."""
    model, x = toy.one(), toy.inputs(3, 5, toy.WIDTH)  # a single layer: tracing takes the time of all other checks together
    toy.perturb(toy.attached(model, cls, cfg))
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    samples = (torch.tensor([0.5, 0.0, -1.0]), torch.tensor([0.0, 0.25, 2.0]))
    for coeff in (1.0, 0.5, 0.0, -0.5, samples[0], 0.25, 1.0, samples[1], 0.0, 0.75):
        with scale(model, coeff), torch.no_grad():
            demand(error(compiled(x), model(x)) < TOLERANCE, f"compiled output differs at coeff {coeff}")
    torch.compiler.reset()
    demand(len(graphs) <= 4, f"{len(graphs)} compilations for a sweep of coefficients")


def check_follows_dtype(cls: Variant, cfg: AdapterConfig) -> None:
    """float32 adapter on a bfloat16 base returns bfloat16; model.to(bfloat16) and autocast run."""
    model = toy.toy().to(torch.bfloat16)
    handle = toy.perturb(toy.attached(model, cls, cfg), 0.05)
    x = toy.inputs(3, 5, toy.WIDTH, dtype=torch.bfloat16)
    layer = model.get_submodule(next(iter(handle.layers)))
    z = toy.inputs(3, 5, next(iter(handle.layers.values())).d_in, dtype=torch.bfloat16)
    demand(layer(z).dtype is torch.bfloat16, "the adapter changes the dtype of the layer's output")
    demand(all(p.dtype is cfg.dtype for p in handle.parameters()), f"trainable tensors are not {cfg.dtype}")
    exact = toy.toy().to(torch.bfloat16).float()
    model.float()
    wide = model(x.float())
    demand(exact(x.float()).isfinite().all() and error(wide, exact(x.float())) > 0, "the adapter does nothing")
    model.to(torch.bfloat16)
    demand(error(model(x), wide) < 0.1, "bfloat16 is far from float32")
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x.float()).sum().backward()
    demand(all(p.grad is not None and p.grad.dtype is p.dtype for p in handle.parameters()), "autocast loses gradients")


def check_checkpointing_is_exact(cls: Variant, cfg: AdapterConfig) -> None:
    """Non-reentrant gradient checkpointing: same output, same gradients."""
    model, handle = perturbed(cls, cfg)
    x = toy.inputs(3, 5, toy.WIDTH)
    results = []
    for run in (model, lambda z: checkpoint(model, z, use_reentrant=False)):
        model.zero_grad()
        out = run(x)
        out.square().mean().backward()
        results.append([out.detach(), *(p.grad.clone() for p in handle.parameters() if p.grad is not None)])
    demand(all(map(torch.equal, *results)), "checkpointing changes output or gradients")


def check_calls_and_shapes(cls: Variant, cfg: AdapterConfig) -> None:
    """Keyword calls, any leading axes, an empty batch, with and without bias; no token reads another."""
    for bias in (False, True):
        model = toy.one(24, 32, bias)
        toy.perturb(toy.attached(model, cls, cfg, width=24))
        layer, x = model.o_proj, toy.inputs(4, 6, 24)
        y = layer(x)
        demand(torch.equal(layer(input=x), y), "a keyword call gives another output")
        demand(error(layer(x.reshape(2, 2, 6, 24)), y.reshape(2, 2, 6, 32)) < TOLERANCE, "four axes differ from three")
        demand(error(layer(x[1, 2]), y[1, 2]) < TOLERANCE, "one token alone differs")
        demand(layer(x[:0]).shape == (0, 6, 32), "an empty batch does not pass")
        other = x.clone()
        other[:, 1:] += 1
        demand(error(layer(other)[:, :1], y[:, :1]) < TOLERANCE, "a token reads another")


def check_needs_data(cls: Variant, cfg: AdapterConfig) -> None:
    """Where data is needed: refused without it, sums independent of the batching, padding without influence, modes restored."""
    if not cls.needs(cfg):
        return
    model = toy.toy()
    before = photograph(model)
    try:
        attach(model, cfg)
    except LoraLiteError as refusal:
        demand("calibration_data" in str(refusal), "the error does not name calibration_data")
    else:
        raise AssertionError("attach went on without the data that the variant needs")
    demand_same(model, before, "after a refused attach")
    model.train()
    model.blocks[0].eval()
    modes = [m.training for m in model.modules()]
    states = []
    for filler in (0.0, 1e3):
        fresh = copy.deepcopy(model)
        data = toy.batches()
        for batch in data:
            batch["x"][batch["attention_mask"] == 0] = filler
        wanted = [name for name in (*cls.needs(cfg), *cls.wants(cfg)) if ":" not in name]
        split = [{k: v[i : i + 1] for k, v in batch.items()} for batch in data for i in range(4)]
        layers = {p: cast(Layer, fresh.get_submodule(p)) for p in ("blocks.0.q_proj", "blocks.1.down_proj")}
        whole, parts = measure(fresh, layers, wanted, data), measure(fresh, layers, wanted, split)
        for name in wanted:
            for path in layers:
                demand(error(parts[name][path], whole[name][path]) < 1e-6, f"{name} depends on the batch size")
        demand([m.training for m in fresh.modules()] == modes, "calibration changes training modes")
        if toy.calibration(cls, cfg) is not None and not isinstance(toy.calibration(cls, cfg), dict):
            attach(fresh, cfg, data)
            states.append(fresh.state_dict())
    if states:
        demand(all(torch.equal(states[0][k], states[1][k]) for k in states[0]), "padding has an influence")


# --- claims -----------------------------------------------------------------------------------------------------------


def check_affine(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: unit inputs give one W' and b' that reproduce the layer; merge gives its output, unmerge every bit."""
    if not cls.claims.affine:
        return
    for coeff in (1.0, -0.7):
        model, handle = perturbed(cls, cfg)
        before = photograph(model)
        x = toy.inputs(3, 5, toy.WIDTH)
        with scale(model, coeff):
            for path, adapter in handle.layers.items():
                layer = cast(Layer, model.get_submodule(path))
                z = toy.inputs(7, adapter.d_in)
                weight, bias, W = effective(layer, [adapter])
                demand(error(layer(z), z.double() @ weight.T + bias) < TOLERANCE, f"{path} is not affine")
                demand(error(delta_weight(model, path), weight - W) < 1e-6, "delta_weight is not W' - W")
            wanted = model(x)
            merge(model)
            demand(error(model(x), wanted) < TOLERANCE, "the merged model differs")
            unmerge(model)
            demand(torch.equal(model(x), wanted), "unmerge does not restore the output")
        demand_same(model, before, "after merge and unmerge")


def check_rank(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: rank(W' - W) stays within the claim at perturbed values."""
    if cls.claims.rank is None:
        return
    model, handle = perturbed(cls, cfg, 1.0)
    for path, adapter in handle.layers.items():
        values = torch.linalg.svdvals(delta_weight(model, path).double())
        bound = cls.claims.rank(adapter.cfg)
        demand((values[bound:] <= 1e-6 * values[0]).all(), f"{path}: rank above {bound}")


def check_contraction(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: outputs are never further apart than those of the base, for coeff in [0, 1] and any parameters."""
    if not cls.claims.contraction:
        return
    for size in (0.1, 1.0, 10.0):
        model = toy.one(24, 32, bias=True)
        base = copy.deepcopy(model)
        toy.perturb(toy.attached(model, cls, cfg, width=24), size)
        x, z = toy.inputs(64, 24), toy.inputs(64, 24, seed=9)
        apart = (base(x) - base(z)).norm(dim=-1)
        for coeff in (0.0, 0.5, 1.0):
            with scale(model, coeff):
                demand(((model(x) - model(z)).norm(dim=-1) <= apart * (1 + 1e-5)).all(), f"amplifies at coeff {coeff}")


def check_isometry(cls: Variant, cfg: AdapterConfig) -> None:
    """If claimed: on the identity layer the adapted weight is orthogonal at perturbed values, coeff 1."""
    if not cls.claims.isometry:
        return
    for size in (0.1, 1.0):
        model = toy.one(24, 24, bias=False)
        with torch.no_grad():
            model.o_proj.weight.copy_(torch.eye(24))
        toy.perturb(toy.attached(model, cls, cfg, width=24), size)
        Q = torch.eye(24) + delta_weight(model, "o_proj").T
        demand(error(Q @ Q.T, torch.eye(24)) < TOLERANCE, "the map is not orthogonal")
        demand(error(Q, torch.eye(24)) > 1e-3, "the map is the identity")


CHECKS: tuple[Any, ...] = tuple(
    function for name, function in cast(dict[str, Any], globals()).items() if name.startswith("check_")
)
