"""Singular vectors against torch.linalg.svd in float64, on the spectra that break cheaper ways."""

import pytest
import torch

from lora_lite.errors import LoraLiteWarning
from lora_lite.mathematics import spectrum as svd
from lora_lite.mathematics.spectrum import (
    congruent,
    gram,
    leading_eigenpairs,
    left_svd,
    nearly_all,
    orth,
    positive_definite,
    top_eigenvectors,
)
from lora_lite.testing import toy
from lora_lite.testing.checks import error

SHAPES = [(48, 80), (80, 48), (48, 48)]
K = torch.arange(1, 49, dtype=torch.float64)
SPECTRA = {
    "power": K**-0.7,
    "outliers": torch.cat([torch.tensor([5e3, 2e3], dtype=torch.float64), K[:46] ** -0.3]),
    "exponential": torch.exp(-K / 6),
    "deficient": torch.where(K <= 10, 1 / K, 0.0),
}


def matrix(values, shape, seed=1):
    """A matrix of these singular values between random orthonormal bases."""
    U = torch.linalg.qr(toy.inputs(shape[0], len(values), dtype=torch.float64, seed=seed)).Q
    V = torch.linalg.qr(toy.inputs(shape[1], len(values), dtype=torch.float64, seed=seed + 1)).Q
    return U * values @ V.T


def flat(*shape, dtype=torch.float32):
    return toy.inputs(*shape, dtype=dtype, seed=8)


def apart(U, reference):
    """Sine of the largest principal angle between the columns' spans."""
    U, reference = U.double(), reference.double()
    return float(torch.linalg.matrix_norm(U - reference @ (reference.T @ U), 2))


def check_orthonormal(U, tolerance):
    assert error(U.T @ U, torch.eye(U.shape[1])) < tolerance


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("spectrum", ["power", "outliers", "exponential"])
@pytest.mark.parametrize("r", [1, 8, 20])
def test_exact_is_the_svd(r, spectrum, shape):
    M = matrix(SPECTRA[spectrum], shape)
    wanted, values, _ = torch.linalg.svd(M)
    U, S = left_svd(M, r)
    assert U.shape == (shape[0], r)
    assert S.shape == (r,)
    check_orthonormal(U, 1e-12)
    assert apart(U, wanted[:, :r]) < 1e-6
    assert float((S / values[:r] - 1).abs().max()) < 1e-7
    signs = (U * wanted[:, :r]).sum(0).sign()
    assert error(U * signs, wanted[:, :r]) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_in_float32_survives_outliers_that_a_float32_gram_matrix_does_not(shape):
    M = matrix(SPECTRA["outliers"], shape).float()
    wanted, values, _ = torch.linalg.svd(M.double())
    U, S = left_svd(M, 20)
    assert U.dtype is S.dtype is torch.float32
    check_orthonormal(U, 1e-6)
    assert apart(U, wanted[:, :20]) < 1e-5
    assert float((S / values[:20] - 1).abs().max()) < 1e-6
    naive = torch.linalg.eigh(M @ M.T).eigenvectors.flip(1)[:, :20]
    assert apart(naive, wanted[:, :20]) > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_all_directions_rebuild_the_matrix(shape):
    M = matrix(SPECTRA["power"], shape)
    U, S = left_svd(M, 48)
    assert error(U @ U.T @ M, M) < 1e-12
    rows = U.T @ M
    assert error(rows @ rows.T, torch.diag(S.square())) < 1e-10
    assert bool((S.diff() <= 0).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_missing_directions_are_orthonormal_with_value_zero(shape):
    U, S = left_svd(matrix(SPECTRA["deficient"], shape), 20)
    check_orthonormal(U, 1e-12)
    assert error(S[:10], 1 / K[:10]) < 1e-12
    assert float(S[10:].max()) < 1e-7


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("smallest", [False, True])
def test_zero_matrix_has_orthonormal_directions(smallest, shape):
    U, S = left_svd(torch.zeros(shape), 5, smallest=smallest)
    check_orthonormal(U, 1e-6)
    assert not S.any()


def test_directions_of_a_tall_matrix_have_the_sign_of_what_it_makes_of_the_inputs():
    M = matrix(SPECTRA["power"], (80, 48))
    U, S = left_svd(M, 20)
    inputs = torch.linalg.eigh(M.T @ M).eigenvectors.flip(1)[:, :20]
    assert error(U * S, M @ inputs) < 1e-10


@pytest.mark.parametrize("shape", SHAPES)
def test_sign_of_the_matrix_does_not_matter(shape):
    M = matrix(SPECTRA["power"], shape)
    (U, S), (V, R) = left_svd(M, 8), left_svd(-M, 8)
    assert error(R, S) < 1e-12
    assert error((U * V).sum(0).abs(), torch.ones(8)) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e9])
