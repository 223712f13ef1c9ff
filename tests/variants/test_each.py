"""What many variants show in the same shape, as tables of cases: lawful options, tensors that learn, numbers, ends of decay."""

import pytest
import torch

import lora_lite as ll
from lora_lite.testing import checks, toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import adapted, live_gradients
from tests.oracles.files import entry, own
from tests.oracles.kinds import of_options
from tests.oracles.layer import check_decay_ends_at_base, check_finite_differences, check_ignores_bias, check_rotates_input
from tests.variants.test_lora_ga import loss_fn

ARROW = ll.AntiPaSTOArrowConfig(r=8, block=3)
DPLR = ll.AntiPaSTODPLRConfig(r=8, k=3)
ROADS = {"road_1": 32, "road_2": 64, "road_4": 128}  # numbers for 32 outputs
GAINS = [ll.config(name, r=8) for name in ("antipasto", "antipasto_corda", "antipasto_asvd")]


def named(value):
    return type(value).__name__.removesuffix("Config") if isinstance(value, ll.AdapterConfig) else None


OPTIONS = {
    "boft": [{"block_size": 4, "n_factors": 2}, {"block_size": 2, "n_factors": 3, "scale": True}],
    "corda": [
        {"r": 4, "method": "kpm"},
        {"r": 4, "metric": "sqrt", "split": "balanced", "alpha": 8, "damp": 0.0},
        {"r": 4, "call_norm": True},
    ],
    "delora": [
        {"r": 4, "start": "zero_b", "lambda0": 2.0},
        {"r": 4, "norm": "fro", "lambda0": 1.0, "lr_lambda": 0.01, "buffer_dtype": torch.bfloat16},
    ],
    "eva": [
        {"r": 2, "alpha": 8, "rho": 1.0, "max_moment_dim": 0},
        {"r": 4, "alpha": 8, "adjust_alpha": False, "rank_pattern": {"o_proj": 7}},
    ],
    "hra": [{"r": 2}],
    "lora_xs": [{"r": 8, "alpha": 16.0, "rslora": True, "include_bias": True}],
    "oft": [{"block_size": 2}, {"block_size": 8}],
    "olora": [{"r": 4, "alpha": 9.0, "rslora": True, "buffer_dtype": torch.bfloat16}],
    "pissa": [
        {"r": 4, "alpha": 9.0, "svd": "exact"},
        {"r": 4, "svd": "fast", "rslora": True, "buffer_dtype": torch.bfloat16},
    ],
    "randlora": [{"r": 8, "save_shared": False}, {"r": 5, "alpha": 40, "rslora": True}, {"r": 40}],  # 5 does not divide a layer
    "road": [{"mode": "road_2"}, {"mode": "road_4", "group_size": 8}],
    "vera": [{"r": 8, "save_shared": False}, {"r": 64, "d_init": -0.5}],
}
KIN = {  # the code of antipasto_rot and antipasto_ablate, which have tests of their own, of corda, or of a line above
    "antipasto_arrow": [
        {"r": 8, "block": 1, "suppress_only": True, "include_bias": True},
        {"r": 8, "block": 7, "basis": "select", "block_by": "score"},
    ],
    "antipasto_asvd": [
        {"r": 8, "asvd_stat": "rms", "asvd_alpha": 1.0},
        {"r": 8, "suppress_only": True, "include_bias": True},
    ],
    "antipasto_corda": [
        {"r": 8, "basis": "corda_full", "damp": 0.1},
        {"r": 8, "suppress_only": True, "include_bias": True},
    ],
    "antipasto_dplr": [
        {"r": 8, "k": 8, "suppress_only": True, "include_bias": True},
        {"r": 8, "k": 1, "basis": "asvd"},
    ],
    "eva": [{"r": 4, "alpha": 8, "rslora": True, "center": False, "mask": "none"}],
    "lora_ga": [
        {"r": 4, "loss_fn": loss_fn, "direction": "ArBr", "rslora": False},
        {"r": 4, "loss_fn": loss_fn, "scale": "peft_stable"},
    ],
    "lora_xs": [{"r": 8, "basis": "corda", "damp": 0.1}],
}


