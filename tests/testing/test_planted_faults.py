"""Each check of the conformance suite catches the fault it is meant for, planted in a throw-away variant."""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import lora_lite as ll
from lora_lite.contract import Adapter, AdapterConfig, Claims, ParamSpec, RanklessConfig
from lora_lite.contract.annotations import Float
from lora_lite.contract.spec import kaiming, ones
from lora_lite.core.atomic import Before
from lora_lite.mathematics import maps
from lora_lite.testing import check_variant, checks


@dataclass(frozen=True, kw_only=True)
class SoundConfig(AdapterConfig):
    lr: float = 1e-3


class Sound(Adapter):
    """A lawful low-rank variant, written outside the package and registered nowhere."""

    Config = SoundConfig
    claims = Claims(rank=lambda cfg: cfg.r)
    A: Float[Parameter, "r i"]
    B: Float[Parameter, "o r"]

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return {
            "A": ParamSpec((cfg.r, d_in), kaiming, identity=0, decay=True),
            "B": ParamSpec((d_out, cfg.r), identity=0, decay=True),
        }

    def forward(self, x, y, base):
        return y + maps.low_rank(x, self.A, self.B, self.coeff * self.s)


class WritesTheWeight(Sound):
    def forward(self, x, y, base):
        with torch.no_grad():
            base.layer.weight.mul_(1.0)
        return super().forward(x, y, base)


class StartsElsewhere(Sound):
    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return Sound.param_specs(d_in, d_out, cfg) | {"B": ParamSpec((d_out, cfg.r), ones)}


class DeadGradient(Sound):
    """Both factors start at zero, so neither ever moves."""

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return Sound.param_specs(d_in, d_out, cfg) | {"A": ParamSpec((cfg.r, d_in), identity=0, decay=True)}


class DetachedTensor(Sound):
    def forward(self, x, y, base):
        return y + maps.low_rank(x, self.A.detach(), self.B, self.coeff * self.s) + 0 * (self.A.sum())


class UnsavedState(Sound):
    """The sign drawn at the start lives in a plain attribute, which a checkpoint does not hold."""

    sign = 1.0

    def init(self, W):
        self.sign = -1.0

    def forward(self, x, y, base):
        return y + maps.low_rank(x, self.A, self.B, self.coeff * self.s * self.sign)


class ZeroDimensional(Sound):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.tensor(1.0))


class WrongShape(Sound):
    A: Float[Parameter, "i r"]


class WrongKind(Sound):
    A: Float[Tensor, "r i"]


class IgnoresCoeff(Sound):
    def forward(self, x, y, base):
        return y + maps.low_rank(x, self.A, self.B, self.s)


class JumpsWithCoeff(Sound):
    def forward(self, x, y, base):
        return y + maps.low_rank(x, self.A, self.B, self.s) * (self.coeff + 0.5)


class FollowsTheOriginal(Sound):
    """A closure over the first instance's tensor: a deep copy keeps reading the original."""

    def init(self, W):
        original = self.B
        self.read = lambda: original

    def forward(self, x, y, base):
        return y + maps.low_rank(x, self.A, self.read(), self.coeff * self.s)


class LeaksDtype(Sound):
    """Goes around the cast of the core."""

    def output_hook(self, layer, args, kwargs, y):
        return y + maps.low_rank(args[0].float(), self.A, self.B, self.coeff * self.s)


class DrawsAtLoad(Sound):
    """Fills a tensor when it is built, which is also what load does."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.randn(1)


class FactorizesAtLoad(Sound):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        torch.linalg.qr(torch.eye(2))


class MixesTokens(Sound):
    def forward(self, x, y, base):
        z = x if x.ndim < 2 or x.shape[-2] == 0 else x - x.mean(-2, keepdim=True)
        return y + maps.low_rank(z, self.A, self.B, self.coeff * self.s)


class NotAffine(Sound):
    def forward(self, x, y, base):
        return y + maps.lin(torch.tanh(maps.lin(x, self.A)) * (self.coeff * self.s), self.B)


class HigherRank(Sound):
    claims = Claims(rank=lambda cfg: cfg.r - 1)


class Amplifies(Sound):
    claims = Claims(contraction=True)


class NotOrthogonal(Sound):
    claims = Claims(isometry=True)


class BreaksTheGraph(Sound):
    def forward(self, x, y, base):
        torch._dynamo.graph_break()
        return super().forward(x, y, base)


class CountsCalls(Sound):
    """State that a forward changes: a recomputation under checkpointing sees another value."""

    calls = 0

    def forward(self, x, y, base):
        self.calls += 1
        return y + maps.low_rank(x, self.A, self.B, self.coeff * self.s * self.calls)


class UselessTensor(Sound):
    C: Float[Parameter, " o"]

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return Sound.param_specs(d_in, d_out, cfg) | {"C": ParamSpec((d_out,))}

    def forward(self, x, y, base):
        return super().forward(x, y, base) + 0 * self.C


class ForgetsAnOption(Sound):
    """Its config loses the rank on the way to JSON."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AdapterConfig):
        r: int = 16

        def to_json(self):
            return "{}"


