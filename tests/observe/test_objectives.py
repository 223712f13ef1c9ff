"""Objectives: golden values of the formulas, sums, generators, text."""

import copy
import pickle

import pytest
import torch

import lora_lite as ll
from lora_lite.observe.objectives import formulas
from lora_lite.observe.seen import Forward, Seen
from tests.oracles import golden

O = ll.objectives
D = torch.float64

GOLDEN = {
    "diversity": (0.866289078281, 0.885100535158),
    "repulsion": (0.196650140972, 0.192593173268),
    "l1": (0.630709403080, 0.644752973880),
    "uniform .5": (0.015883901048, 0.016877886085),
    "uniform .85": (0.000415193046, 0.000445205029),
    "ring .5": (0.014295510943, 0.014768150324),
    "ring .85": (0.000373673742, 0.000389554400),
}


def values(hidden, maps, mask, mask_of_maps):
    """Every formula on hidden states (B, T, D) and maps [(B, H, T, T)] with the mask (B, T) of each."""
    X = hidden[mask.bool()]
    found = {
        "diversity": torch.cat([formulas.head_similarity(P, mask_of_maps) for P in maps]).mean(),
        "repulsion": formulas.repulsion(X),
        "l1": formulas.l1(X),
        "uniform .5": formulas.expected_gossip(X, 0.5),
        "uniform .85": formulas.expected_gossip(X, 0.85),
        "ring .5": formulas.expected_gossip(X, 0.5, "ring"),
        "ring .85": formulas.expected_gossip(X, 0.85, "ring"),
    }
    return {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize("column", [0, 1], ids=list(golden.MASKS))
def test_golden_values(column):
    mask = list(golden.MASKS.values())[column]
    found = values(golden.hidden(), golden.maps(), mask, mask[:, :4])
    assert found == pytest.approx({key: row[column] for key, row in GOLDEN.items()}, abs=1e-6)


def padded(tensor, before, axes, fill):
    """Three more places of `fill` along each axis, `before` of them in front."""
    for axis in axes:
        shape = list(tensor.shape)
        ends = [tensor.new_full([*shape[:axis], n, *shape[axis + 1 :]], fill) for n in (before, 3 - before)]
        tensor = torch.cat([ends[0], tensor, ends[1]], axis)
    return tensor


@pytest.mark.parametrize("before", [0, 3])
def test_padding_changes_nothing(before):
    mask = golden.RAGGED
    found = values(
        padded(golden.hidden(), before, [1], 9.0),
        [padded(P, before, [2, 3], 0.5) for P in golden.maps()],
        padded(mask, before, [1], 0),
        padded(mask[:, :4], before, [1], 0),
    )
    assert found == pytest.approx({key: row[1] for key, row in GOLDEN.items()}, abs=1e-6)


def test_values_that_are_known_without_a_table():
    pair = torch.tensor([[1, 0, 0], [0.8, 0.6, 0]], dtype=D)
    for tau, expected in ((0.5, 0.09), (0.85, 0.0)):
        for draw in ("uniform", "ring"):
            peers = O.hidden.PEERS[draw](2, 5, torch.Generator().manual_seed(1))
            assert float(formulas.gossip(pair, peers, tau)) == pytest.approx(expected, abs=1e-12)
            assert float(formulas.expected_gossip(pair, tau, draw)) == pytest.approx(expected, abs=1e-12)
    assert float(formulas.repulsion(torch.eye(4, dtype=D))) == pytest.approx(torch.e**-2)
    assert float(formulas.repulsion(torch.ones(4, 3, dtype=D))) == pytest.approx(1)
    assert float(formulas.repulsion(torch.zeros(4, 3, dtype=D))) == pytest.approx(1)
    assert float(formulas.repulsion(torch.tensor([[1.0, 2], [-1, -2]], dtype=D))) == pytest.approx(torch.e**-4)
    equal = torch.ones(4, 3, dtype=D)
    assert float(formulas.expected_gossip(equal, 0.85)) == pytest.approx(0.15**2)
    same = torch.rand(1, 1, 4, 4, dtype=D).expand(1, 3, 4, 4)
    assert formulas.head_similarity(same, torch.ones(1, 4)).tolist() == pytest.approx([1])
    apart = torch.stack([torch.eye(4, dtype=D), torch.eye(4, dtype=D).roll(1, 0)])[None]
    assert formulas.head_similarity(apart, torch.ones(1, 4)).tolist() == [0]


def test_fewer_than_two_rows_or_heads_count_nothing():
    for n in (0, 1):
        X = torch.ones(n, 3, dtype=D)
        assert float(formulas.repulsion(X)) == float(formulas.expected_gossip(X, 0.5)) == 0
        assert float(formulas.gossip(X, torch.zeros(n, 8, dtype=torch.long), 0.5)) == 0
    assert float(formulas.l1(torch.ones(0, 3))) == 0
    assert formulas.head_similarity(torch.ones(1, 1, 2, 2), torch.ones(1, 2)).tolist() == [0]
    left_out = formulas.head_similarity(torch.ones(2, 2, 2, 2), torch.tensor([[1, 1], [0, 0]]))
    assert left_out.tolist() == pytest.approx([1])


@pytest.mark.parametrize("draw", ["uniform", "ring"])
def test_two_million_drawn_pairs_average_to_the_expectation(draw):
    X = golden.hidden()[golden.RAGGED.bool()]
    peers = O.hidden.PEERS[draw](len(X), 2_000_000 // len(X), torch.Generator().manual_seed(0))
    assert not (peers == torch.arange(len(X))[:, None]).any()
    for tau in (0.5, 0.85):
        assert float(formulas.gossip(X, peers, tau)) == pytest.approx(float(formulas.expected_gossip(X, tau, draw)), rel=0.01)


def test_ring_favours_the_next_row_and_uniform_nobody():
    n = 8
    for draw, share in (("uniform", 1 / 7), ("ring", 2 / 8)):
        peers = O.hidden.PEERS[draw](n, 50_000, torch.Generator().manual_seed(0))
        following = (peers == (torch.arange(n)[:, None] + 1) % n).double().mean()
        assert float(following) == pytest.approx(share, rel=0.02)


def test_both_members_of_a_pair_get_a_gradient():
    X = torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 1]], dtype=D, requires_grad=True)
    formulas.gossip(X, torch.tensor([[1], [2], [1]]), 0.5).backward()
    assert X.grad is not None
    assert X.grad[0].any()
    assert X.grad[1].any()
    assert not X.grad[2].any()


