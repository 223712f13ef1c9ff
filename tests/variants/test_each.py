"""What many variants show in the same shape, as tables of cases: which tensors learn, how many numbers, where decay ends."""

import pytest

import lora_lite as ll
from lora_lite.testing.formula import adapted, live_gradients
from tests.oracles.layer import check_decay_ends_at_base, check_finite_differences

ARROW = ll.AntiPaSTOArrowConfig(r=8, block=3)
GAINS = [ll.config(name, r=8) for name in ("antipasto", "antipasto_corda", "antipasto_asvd")]


def named(value):
    return type(value).__name__.removesuffix("Config") if isinstance(value, ll.AdapterConfig) else None


FACTORS = {"w1_a", "w1_b", "w2_a", "w2_b"}
LEARNS = [
    *((cfg, {"g"}, {"g"}) for cfg in GAINS),
    (ARROW, {"M", "g"}, {"M", "g"}),
    (ll.BOFTConfig(n_factors=2), {"q"}, {"q"}),
    (ll.BOFTConfig(n_factors=2, scale=True), {"q", "g"}, {"q", "g"}),
    (ll.CorDAConfig(r=4, method="ipm"), {"dA", "dB"}, {"dA", "dB"}),
    (ll.CorDAConfig(r=4, method="kpm"), {"dA", "dB"}, {"dA", "dB"}),
    (ll.DoRAConfig(r=4), {"B", "m"}, {"A", "B", "m"}),
    (ll.HRAConfig(r=4), {"V"}, {"V"}),
    (ll.IA3Config(), {"g"}, {"g"}),
    (ll.IA3FFConfig(), {"g"}, {"g"}),
    (ll.LoHaConfig(r=3), {"w2_b"}, FACTORS),  # the two forms of test_loha.py
    (ll.LoHaConfig(r=4), {"w2_b"}, FACTORS),
    (ll.LoRAConfig(r=4), {"B"}, {"A", "B"}),
    (ll.LoRAConfig(r=4, init="orthogonal"), {"dA", "dB"}, {"dA", "dB"}),
    (ll.OFTConfig(block_size=8), {"q"}, {"q"}),
    (ll.OLoRAConfig(r=4), {"dA", "dB"}, {"dA", "dB"}),
    (ll.PiSSAConfig(r=4), {"dA", "dB"}, {"dA", "dB"}),
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
    *((ll.BOFTConfig(n_factors=m, scale=s), m * 24 * 3 // 2 + 32 * s, 0) for m in (1, 2) for s in (False, True)),
    (ll.CorDAConfig(r=4), PAIR, PAIR),
    (ll.DoRAConfig(r=4), PAIR + 32, 32),
    (ll.HRAConfig(r=4), 4 * 24, 0),
    (ll.IA3Config(), 32, 0),
    (ll.IA3FFConfig(), 24, 0),
    (ll.LoHaConfig(r=4), 2 * PAIR, 0),
    (ll.LoRAConfig(r=4), PAIR, 0),
    (ll.LoRAXSConfig(r=8), 8 * 8, 32 * 8),
    (ll.OFTConfig(block_size=8), 24 * 7 // 2, 0),
    (ll.OLoRAConfig(r=4), PAIR, PAIR),
    (ll.PiSSAConfig(r=4), PAIR, PAIR),
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
    (ll.VeRAConfig(r=4), {"spared": {"lambda_d"}}),
]


@pytest.mark.parametrize(("cfg", "options"), DECAYING, ids=named)
def test_heavy_decay_ends_at_the_base_model(cfg, options):
    check_decay_ends_at_base(cfg, **options)


@pytest.mark.parametrize(
    ("cfg", "size"), [*((cfg, 1.0) for cfg in GAINS), (ARROW, 1.0), (ll.LoRAXSConfig(r=3), 0.3)], ids=named
)
def test_gradients_are_those_of_finite_differences(cfg, size):
    check_finite_differences(cfg, size=size)


@pytest.mark.parametrize(
    ("cfg", "rate"), [(ll.IA3Config(), 5e-3), (ll.IA3FFConfig(), 5e-3), (ll.OLoRAConfig(r=4), 3e-4)], ids=named
)
def test_recommended_rate(cfg, rate):
    model, _ = adapted(cfg)
    assert {group["lr"] for group in ll.param_groups(model)} == {rate}


@pytest.mark.parametrize("field", ["r", "alpha"])
@pytest.mark.parametrize("config", [ll.IA3Config, ll.IA3FFConfig])
def test_rank_and_alpha_are_refused(config, field):
    with pytest.raises(ll.LoraLiteError, match=rf"{config.__name__}\({field}=8.*This method has no {field}"):
        config(**{field: 8})