def test_smallest_are_the_last_of_the_svd(condition, shape):
    M = matrix(torch.logspace(0, -torch.tensor(condition).log10().item(), 48, dtype=torch.float64), shape)
    wanted, values, _ = torch.linalg.svd(M, full_matrices=False)
    U, S = left_svd(M, 6, smallest=True)
    check_orthonormal(U, 1e-12)
    assert apart(U, wanted[:, -6:]) < 1e-6
    assert float((S / values[-6:] - 1).abs().max()) < 1e-5
    assert bool((S.diff() < 0).all())


def test_smallest_of_a_tall_deficient_matrix_are_orthonormal_to_what_it_does():
    M = matrix(SPECTRA["deficient"], (80, 48))
    U, S = left_svd(M, 38, smallest=True)
    check_orthonormal(U, 1e-12)
    assert float(S.max()) < 1e-12
    assert float((U.T @ M).abs().max()) < 1e-12


def test_smallest_ignores_the_fast_method():
    M = matrix(SPECTRA["power"], (48, 80))
    assert torch.equal(left_svd(M, 5, "fast", smallest=True)[0], left_svd(M, 5, smallest=True)[0])


# --- fast -------------------------------------------------------------------------------------------------------------


def captured(U, M):
    """|U^T M|^2 over the largest that as many orthonormal directions can have."""
    U, M = U.double(), M.double()
    return float((U.T @ M).square().sum() / torch.linalg.svdvals(M)[: U.shape[1]].square().sum())


def left_over(U, S, M):
    """The largest |M M^T u_k - s_k^2 u_k| / s_k^2."""
    U, q, G = U.double(), S.double().square(), M.double() @ M.double().T
    return float(((G @ U - U * q).norm(dim=0) / q).max())


