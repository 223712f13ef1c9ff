"""The bases of the output-subspace methods against dense decompositions, and what their parent does around a core."""

import pytest
import torch

import lora_lite as ll
from lora_lite.families.basis import contrast, scores
from lora_lite.families.seeding import leading as leading_directions
from lora_lite.families.subspace import OutputSubspace, read_off, strengths
from lora_lite.testing import checks, toy
from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64, adapted
from tests.oracles.layer import check_rest_stays

BASES = ("svd", "corda", "corda_full", "asvd", "select")
DATA_BASES = BASES[1:]
R, I, O = 12, 24, 40
OF_CORDA = ("antipasto", "antipasto_corda")  # the methods with this basis and statistics of outputs
OTHERS = [("antipasto_corda", "corda"), ("antipasto_corda", "corda_full"), ("antipasto_asvd", "asvd")]
METHODS = [name for name in ll.names() if issubclass(ll.get(name), OutputSubspace)]


def batches(scale: float = 1.0):
    data = toy.batches(I, dtype=torch.float64)
    for batch in data:
        batch["x"] = batch["x"] * scale
    return data


def kept(data):
    return torch.cat([batch["x"][batch["attention_mask"].bool()] for batch in data])


def based(basis, data=None, d_in=I, d_out=O, bias=True, size=0.0, name="antipasto", **fields):
    """(W, adapter) of one float64 layer."""
    data = batches() if data is None and basis != "svd" else data
    cfg = ll.config(name, r=R, basis=basis, **fields)
    model, adapter = adapted(cfg, d_in, d_out, bias, size=size, data=data)
    return model.o_proj.weight.detach(), adapter


def moment(data=None):
    x = kept(data or batches())
    return x.T @ x / len(x)


def projector(U):
    return U @ U.T


def leading(M, r=R):
    return projector(torch.linalg.svd(M).U[:, :r])


def root(C):
    values, vectors = torch.linalg.eigh(C)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def lost(W, U, C):
    """E|(W - U U^T W) x|^2."""
    rest = W - projector(U) @ W
    return float((rest @ C @ rest.T).trace())


START = ("specs", "starts_at", "save_load", "failed_attach", "follows_dtype", "stacks", "needs_data", "rank")


@pytest.mark.parametrize("basis", DATA_BASES)
@pytest.mark.parametrize(
    "check",
    [check for check in checks("antipasto") if any(part in check.function.__name__ for part in START)],
    ids=lambda check: check.function.__name__,
)
def test_every_basis_is_lawful(check, basis):
    check.function(check.cls, ll.AntiPaSTOConfig(r=8, basis=basis))