class ReusesBlindly(Sound):
    """What it keeps depends on B too."""

    def forward(self, x, y, base):
        BA = self.reuse(lambda: self.B @ self.A, self.A)
        return y + maps.lin(x, BA) * (self.coeff * self.s)


class ReusesAtAnyCoefficient(Sound):
    def forward(self, x, y, base):
        BA = self.reuse(lambda: self.coeff * self.s * self.B @ self.A, self.A, self.B)
        return y + maps.lin(x, BA)


class ReusesOnAnyBase(Sound):
    """The map depends on the base weight: rows are scaled by what W makes of the rows of A."""

    def forward(self, x, y, base):
        strength = self.reuse(lambda: base(self.A).square().sum(), self.A)
        return y + maps.low_rank(x, self.A, self.B) * (self.coeff * self.s * strength)


def places(shape):
    """A permutation of the last axis."""
    return torch.randperm(shape[-1]).expand(shape).float()


class Places(Sound):
    """Lawful: reads the input in an order that is drawn at the start and kept as whole numbers."""

    p: Float[Tensor, " i"]

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return Sound.param_specs(d_in, d_out, cfg) | {"p": ParamSpec((d_in,), places, trainable=False)}

    def forward(self, x, y, base):
        return super().forward(x[..., self.p.flatten().long()], y, base)


class PlacesInAMatrix(Places):
    """A matrix is kept in the dtype of the base weight, where places above 256 are rounded."""

    p: Float[Tensor, "1 i"]

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return Sound.param_specs(d_in, d_out, cfg) | {"p": ParamSpec((1, d_in), places, trainable=False)}