@pytest.mark.parametrize("shape", [(320, 400), (400, 320)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("spectrum", ["power", "outliers", "exponential", "flat"])
def test_fast_captures_what_its_tolerance_says(spectrum, coarse, dtype, shape, monkeypatch):
    monkeypatch.setattr(svd, "fast_in_bfloat16", lambda device: coarse)
    k = torch.arange(1, 321, dtype=torch.float64)
    values = {
        "power": k**-0.7,
        "outliers": torch.cat([torch.tensor([50.0, 20.0]), k[:318] ** -0.7]),
        "exponential": torch.exp(-k / 20),
    }
    M = flat(*shape, dtype=dtype) if spectrum == "flat" else matrix(values[spectrum], shape).to(dtype)
    exact = left_svd(M, 8)
    monkeypatch.setattr(svd, "exact_left_svd", None)
    for tol in (1e-2, 1e-3):
        U, S = left_svd(M, 8, "fast", tol=tol)
        assert U.dtype is S.dtype is dtype
        check_orthonormal(U, 1e-5)
        assert 1 - tol < captured(U, M) < 1 + 1e-5
        assert bool((S.diff() <= 0).all())
        assert float((S / exact[1] - 1).abs().max()) < 10 * tol
        assert left_over(U, S, M) < 1.1 * tol**0.5 / 3


def test_fast_finds_directions_that_its_start_misses(monkeypatch):
    """The start is orthogonal to the leading direction: rounding brings it in and grows with it; the proof fails without it."""
    n, r = 256, 4
    start = torch.linalg.qr(torch.randn(n, 8, generator=torch.Generator().manual_seed(0)).double())
    u = torch.linalg.qr(torch.cat([start.Q, toy.inputs(n, 1, dtype=torch.float64)], dim=1)).Q[:, -1]
    rest = matrix(torch.arange(n, 0, -1, dtype=torch.float64)[:n] / n, (n, n))
    rest -= torch.outer(u, u @ rest)
    M = rest + 3 * torch.outer(u, torch.ones(n, dtype=torch.float64) / n**0.5)
    G = M @ M.T
    blind = torch.linalg.eigh(rest @ rest.T)
    V, q = blind.eigenvectors[:, -r:].flip(1), blind.eigenvalues[-r:].flip(0)
    assert captured(V, M) < 0.5
    assert not nearly_all(G, V, q, 1e-3)
    U, _ = left_svd(M, r, "fast")
    assert captured(U, M) > 0.999


@pytest.mark.parametrize("tol", [1e-1, 1e-3, 1e-6])
def test_proof_holds_for_what_captures_enough_and_for_nothing_else(tol):
    G = gram(flat(200, 300, dtype=torch.float64), torch.float64)
    values, vectors = torch.linalg.eigh(G)
    V, q = vectors[:, -6:].flip(1), values[-6:].flip(0)
    assert nearly_all(G, V, q, tol)
    assert nearly_all(G, V, q / (1 + 0.4 * tol), tol)
    assert not nearly_all(G, V, q / (1 + 1.1 * tol), tol)
    missed = torch.cat([vectors[:, -5:].flip(1), vectors[:, :1]], dim=1)
    assert not nearly_all(G, missed, torch.cat([q[:5], values[:1]]), tol)


def test_only_what_is_proven_is_exact_and_fast_goes_without(monkeypatch):
    M = matrix(SPECTRA["exponential"], (48, 80))
    monkeypatch.setattr(svd, "nearly_all", lambda *_: False)
    assert leading_eigenpairs(gram(M, torch.float64), 4, 1e-3, 1e-2) is None
    U, _ = svd.fast_left_svd(M, 4, 1e-3)
    assert apart(U, torch.linalg.svd(M).U[:, :4]) < 1e-2


@pytest.fixture
def dtypes(monkeypatch):
    """The dtypes that the fast method multiplies in, on a device that is fast in bfloat16."""
    used, original = [], svd.times_gram
    monkeypatch.setattr(svd, "fast_in_bfloat16", lambda device: True)
    monkeypatch.setattr(svd, "times_gram", lambda rows, M: used.append(M.dtype) or original(rows, M))
    return used


@pytest.mark.parametrize("shape", [(320, 400), (400, 320)])
@pytest.mark.parametrize(
    ("tol", "outlier", "wanted"),
    [
        (1e-3, 1.0, {torch.bfloat16}),
        (1e-3, 10.0, {torch.bfloat16}),
        (1e-3, 100.0, {torch.bfloat16, torch.float32}),  # its rounding is above the other directions
        (5e-4, 1.0, {torch.float32}),
    ],
)
def test_fast_works_in_bfloat16_where_that_is_precise_enough(tol, outlier, wanted, shape, dtypes, monkeypatch):
    values = torch.arange(1, 321, dtype=torch.float64) ** -0.5
    values[0] *= outlier
    M = matrix(values, shape).float()
    monkeypatch.setattr(svd, "exact_left_svd", None)
    U, S = left_svd(M, 8, "fast", tol=tol)
    assert set(dtypes) == wanted
    assert left_over(U, S, M) < 1.1 * tol**0.5 / 3
    assert apart(U[:, :1], matrix(values, shape).svd().U[:, :1]) < 1e-2


def test_fast_falls_back_where_half_the_space_does_not_suffice():
    M = flat(256, 2048)
    assert svd.fast_left_svd(M, 20, 1e-3) is None
    with pytest.warns(LoraLiteWarning, match=r"fast SVD missed tol=0\.001"):
        U, S = left_svd(M, 20, "fast")
    exact = left_svd(M, 20)
    assert torch.equal(U, exact[0])
    assert torch.equal(S, exact[1])


def test_tolerance_decides_between_fast_and_exact():
    M = flat(256, 2048)
    loose, _ = left_svd(M, 20, "fast", tol=0.1)
    assert apart(loose, left_svd(M, 20)[0]) > 1e-3
    with pytest.warns(LoraLiteWarning, match=r"missed tol=1e-12"):
        left_svd(M, 20, "fast", tol=1e-12)


def test_fast_of_nearly_all_directions_is_the_exact_one():
    M = flat(30, 24, dtype=torch.float64)
    with pytest.warns(LoraLiteWarning, match="missed"):
        U, S = left_svd(M, 20, "fast", tol=1e-10)
    wanted, values, _ = torch.linalg.svd(M)
    assert apart(U, wanted[:, :20]) < 1e-10
    assert error(S, values[:20]) < 1e-12


def test_fast_draws_nothing_from_the_global_generator_and_repeats_itself():
    M = matrix(SPECTRA["exponential"], (48, 80))
    state = torch.random.get_rng_state()
    first = left_svd(M, 4, "fast")[0]
    assert torch.equal(state, torch.random.get_rng_state())
    torch.rand(3)
    assert torch.equal(left_svd(M, 4, "fast")[0], first)


@pytest.mark.parametrize(
    ("shape", "r", "fast"),
    [((2049, 2049), 128, True), ((2049, 2049), 129, False), ((2048, 4096), 8, False), ((4096, 2049), 128, True)],
)
def test_auto_is_fast_only_for_few_directions_of_large_matrices(shape, r, fast, monkeypatch):
    monkeypatch.setattr(svd, "fast_left_svd", lambda M, r, tol: ("fast", tol))
    monkeypatch.setattr(svd, "exact_left_svd", lambda M, r, smallest: ("exact", smallest))
    M = torch.empty(shape, device="meta")
    assert left_svd(M, r, "auto", tol=0.5) == (("fast", 0.5) if fast else ("exact", False))
    assert left_svd(M, r, "auto", smallest=True) == ("exact", True)
    assert left_svd(M, r) == ("exact", False)


# --- few directions of a large matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(768, 900), (900, 768)])
@pytest.mark.parametrize("spectrum", ["flat", "outliers", "repeated", "deficient"])
def test_few_directions_of_a_large_matrix_are_those_of_the_svd(spectrum, shape, monkeypatch):
    k = torch.arange(1, 769, dtype=torch.float64)
    values = {
        "outliers": torch.cat([torch.tensor([5e3, 2e3]).double(), k[:766] ** -0.3]),
        "repeated": torch.where(k <= 40, 1.0, 0.5 / k),
        "deficient": torch.where(k <= 20, 1 / k, 0.0),
    }
    M = flat(*shape, dtype=torch.float64) if spectrum == "flat" else matrix(values[spectrum], shape)
    wanted, values, _ = torch.linalg.svd(M, full_matrices=False)
    original, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: sizes.append(len(G)) or original(G))
    U, S = left_svd(M, 12)
    assert max(sizes) < 768
    check_orthonormal(U, 1e-10)
    assert 1 - captured(U, M) < 1e-12
    assert float((S / values[:12] - 1).abs().max()) < 1e-9
    if spectrum != "repeated":
        assert apart(U, wanted[:, :12]) < 1e-4


@pytest.mark.parametrize("shape", [(512, 900), (900, 512), (512, 512)])
@pytest.mark.parametrize(
    ("spectrum", "precise"),
    [("flat", False), ("close", False), ("repeated", False), ("power", True), ("outliers", True), ("deficient", True)],
)
def test_few_directions_in_float32_are_as_precise_as_its_svd(spectrum, precise, shape, monkeypatch):
    """`precise`: values so far apart that float64 is needed, which the float32 attempt must notice itself."""
    k = torch.arange(1, 513, dtype=torch.float64)
    values = {
        "close": torch.where(k <= 12, 2 - k / 24, 1.4 - k / 512),
        "repeated": torch.where(k <= 40, 1.0, 0.5 / k),
        "power": k**-0.7,
        "outliers": torch.cat([torch.tensor([50.0, 20.0]).double(), k[:510] ** -0.3]),
        "deficient": torch.where(k <= 14, 1 / k, 0.0),
    }
    M = flat(*shape) if spectrum == "flat" else matrix(values[spectrum], shape).float()
    U, S, _ = torch.linalg.svd(M)
    theirs = left_over(U[:, :12], S[:12], M)
    dtypes, original = [], svd.gram
    monkeypatch.setattr(svd, "gram", lambda M, dtype: dtypes.append(dtype) or original(M, dtype))
    U, S = left_svd(M, 12)
    assert U.dtype is S.dtype is torch.float32
    assert (torch.float64 in dtypes) is precise
    assert left_over(U, S, M) < 2 * max(theirs, 1e-6)
    check_orthonormal(U, 2e-6)
    assert 1 - captured(U, M) < 1e-6


def test_large_matrix_that_lacks_directions_falls_back_to_all_eigenvectors():
    M = matrix(torch.where(torch.arange(768) < 4, 1.0, 0.0).double(), (768, 800))
    U, S = left_svd(M, 12)
    check_orthonormal(U, 1e-6)
    assert error(S[:4], torch.ones(4)) < 1e-9
    assert float(S[4:].max()) < 1e-6


@pytest.mark.parametrize(("shape", "side"), [((300, 900), 300), ((900, 300), 300), ((300, 300), 300)])
@pytest.mark.parametrize(("method", "used"), [("exact", "gram"), ("fast", "lanczos")])
def test_shorter_side_is_decomposed(method, used, shape, side, monkeypatch):
    sizes = {"gram": [], "lanczos": []}
    gram, lanczos = svd.gram, svd.lanczos
    monkeypatch.setattr(svd, "gram", lambda M, dtype: sizes["gram"].append(len(M)) or gram(M, dtype))
    monkeypatch.setattr(
        svd, "lanczos", lambda times, like, *rest: sizes["lanczos"].append(len(like)) or lanczos(times, like, *rest)
    )
    left_svd(flat(*shape), 4, method)
    assert sizes == {"gram": [], "lanczos": [], used: [side]}


@pytest.mark.parametrize("shape", [(1, 3), (127, 20), (128, 300), (129, 2049), (300, 2500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_is_the_product(shape, dtype):
    M = flat(*shape)
    G = gram(M, dtype)
    assert G.dtype is dtype
    assert error(G, G.T) < 1e-6
    assert error(G, M.double() @ M.double().T) < (1e-6 if dtype is torch.float32 else 1e-13)
    assert error(gram(M.T, dtype), M.double().T @ M.double()) < (1e-6 if dtype is torch.float32 else 1e-13)


@pytest.mark.parametrize(("o", "i"), [(1, 3), (130, 90), (90, 300)])
def test_congruent_is_the_product_and_symmetric(o, i):
    W, C = flat(o, i, dtype=torch.float64), gram(flat(i, i + 5, dtype=torch.float64), torch.float64)
    G = congruent(W, C)
    assert error(G, W @ C @ W.T) < 1e-13
    assert error(G, G.T) < 1e-13


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300])
def test_positive_definite_is_what_the_smallest_eigenvalue_says(n):
    G = gram(flat(n, n + 50, dtype=torch.float64), torch.float64)
    eye = torch.eye(n, dtype=torch.float64)
    least = torch.linalg.eigvalsh(G)[0]
    assert positive_definite(G - (1 - 1e-9) * least * eye)
    assert not positive_definite(G - (1 + 1e-9) * least * eye)


# --- eigenvectors and orthonormal bases -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_eigenvectors_are_the_largest_in_descending_order(dtype):
    values = torch.linspace(-3, 5, 24, dtype=torch.float64)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    Q = torch.linalg.qr(toy.inputs(24, 24, dtype=torch.float64)).Q
    G = (Q * values @ Q.T).to(dtype)
    vectors, found = top_eigenvectors(G, 6)
    assert vectors.dtype is found.dtype is torch.float64
    assert vectors.shape == (24, 6)
    check_orthonormal(vectors, 1e-12)
    assert error(found, values.sort(descending=True).values[:6]) < (1e-12 if dtype is torch.float64 else 1e-6)
    assert error(G.double() @ vectors, vectors * found) < (1e-12 if dtype is torch.float64 else 1e-6)


@pytest.mark.parametrize("columns", [1, 2, 7, 20])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_orth_spans_its_columns(dtype, tolerance, columns):
    V = toy.inputs(20, columns, dtype=dtype)
    Q = orth(V)
    assert Q.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    check_orthonormal(Q, tolerance)
    assert error(Q @ (Q.T @ V.to(Q.dtype)), V) < tolerance


def test_orth_of_one_column_keeps_its_direction_and_of_zero_is_zero():
    v = toy.inputs(20, 1)
    assert error(orth(v), v / v.norm()) < 1e-6
    assert error(orth(-v), -v / v.norm()) < 1e-6
    assert not orth(torch.zeros(20, 1)).any()


@pytest.mark.parametrize("columns", [1, 3])
def test_orth_has_the_gradient_of_its_definition(columns):
    V = toy.inputs(8, columns, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda V: orth(V) @ orth(V).T, V)