@pytest.mark.parametrize("d_out", [16, 24, 40])
@pytest.mark.parametrize("basis", BASES)
def test_columns_are_orthonormal(basis, d_out):
    _, adapter = based(basis, d_out=d_out)
    assert error(adapter.U.T @ adapter.U, torch.eye(R, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("d_out", [16, 40])
def test_bases_are_the_singular_vectors_that_their_names_say(d_out):
    C, mean = moment(), kept(batches()).abs().mean(0)
    q = mean.sqrt()
    wanted = {
        "svd": lambda W: W,
        "corda": lambda W: W @ root(C),
        "corda_full": lambda W: W @ C,
        "asvd": lambda W: W * (q + 1e-6 * q.max()),
    }
    for basis, M in wanted.items():
        W, adapter = based(basis, d_out=d_out)
        assert error(projector(adapter.U), leading(M(W))) < T64, basis


@pytest.mark.parametrize("name", OF_CORDA)
def test_any_root_of_the_moment_gives_the_corda_basis(name):
    W, adapter = based("corda", name=name)
    assert error(projector(adapter.U), leading(W @ torch.linalg.cholesky(moment()))) < T64


@pytest.mark.parametrize("name", OF_CORDA)
def test_corda_loses_the_least_output_energy(name):
    C = moment()
    W, corda = based("corda", name=name)
    tail = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)[R:].sum()
    assert abs(lost(W, corda.U, C) - float(tail)) < 1e-9
    for basis in BASES:
        assert lost(W, based(basis)[1].U, C) >= lost(W, corda.U, C) - 1e-12
    assert lost(W, based("svd")[1].U, C) > 1.5 * lost(W, corda.U, C)


def test_bases_differ():
    bases = [projector(based(basis)[1].U) for basis in BASES]
    for index, P in enumerate(bases):
        for Q in bases[:index]:
            assert error(P, Q) > 1e-3


def test_select_takes_the_best_scored_vectors_in_their_order():
    C = moment()
    W, adapter = based("select")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    score = S * (Vh @ C @ Vh.T).diagonal().sqrt()
    best = score.topk(R).indices.sort().values
    assert not torch.equal(best, torch.arange(R))
    assert error(projector(adapter.U), projector(U[:, best])) < T64
    assert ((adapter.U.T @ U[:, best]).diagonal().abs() > 1 - 1e-9).all()
    assert (adapter.sigma.diff() < 0).all()


def test_score_is_the_rms_of_an_output_coordinate():
    x = kept(batches())
    W, _ = based("select")
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    y = x @ W.T
    stats = {"y_moment": {"o_proj": y.T @ y / len(x)}}
    got = scores(ll.AntiPaSTOConfig(r=R, basis="select"), stats, "o_proj", U)
    assert error(got, (y @ U).square().mean(0).sqrt()) < T64
    assert error(got, S * (x @ Vh.T).square().mean(0).sqrt()) < T64


@pytest.mark.parametrize("positions", ["last", "all"])
def test_select_by_contrast_takes_the_vectors_along_the_difference_of_means(positions):
    data = {"positive": batches()[:2], "negative": batches(0.5)[2:]}
    W, adapter = based("select", data, select_score="contrast", positions=positions)

    def mean(part):
        if positions == "all":
            return kept(part).mean(0)
        rows = [(x, m) for batch in part for x, m in zip(batch["x"], batch["attention_mask"])]
        return torch.stack([x[m.bool()][-1] for x, m in rows]).mean(0)

    m = W @ (mean(data["positive"]) - mean(data["negative"]))
    U = torch.linalg.svd(W, full_matrices=False).U
    best = (U.T @ m).abs().topk(R).indices.sort().values
    assert error(projector(adapter.U), projector(U[:, best])) < T64
    assert abs(adapter.report["contrast_capture"] - float((adapter.U.T @ m).norm() / m.norm())) < 1e-9


from_data = pytest.mark.parametrize(
    ("name", "basis", "fields"),
    [
        *(("antipasto", basis, {}) for basis in DATA_BASES),
        *((name, basis, {} if basis == "asvd" else {"damp": 0.1}) for name, basis in OTHERS),
    ],
)


@from_data
def test_the_unit_of_the_activations_does_not_matter(name, basis, fields):
    scaled, adapter = (based(basis, data, name=name, **fields)[1] for data in (batches(10.0), batches()))
    assert error(projector(scaled.U), projector(adapter.U)) < 1e-9


@from_data
def test_padding_has_no_influence(name, basis, fields):
    noisy = batches()
    for batch in noisy:
        batch["x"][batch["attention_mask"] == 0] = 1e3
    assert torch.equal(based(basis, noisy, name=name, **fields)[1].U, based(basis, name=name, **fields)[1].U)


@pytest.mark.parametrize("basis", ["corda", "corda_full"])
def test_damping_adds_to_the_diagonal_of_the_moment(basis):
    C = moment()
    damped = C + 0.3 * C.trace() / I * torch.eye(I, dtype=torch.float64)
    W, adapter = based(basis, damp=0.3)
    assert error(projector(adapter.U), leading(W @ (root(damped) if basis == "corda" else damped))) < T64
    assert error(projector(adapter.U), projector(based(basis)[1].U)) > 1e-3


def test_asvd_at_exponent_zero_is_svd_and_its_statistic_can_be_the_rms():
    assert error(projector(based("asvd", asvd_alpha=0.0)[1].U), projector(based("svd")[1].U)) < 1e-9
    q = kept(batches()).square().mean(0).sqrt().sqrt()
    W, adapter = based("asvd", asvd_stat="rms")
    assert error(projector(adapter.U), leading(W * (q + 1e-6 * q.max()))) < T64
    assert error(projector(adapter.U), projector(based("asvd")[1].U)) > 1e-4


def test_sigma_is_the_strength_of_each_direction():
    W, adapter = based("svd")
    assert error(adapter.sigma, torch.linalg.svdvals(W)[:R]) < T64
    W, adapter = based("corda")
    assert error(adapter.sigma, (adapter.U.T @ W).norm(dim=1)) < T64


def test_directions_of_no_strength_are_read_as_zero():
    h, sigma = torch.tensor([[8.0, 5.0, 5.0, 1e-3]]), torch.tensor([4.0, 1e-9, 0.0, 1e-3])
    assert torch.equal(read_off(h, sigma), torch.tensor([[2.0, 0.0, 0.0, 1.0]]))
    assert torch.equal(read_off(torch.ones(1, 2), torch.zeros(2)), torch.zeros(1, 2))
    sigma.requires_grad_(True)
    read_off(h, sigma).sum().backward()
    assert sigma.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 24), (24, 32), (256, 64)])