def promises(table, *marks):
    """Every check with every set of options; but a mean over calls depends by its meaning on how many tokens a call has."""
    for name, sets in table.items():
        for number, fields in enumerate(sets):
            by_call = fields.get("call_norm") or fields.get("scale") == "peft_stable"
            for check in checks(name, ll.config(name, **fields)):
                if not (by_call and check.function.__name__ == "check_needs_data"):
                    yield pytest.param(check, marks=marks or of_options(check), id=f"{check}-{number}{'-long' * bool(marks)}")


@pytest.mark.parametrize("check", [*promises(OPTIONS), *promises(KIN, pytest.mark.long)])
def test_every_option_is_lawful(check):
    check()


FACTORS = {"w1_a", "w1_b", "w2_a", "w2_b"}
LEARNS = [
    *((cfg, {"g"}, {"g"}) for cfg in GAINS),
    (ARROW, {"M", "g"}, {"M", "g"}),
    (DPLR, {"g", "B"}, {"g", "A", "B"}),
    *(
        (ll.AntiPaSTORotConfig(r=8, rotate=rotate), {"d", *thetas}, {"d", *thetas})
        for rotate, thetas in (("V", {"theta_v"}), ("U", {"theta_u"}), ("both", {"theta_v", "theta_u"}))
    ),
    (ll.BOFTConfig(n_factors=2), {"q"}, {"q"}),
    (ll.BOFTConfig(n_factors=2, scale=True), {"q", "g"}, {"q", "g"}),
    (ll.CorDAConfig(r=4, method="ipm"), {"dA", "dB"}, {"dA", "dB"}),
    (ll.CorDAConfig(r=4, method="kpm"), {"dA", "dB"}, {"dA", "dB"}),
    (ll.DeLoRAConfig(r=4), {"A", "B", "lam"}, {"A", "B", "lam"}),
    (ll.DeLoRAConfig(r=4, start="zero_b"), {"B"}, {"A", "B", "lam"}),
    (ll.DoRAConfig(r=4), {"B", "m"}, {"A", "B", "m"}),
    (ll.EVAConfig(r=4, alpha=8), {"B"}, {"A", "B"}),
    (ll.HRAConfig(r=4), {"V"}, {"V"}),
    (ll.IA3Config(), {"g"}, {"g"}),
    (ll.IA3FFConfig(), {"g"}, {"g"}),
    (ll.LoHaConfig(r=3), {"w2_b"}, FACTORS),  # the two forms of test_loha.py
    (ll.LoHaConfig(r=4), {"w2_b"}, FACTORS),
    (ll.LoRAConfig(r=4), {"B"}, {"A", "B"}),
    (ll.LoRAConfig(r=4, init="orthogonal"), {"dA", "dB"}, {"dA", "dB"}),
    (ll.LoRAGAConfig(r=4, loss_fn=loss_fn), {"dA", "dB"}, {"dA", "dB"}),
    (ll.OFTConfig(block_size=8), {"q"}, {"q"}),
    (ll.OLoRAConfig(r=4), {"dA", "dB"}, {"dA", "dB"}),
    (ll.PiSSAConfig(r=4), {"dA", "dB"}, {"dA", "dB"}),
    *((ll.RoAdConfig(mode=mode), {"theta", "a"}, {"theta", "a"}) for mode in ROADS),
    (ll.VeRAConfig(r=4), {"lambda_b"}, {"lambda_b", "lambda_d"}),
]


@pytest.mark.parametrize(("cfg", "first", "second"), LEARNS, ids=named)
def test_gradient_pattern(cfg, first, second):
    """The tensors with a gradient at the first and at the second step from the start."""
    assert live_gradients(cfg) == [first, second]