def test_subset_keeps_order_and_draws_only_where_it_must():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert formulas.subset(5, 5, generator).tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(generator.get_state(), before)
    chosen = formulas.subset(100, 10, generator)
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    assert len(chosen) == 10


def seen(hidden=None, mask=None):
    """As a capture block leaves it, with hidden states given."""
    hidden = golden.hidden() if hidden is None else hidden
    forward = Forward(None if mask is None else mask.bool(), with_grad=False, hidden=[hidden])
    return Seen(torch.nn.Identity(), dict.fromkeys(("hidden", "mask"), "A test"), [forward])


def test_a_sum_weighs_its_terms_and_keeps_unweighted_parts():
    one, other = O.Repulsion(weight=2), O.L1(weight=0.5)
    both = one + other
    assert both.needs == {"hidden", "mask"}
    total = both(seen())
    assert set(both.parts) == {"repulsion", "l1"}
    assert both.parts["repulsion"] == pytest.approx(GOLDEN["repulsion"][0])
    assert float(total) == pytest.approx(2 * GOLDEN["repulsion"][0] + 0.5 * GOLDEN["l1"][0])
    assert float(one(seen())) == pytest.approx(2 * GOLDEN["repulsion"][0])
    assert one.parts.keys() == {"repulsion"}


def test_terms_of_one_kind_are_numbered():
    both = O.Gossip(tau=0.5) + O.L1() + O.Gossip(tau=0.85)
    assert list(both.named) == ["gossip", "l1", "gossip.2"]
    assert set(both.state_dict()) == {"gossip", "gossip.2"}