def test_what_rounding_leaves_of_a_weight_of_low_rank_is_no_strength(shape, dtype):
    o, i = shape
    W = (toy.inputs(o, 3, dtype=torch.float64) @ toy.inputs(3, i, dtype=torch.float64, seed=5)).to(dtype).double()
    U = torch.linalg.svd(W, full_matrices=False)[0]
    sigma = strengths(W, U)
    assert (sigma > 0).sum() == 3
    full = (toy.inputs(o, i, dtype=torch.float64) / 3).to(dtype).double()
    assert error(strengths(full, torch.linalg.svd(full, full_matrices=False)[0]), torch.linalg.svdvals(full)) < T64


@pytest.mark.parametrize(("name", "basis"), [*(("antipasto", basis) for basis in BASES), *OTHERS[:2]])
def test_capture_is_the_share_of_output_energy(name, basis):
    W, adapter = based(basis, batches(), name=name)
    y = kept(batches()) @ W.T
    captured = float((y @ adapter.U).square().sum() / y.square().sum())
    if basis == "asvd":
        assert not adapter.report
    else:
        assert abs(adapter.report["capture"] - captured) < 1e-9
    assert 0.3 < captured < 1


def test_without_data_nothing_is_reported():
    assert not based("svd")[1].report


@pytest.mark.parametrize("name", OF_CORDA)
def test_bfloat16_activations_cost_no_capture(name):
    model = toy.one(I, O, dtype=torch.bfloat16)
    data = [{**batch, "x": batch["x"].bfloat16()} for batch in batches()]
    cfg = ll.config(name, r=R, basis="corda", buffer_dtype=torch.float32)
    low = ll.attach(model, cfg, data).layers["o_proj"]
    W = model.o_proj.weight.detach().double()
    exact = toy.one(I, O)
    with torch.no_grad():
        exact.o_proj.weight.copy_(W)
    wide = [{**batch, "x": batch["x"].float()} for batch in data]
    high = ll.attach(exact, cfg, wide).layers["o_proj"]
    C = moment([{**batch, "x": batch["x"].double()} for batch in data])
    energies = torch.linalg.eigvalsh(W @ C @ W.T).flip(0)
    for least in (lost(W, high.U.double(), C), float(energies[R:].sum())):
        assert abs(lost(W, low.U.double(), C) - least) / float(energies.sum()) < 1e-6


def test_frozen_matrix_follows_the_base_and_sigma_stays_in_float32():
    adapter = ll.attach(toy.one(dtype=torch.bfloat16), ll.AntiPaSTOConfig(r=4)).layers["o_proj"]
    assert (adapter.U.dtype, adapter.sigma.dtype, adapter.g.dtype) == (torch.bfloat16, torch.float32, torch.float32)