PAIR = 4 * (24 + 32)  # A and B of rank 4 on the layer of 24 x 32
NUMBERS = [
    *((cfg, 8, 32 * 8 + 8) for cfg in GAINS),
    (ARROW, 3 * 3 + 8 - 3, 32 * 8),
    (DPLR, 8 + 2 * 8 * 3, 32 * 8 + 8),
    *(
        (ll.AntiPaSTORotConfig(r=8, rotate=rotate), 8 + sides * 8 * 3 // 2, 32 * 8 + 8)
        for rotate, sides in (("V", 1), ("U", 1), ("both", 2))
    ),
    *((ll.BOFTConfig(n_factors=m, scale=s), m * 24 * 3 // 2 + 32 * s, 0) for m in (1, 2) for s in (False, True)),
    (ll.CorDAConfig(r=4), PAIR, PAIR),
    (ll.DoRAConfig(r=4), PAIR + 32, 32),
    (ll.HRAConfig(r=4), 4 * 24, 0),
    (ll.IA3Config(), 32, 0),
    (ll.IA3FFConfig(), 24, 0),
    (ll.LoHaConfig(r=4), 2 * PAIR, 0),
    (ll.LoRAConfig(r=4), PAIR, 0),
    (ll.LoRAGAConfig(r=4, loss_fn=loss_fn), PAIR, PAIR),
    (ll.LoRAXSConfig(r=8), 8 * 8, 32 * 8),
    (ll.OFTConfig(block_size=8), 24 * 7 // 2, 0),
    (ll.OLoRAConfig(r=4), PAIR, PAIR),
    (ll.PiSSAConfig(r=4), PAIR, PAIR),
    *((ll.RoAdConfig(mode=mode, group_size=size), numbers, 0) for mode, numbers in ROADS.items() for size in (None, 8)),
]


@pytest.mark.parametrize(("cfg", "trained", "frozen"), NUMBERS, ids=named)
def test_trained_and_frozen_numbers(cfg, trained, frozen):
    model, _ = adapted(cfg)
    assert (ll.status(model).trainable, ll.status(model).frozen) == (trained, frozen)


DECAYING = [
    *((cfg, {"size": 1.0}) for cfg in GAINS),
    (ll.IA3Config(), {}),
    (ll.IA3FFConfig(), {}),
    (ll.OLoRAConfig(r=4), {}),
    (ll.PiSSAConfig(r=4), {}),
    (ll.RandLoRAConfig(r=4), {"spared": {"gam"}}),
    *((ll.RoAdConfig(mode=mode, group_size=8), {"size": 1.0}) for mode in ROADS),
    (ll.VeRAConfig(r=4), {"spared": {"lambda_d"}}),
]


@pytest.mark.parametrize(("cfg", "options"), DECAYING, ids=named)
def test_heavy_decay_ends_at_the_base_model(cfg, options):
    check_decay_ends_at_base(cfg, **options)


@pytest.mark.parametrize(
    ("cfg", "size"),
    [
        *((cfg, 1.0) for cfg in (*GAINS, ARROW, DPLR)),
        *((ll.AntiPaSTORotConfig(r=8, rotate=rotate, cap="plane"), 0.3) for rotate in ("V", "U", "both")),
        (ll.AntiPaSTORotConfig(r=8, rotate="both"), 0.3),
        (ll.LoRAXSConfig(r=3), 0.3),
    ],
    ids=named,
)
def test_gradients_are_those_of_finite_differences(cfg, size):
    check_finite_differences(cfg, size=size)


@pytest.mark.parametrize(
    ("cfg", "rate"), [(ll.IA3Config(), 5e-3), (ll.IA3FFConfig(), 5e-3), (ll.OLoRAConfig(r=4), 3e-4)], ids=named
)
def test_recommended_rate(cfg, rate):
    model, _ = adapted(cfg)
    assert {group["lr"] for group in ll.param_groups(model)} == {rate}


REFUSED = [
    *(("antipasto_ablate", {"r": 8, "k": k}, r"k is 1 to r=8") for k in (9, 0)),
    ("antipasto_ablate", {"r": 8, "init_alpha": 1.5}, r"init_alpha, wake is in \[0, 1\]"),
    ("antipasto_ablate", {"r": 8, "wake": -0.1}, r"init_alpha, wake is in \[0, 1\]"),
    ("antipasto_ablate", {"r": 8, "seed_direction": "mean"}, "seed_direction: one of 'auto'"),
    ("antipasto_ablate", {"r": 8, "seed_direction": "random", "add_contrast": False}, "add_contrast is True"),
    ("boft", {"block_size": 1}, "(?s)block_size=1.*at least 2"),
    ("boft", {"block_size": 3, "n_factors": 2}, "(?s)block_size=3.*even where n_factors > 1"),
    ("boft", {"n_factors": 0}, "(?s)n_factors=0.*at least 1"),
    ("boft", {"r": 8}, "(?s)This method has no r"),
    *(
        ("delora", {field: value}, rf"{field}={value}\) cannot be built. {field} is a finite number")
        for field in ("lambda0", "lr_lambda")
        for value in (0.0, -1.0, float("inf"), float("nan"))
    ),
    ("delora", {"alpha": 8.0}, r"alpha=8.0\) cannot be built. This method has no alpha"),
    ("delora", {"rslora": True}, r"rslora=True\) cannot be built. rslora: one of False"),
    ("delora", {"start": "zero_a"}, r"start='zero_a'\) cannot be built. start: one of 'frozen_copy', 'zero_b'"),
    ("delora", {"norm": "row"}, r"norm='row'\) cannot be built. norm: one of 'column', 'fro'"),
    ("hra", {"alpha": 8.0}, r"HRAConfig\(alpha=.*cannot be built"),
    ("hra", {"rslora": True}, r"HRAConfig\(rslora=.*cannot be built"),
    *(
        (name, {field: 8}, rf"{ll.get(name).Config.__name__}\({field}=8.*This method has no {field}")
        for name in ("ia3", "ia3_ff")
        for field in ("r", "alpha")
    ),
    *(("oft", {"block_size": size}, "(?s)block_size=.*at least 2") for size in (1, 0, -4)),
    ("oft", {"r": 8}, "This method has no r"),
    ("olora", {"svd": "exact"}, r"OLoRAConfig has no field 'svd'"),
    ("pissa", {"tol": 0}, r"tol=0.0\) cannot be built. tol is above 0"),
    ("pissa", {"svd": "exact", "tol": 0.01}, r'tol=0.01\) cannot be built.*read by svd="fast"'),
    ("pissa", {"svd": "random"}, r"svd='random'\) cannot be built. svd: one of 'exact', 'fast', 'auto'"),
    *(
        ("road", {"group_size": size}, rf"group_size={size}\) cannot be built. group_size is even and at least 2")
        for size in (7, 0, -2)
    ),
    ("road", {"mode": "road_3"}, r"mode='road_3'\) cannot be built. mode: one of 'road_1', 'road_2', 'road_4'"),
    ("road", {"r": 8}, r"This method has no r: the value would be ignored"),
    *(
        ("vera", {"d_init": value}, r"d_init=.*(nothing would train|is a finite number)")
        for value in (0.0, float("nan"), float("inf"))
    ),
    ("vera", {"alpha": 16}, r"alpha=16.*no alpha"),
]


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_bad_options_are_refused_by_the_config(name, fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        ll.get(name).Config(**fields)


ROT = {"r": 8, "targets": ("o_proj",)}
UNFIT = [
    ("antipasto_rot", {**ROT, "block_size": 3}, {}, r"o_proj.*block_size=3 does not divide 8"),
    ("antipasto_rot", {**ROT, "block_size": 1}, {}, "block_size is 2 or more"),
    *(("antipasto_rot", {**ROT, "max_angle": angle}, {}, "max_angle is above 0 and below pi") for angle in (0.0, 3.2)),
    ("antipasto_rot", {**ROT, "theta_init": -0.1}, {}, "theta_init is 0 or a finite number above it"),
    ("antipasto_rot", {**ROT, "cap": "entry"}, {}, "cap: one of 'block', 'plane'"),
    ("antipasto_rot", {**ROT, "rotate": "W"}, {}, "rotate: one of 'V', 'U', 'both'"),
    *((name, {"block_size": 10}, {}, r"o_proj.*block_size=10 does not divide 24") for name in ("boft", "oft")),
    ("hra", {"r": 5}, {}, r"o_proj.*r=5 is odd"),
    *((name, {"r": 25}, {}, r"o_proj.*r=25 is larger than the layer allows") for name in ("olora", "pissa")),
    ("road", {"group_size": 12, "targets": ("o_proj",)}, {}, r"(?s)o_proj.*group_size=12.*an even divisor of 32.*group_size=8"),
    (
        "road",
        {"group_size": 16, "targets": ("o_proj",)},
        {"d_out": 30},
        r"(?s)o_proj.*group_size=16.*an even divisor of 30.*group_size=10",
    ),
    *(
        ("road", {"group_size": size}, {"d_out": 31}, r"(?s)o_proj.*an even divisor of 31, and there is none.*exclude=")
        for size in (None, 2)
    ),
]


@pytest.mark.parametrize(("name", "fields", "shape", "message"), UNFIT)
def test_options_that_do_not_fit_the_layer_are_refused(name, fields, shape, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        adapted(ll.config(name, **fields), **shape)


TURNS = [  # at these sizes of random parameters and these coefficients
    *((ll.HRAConfig(r=16), size, (1.0,)) for size in (0.3, 3.0, 100.0)),
    *(
        (cfg, size, (1.0, 0.5, -0.7, 2.0))
        for cfg in (ll.OFTConfig(), *(ll.BOFTConfig(block_size=b, n_factors=m) for b, m in ((8, 1), (8, 2), (4, 4))))
        for size in (0.1, 1.0)
    ),
]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("cfg", "size", "coeffs"), TURNS, ids=named)
def test_map_of_the_input_is_a_rotation_at_any_parameters(cfg, size, coeffs, dtype, tolerance):
    _, adapter = adapted(cfg, d_in=96, dtype=dtype, size=size)
    for coeff in coeffs:
        check_rotates_input(adapter, tolerance, coeff)


@pytest.mark.parametrize(
    ("cfg", "stay"),
    [(ll.OFTConfig(block_size=8), True), *((ll.BOFTConfig(n_factors=2, scale=scale), not scale) for scale in (False, True))],
    ids=named,
)
def test_lengths_of_and_angles_between_neurons_stay_without_scale_only(cfg, stay):
    model, _ = adapted(cfg, size=1.0)
    W = model.o_proj.weight
    changed = W + ll.delta_weight(model, "o_proj").double()
    assert error(changed, W) > 0.1
    assert (error(changed @ changed.T, W @ W.T) < 1e-6) is stay  # delta_weight is float32


@pytest.mark.parametrize(
    ("cfg", "count"),
    [(ll.OFTConfig(block_size=8), 17), (ll.BOFTConfig(n_factors=2, scale=True), 17), (ll.AntiPaSTORotConfig(r=8), 20)],
    ids=named,
)
def test_more_than_sixteen_coefficients_in_one_batch_are_refused(cfg, count):
    for dtype in (torch.float32, torch.float64):
        model, _ = adapted(cfg, dtype=dtype)
        x = toy.inputs(count, 24, dtype=dtype)
        with ll.scale(model, torch.linspace(0, 1, count)), pytest.raises(ll.LoraLiteError, match=f"{count} distinct values"):
            model(x)
        with ll.scale(model, torch.linspace(0, 1, 16).repeat(2)[:count]):
            assert model(x).isfinite().all()


shared = pytest.mark.parametrize(("name", "trained"), [("randlora", ("lam", "gam")), ("vera", ("lambda_b", "lambda_d"))])


@shared
def test_change_of_a_shared_pair_does_not_depend_on_the_bias(name, trained):
    check_ignores_bias(ll.config(name, r=4))


@shared
def test_seed_chooses_the_shared_pair(name, trained):
    pairs = [ll.attach(toy.toy(), ll.config(name, r=4, seed=seed)).layers["blocks.0.q_proj"] for seed in (0, 0, 1)]
    for matrix in "AB":
        first, same, other = (getattr(a, matrix) for a in pairs)
        assert torch.equal(first, same)
        assert not torch.equal(first, other)


@shared
@pytest.mark.parametrize("save_shared", [True, False])
def test_file_holds_the_shared_pair_once_or_its_hash(name, trained, save_shared, tmp_path):
    model, fresh, x = toy.toy(), toy.toy(), toy.inputs(3, 5, 24)
    toy.perturb(ll.attach(model, ll.config(name, r=8, save_shared=save_shared)))
    ll.save(model, tmp_path / "a.safetensors")
    names = {f"blocks.{n}.{p}_proj.{tensor}" for n in (0, 1) for p in ("q", "o", "up", "down") for tensor in trained}
    assert set(own(tmp_path / "a.safetensors")) == names | ({"*.A", "*.B"} if save_shared else set())
    assert set(entry(tmp_path / "a.safetensors")["drawn"]) == (set() if save_shared else {"A", "B"})
    ll.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x))