class PlacesInAWideMatrix(PlacesInAMatrix):
    """Lawful: its config keeps matrices in float32."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AdapterConfig):
        buffer_dtype: torch.dtype | None = torch.float32


class ReusesOldPlaces(Places):
    """What it keeps depends on p too."""

    def forward(self, x, y, base):
        A = self.reuse(lambda: self.A[:, self.p.long()], self.A)
        return y + maps.low_rank(x, A, self.B, self.coeff * self.s)


class Drops(Sound):
    """Lawful: dropout while it trains."""

    def forward(self, x, y, base):
        return super().forward(nn.functional.dropout(x, 0.3, self.training), y, base)


class Watched(Drops):
    """Lawful: says in which modes it was called."""

    modes: ClassVar[set[bool]] = set()

    def forward(self, x, y, base):
        self.modes.add(self.training)
        return super().forward(x, y, base)


class DropsInEval(Sound):
    def forward(self, x, y, base):
        return super().forward(nn.functional.dropout(x, 0.3), y, base)


class DrawsInEval(Sound):
    """A random number that nothing comes of still moves the stream that a sampling model draws from."""

    def forward(self, x, y, base):
        torch.rand(1)
        return super().forward(x, y, base)


class TrainingStays(Sound):
    """A call in train mode leaves something behind."""

    seen = 0.0

    def forward(self, x, y, base):
        if self.training:
            self.seen = 0.1
        return super().forward(x, y, base) + self.coeff * self.seen


class HasLinearChildren(Sound):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.extra = nn.Linear(2, 2)


FAULTS = {
    WritesTheWeight: "check_base_is_never_written",
    StartsElsewhere: "check_starts_at_identity",
    DeadGradient: "check_gradients_flow",
    DetachedTensor: "check_gradients_flow",
    UnsavedState: "check_save_load_is_exact",
    ZeroDimensional: "check_specs_are_declarative",
    WrongShape: "check_shapes_match_annotations",
    WrongKind: "check_shapes_match_annotations",
    IgnoresCoeff: "check_coeff_is_continuous",
    JumpsWithCoeff: "check_coeff_is_continuous",
    FollowsTheOriginal: "check_deepcopy_is_independent",
    LeaksDtype: "check_follows_dtype",
    DrawsAtLoad: "check_save_load_is_exact",
    FactorizesAtLoad: "check_save_load_is_exact",
    MixesTokens: "check_calls_and_shapes",
    NotAffine: "check_affine",
    HigherRank: "check_rank",
    Amplifies: "check_contraction",
    NotOrthogonal: "check_isometry",
    BreaksTheGraph: "check_compiles",
    CountsCalls: "check_checkpointing_is_exact",
    UselessTensor: "check_every_tensor_matters",
    ForgetsAnOption: "check_config_goes_to_json_and_back",
    ReusesBlindly: "check_reuses_nothing_stale",
    ReusesAtAnyCoefficient: "check_reuses_nothing_stale",
    ReusesOnAnyBase: "check_reuses_nothing_stale",
    ReusesOldPlaces: "check_reuses_nothing_stale",
    PlacesInAMatrix: "check_places_are_exact",
    DropsInEval: "check_repeats_itself",
    DrawsInEval: "check_repeats_itself",
    TrainingStays: "check_repeats_itself",
    HasLinearChildren: "check_specs_are_declarative",
}


def test_every_check_that_is_written_runs():
    themes = importlib.import_module("lora_lite.testing.checks")  # `lora_lite.testing.checks` is the function
    modules = [importlib.import_module(f"{themes.__name__}.{m.name}") for m in pkgutil.iter_modules(themes.__path__)]
    written = {f for module in modules for name, f in vars(module).items() if name.startswith("check_")}
    assert written == {check.function for check in checks(Sound)}
    assert len(modules) > 5


@pytest.mark.parametrize(
    "cls",
    [Sound, Drops, *(pytest.param(c, marks=pytest.mark.long) for c in (Places, PlacesInAWideMatrix))],
    ids=lambda cls: cls.__name__,
)
def test_a_sound_variant_passes_every_check(cls):
    check_variant(cls)


def test_the_suite_trains_in_train_mode_and_compares_in_eval_mode():
    """A dropout is at work in the checks of training steps, and in none that compares outputs, but for its own."""
    modes = {}
    for check in checks(Watched):
        if (name := str(check).partition("-")[2]) != "check_compiles":
            Watched.modes = modes.setdefault(name, set())
            check()
    trained = {"check_gradients_flow", "check_base_is_never_written", "check_checkpointing_is_exact", "check_repeats_itself"}
    assert {name for name, seen in modes.items() if True in seen} == trained
    assert sum(seen == {False} for seen in modes.values()) > 10


@pytest.mark.parametrize(
    ("cls", "told"),
    [
        (DropsInEval, "two calls in eval mode differ: what is random in training asks self.training"),
        (DrawsInEval, "two calls in eval mode draw random numbers"),
        (PlacesInAMatrix, r"p holds whole numbers that torch.bfloat16 rounds on a layer 1024 wide: .*buffer_dtype"),
    ],
)
def test_the_first_check_that_breaks_says_what_is_wrong(cls, told):
    with pytest.raises(AssertionError, match=told):
        check_variant(cls)


@pytest.mark.parametrize("cls", FAULTS, ids=lambda cls: cls.__name__)
def test_a_planted_fault_is_caught_by_the_check_meant_for_it(cls):
    meant = {str(check).partition("-")[2]: check for check in checks(cls)}[FAULTS[cls]]
    with pytest.raises((AssertionError, RuntimeError, AttributeError)):
        meant()


def test_init_called_at_load_is_caught(monkeypatch):
    """The fault sits in the library here: a load that starts the adapter again."""
    import lora_lite.core.load as io

    original = io.restore

    def restarting(path, adapters, *rest):
        for adapter in adapters.values():
            adapter.init(torch.zeros(adapter.d_out, adapter.d_in))
        original(path, adapters, *rest)

    monkeypatch.setattr(io, "restore", restarting)
    (meant,) = (check for check in checks(Sound) if str(check).endswith("check_save_load_is_exact"))
    with pytest.raises(AssertionError, match="must not start"):
        meant()


class KeepsOne(Sound):
    """One tensor that decay must spare."""

    @staticmethod
    def param_specs(d_in, d_out, cfg):
        return Sound.param_specs(d_in, d_out, cfg) | {"A": ParamSpec((cfg.r, d_in), kaiming, identity=0)}


def test_decay_of_every_tensor_is_caught(monkeypatch):
    """The fault sits in the library: one optimizer group for all."""

    def groups(model, lr, weight_decay):
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": lr, "weight_decay": weight_decay}]

    (meant,) = (check for check in checks(KeepsOne) if str(check).endswith("check_decay_spares_identity"))
    meant()
    monkeypatch.setitem(meant.function.__globals__, "param_groups", groups)
    with pytest.raises(AssertionError, match="decay moved A"):
        meant()


def test_a_failed_attach_that_leaves_a_trace_is_caught(monkeypatch):
    """The fault sits in the library: nothing is undone."""
    monkeypatch.setattr(Before, "restore", lambda self: None)
    (meant,) = (check for check in checks(Sound) if str(check).endswith("check_failed_attach_leaves_no_trace"))
    with pytest.raises(AssertionError, match="interruption in install"):
        meant()


def test_checking_a_class_leaves_the_registry_as_it_was():
    before = ll.names()
    check_variant(Sound, SoundConfig(r=2))
    assert ll.names() == before
    assert RanklessConfig().r is None