@pytest.mark.parametrize("basis", BASES)
def test_signs_of_singular_vectors_do_not_matter(basis):
    model, adapter = adapted(ll.AntiPaSTOConfig(r=R, basis=basis), I, O, data=None if basis == "svd" else batches())
    x = toy.inputs(5, I, dtype=torch.float64)
    before = model(x)
    adapter.U.mul_(torch.tensor([1.0, -1.0] * (R // 2), dtype=torch.float64))
    assert error(model(x), before) < T64


def moved(name, **fields):
    """(model, adapter) far from the start; positive, so that a tensor held in a range acts too."""
    model, adapter = adapted(ll.config(name, r=8, **fields), I, O, size=1.0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.abs_()
    return model, adapter


@pytest.mark.parametrize("name", METHODS)
def test_the_rest_of_the_output_stays(name):
    check_rest_stays(*moved(name))


@pytest.mark.parametrize("name", METHODS)
def test_the_bias_is_left_alone_unless_asked(name):
    for include in (False, True):
        model, _ = moved(name, include_bias=include)
        change = error(model(torch.zeros(1, I, dtype=torch.float64))[0], model.o_proj.bias)
        assert change > 1e-3 if include else change < 1e-12


def test_the_rank_may_differ_by_layer():
    model = toy.toy()
    layers = ll.attach(model, ll.AntiPaSTOConfig(r=8, rank_pattern={"q_proj": 3})).layers
    assert layers["blocks.0.q_proj"].U.shape == (32, 3)
    assert layers["blocks.0.o_proj"].U.shape == (24, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"damp": 0.1}, "damp is 0.0 with the other options"),
        ({"basis": "asvd", "damp": 0.1}, "damp is 0.0 with the other options"),
        ({"basis": "corda", "asvd_alpha": 0.3}, "asvd_alpha is 0.5 with"),
        ({"asvd_stat": "rms"}, "asvd_stat is 'abs_mean' with"),
        ({"select_score": "contrast"}, "select_score is 'rms' with"),
        ({"basis": "select", "positions": "all"}, "positions is 'last' with"),
        ({"basis": "corda", "damp": -0.1}, "damp or asvd_alpha is 0 or more"),
        ({"basis": "eigen"}, "basis: one of 'svd', 'corda'"),
        ({"alpha": 8.0}, "This method has no alpha"),
    ],
)
def test_options_without_effect_and_bad_values_are_refused(fields, message):
    with pytest.raises(ll.LoraLiteError, match=message):
        ll.AntiPaSTOConfig(**fields)


def test_bad_data_is_refused():
    model = toy.one(I, O)
    with pytest.raises(ll.LoraLiteError, match="y_moment"):
        ll.attach(model, ll.AntiPaSTOConfig(r=4, basis="corda"))
    with pytest.raises(ll.LoraLiteError, match=r"o_proj: 3 calibration tokens are too few.*\n*.*At least 4"):
        ll.attach(model, ll.AntiPaSTOConfig(r=4, basis="corda"), [{"x": toy.inputs(3, I)}])
    contrasted = ll.AntiPaSTOConfig(r=4, basis="select", select_score="contrast")
    with pytest.raises(ll.LoraLiteError, match="needs labelled calibration data"):
        ll.attach(model, contrasted, toy.batches(I))
    with pytest.raises(ll.LoraLiteError, match="o_proj: the mean outputs on positive and negative data are equal"):
        ll.attach(model, contrasted, {"positive": toy.batches(I), "negative": toy.batches(I)})
    with pytest.raises(ll.LoraLiteError, match="r=25 is larger"):
        ll.attach(model, ll.AntiPaSTOConfig(r=25, targets=("o_proj",)))


def test_the_bias_cancels_in_the_contrast():
    data = {"positive": batches()[:2], "negative": batches()[2:]}
    captures = [
        adapted(ll.AntiPaSTOConfig(r=4, basis="select", select_score="contrast"), I, O, bias, size=0, data=data)[1].report
        for bias in (True, False)
    ]
    assert abs(captures[0]["contrast_capture"] - captures[1]["contrast_capture"]) < 1e-6


def test_contrast_is_a_unit_vector_along_the_difference_of_means():
    cfg = ll.AntiPaSTOConfig(r=4, positions="last")
    sums = {"positive": torch.tensor([6.0, 0.0]), "negative": torch.tensor([0.0, 4.0])}
    stats = {f"y_sum/last:{k}": {"p": v} for k, v in sums.items()}
    stats |= {"n/last:positive": {"p": torch.tensor([2.0])}, "n/last:negative": {"p": torch.tensor([1.0])}}
    stats |= {f"y_sq/last:{k}": {"p": v.square()} for k, v in sums.items()}
    assert error(contrast(cfg, stats, "p", torch.zeros(1)), torch.tensor([0.6, -0.8])) < 1e-6


def test_leading_directions_stay_orthonormal_where_the_moment_has_too_small_a_rank():
    first = toy.inputs(6, dtype=torch.float64)
    V = leading_directions(torch.outer(first, first), 4, first)
    assert error(V.T @ V, torch.eye(4)) < 1e-9
    assert error(V[:, 0], first / first.norm()) < 1e-12


def test_a_child_without_tensors_or_core_is_told_so():
    with pytest.raises(ll.LoraLiteError, match="core_specs is missing"):
        OutputSubspace.param_specs(8, 8, ll.AntiPaSTOConfig(r=4))
    with pytest.raises(ll.LoraLiteError, match=r"core\(self, h\) returns"):
        OutputSubspace.core(None, torch.zeros(1))