@pytest.mark.parametrize("objective", [O.Gossip(weight=0), O.Gossip(weight=0) + O.L1(weight=0), O.parse("none")], ids=str)
def test_weight_zero_needs_nothing_and_leaves_the_bits_of_a_loss(objective):
    assert objective.needs == frozenset()
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        loss = torch.rand((), dtype=dtype)
        total = loss + objective(Seen(torch.nn.Identity(), {}))
        assert total.dtype == dtype
        assert torch.equal(total, loss)
    assert objective.parts == {}


def test_a_term_of_weight_zero_beside_others_is_not_measured():
    both = O.Gossip(weight=0) + O.L1(weight=1)
    before = both.state_dict()["gossip"].clone()
    both(seen())
    assert both.parts.keys() == {"l1"}
    assert torch.equal(both.state_dict()["gossip"], before)


def test_draws_come_from_the_objective_s_own_generator():
    """Same seed, same values; the global stream stands still; the next call draws anew."""
    rows = torch.randn(40, 10, 6, dtype=D, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (O.Gossip(tau=0.0, seed=s) for s in (1, 1, 2))
    a, b = float(first(seen(rows))), float(first(seen(rows)))
    assert a == float(again(seen(rows)))
    assert a != b
    assert a != float(other(seen(rows)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_travels_with_a_checkpoint(tmp_path):
    rows = torch.randn(40, 10, 6, dtype=D, generator=torch.Generator().manual_seed(3))
    trained = O.Gossip(tau=0.0) + O.Repulsion()
    trained(seen(rows))
    torch.save(trained.state_dict(), tmp_path / "objective.pt")
    resumed = O.Gossip(tau=0.0) + O.Repulsion()
    resumed.load_state_dict(torch.load(tmp_path / "objective.pt"))
    assert float(trained(seen(rows))) == float(resumed(seen(rows)))


def test_measuring_never_shifts_training():
    rows = torch.randn(40, 10, 6, dtype=D, generator=torch.Generator().manual_seed(3))
    training = O.Gossip(tau=0.0) + O.L1()
    before = training.state_dict()
    assert float(training.evaluating()(seen(rows))) == float(training.evaluating()(seen(rows)))
    assert float(training.evaluating(1)(seen(rows))) != float(training.evaluating()(seen(rows)))
    assert torch.equal(training.state_dict()["gossip"], before["gossip"])


def test_objectives_compare_copy_and_pickle():
    assert O.Gossip(tau=0.5) == O.Gossip(tau=0.5) != O.Gossip()
    rows = torch.randn(40, 10, 6, dtype=D, generator=torch.Generator().manual_seed(3))
    objective = O.Gossip(tau=0.0) + O.L1()
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert twin == objective
        assert float(twin(seen(rows))) == float(copy.deepcopy(objective)(seen(rows)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gossip:5", O.Gossip(weight=5)),
        ("gossip:5,tau=.5", O.Gossip(weight=5, tau=0.5)),
        ("gossip, draw=ring , k=4", O.Gossip(draw="ring", k=4)),
        ("repulsion:2+l1:.1", O.Repulsion(weight=2) + O.L1(weight=0.1)),
        ("repulsion:1e+1 + l1:-1e-3", O.Repulsion(weight=10) + O.L1(weight=-0.001)),
        ("diversity", O.HeadDiversity(weight=0.02)),
        ("repulsion", O.Repulsion(weight=0.02)),
        ("sparse", O.L1(weight=0.0005)),
        ("gossip", O.Gossip(weight=1, tau=0.85, k=8, max_vectors=256)),
        ("combined", O.HeadDiversity(weight=0.01) + O.Repulsion(weight=0.01) + O.L1(weight=0.0002)),
        ("combined+gossip:0", O.parse("combined") + O.Gossip(weight=0)),
        ("sparse:.1", O.L1(weight=0.1)),
        ("none", O.Sum()),
        ("delta_norm:1e-3,adapter=skill", O.DeltaNorm(weight=1e-3, adapter="skill")),
    ],
)
def test_text_reads_as_an_objective(text, expected):
    assert O.parse(text) == expected


def test_every_name_that_parse_knows_is_read():
    assert {"diversity", "repulsion", "sparse", "gossip", "combined"} <= set(O.names())
    for name in O.names():
        O.parse(name)
