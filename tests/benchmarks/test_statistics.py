"""Paired statistics: golden figures, what is computed for how many pairs, and what may be claimed."""

import math

import numpy as np
import pytest

pytest.importorskip("scipy")

from benchmarks.common.statistics import described, paired, sign_flip_p

GOLDEN = (-0.0722, 0.0096, -0.0562, 0.0008, -0.0066, -0.0502)


def test_golden_figures():
    found = paired(GOLDEN, [0.0] * 6)
    assert found["mean"] == pytest.approx(-0.029133, abs=1e-6)
    assert found["sd"] == pytest.approx(0.034453, abs=1e-6)
    assert found["t"] == pytest.approx(-2.07126, abs=1e-5)
    assert found["p"] == pytest.approx(0.09309, abs=1e-5)
    assert found["interval"] == pytest.approx([-0.0653, 0.0070], abs=5e-5)
    assert found["sign_flip_p"] == 12 / 64
    assert found["bootstrap"] == pytest.approx([-0.054, -0.006], abs=2e-3)


def test_bootstrap_interval_alone_is_no_finding():
    found = paired(GOLDEN, [0.0] * 6)
    assert found["bootstrap"][1] < 0
    assert not found["finding"]


def test_differences_are_ours_less_theirs_pair_by_pair():
    found = paired([1.0, 2.0, 4.0], [0.5, 2.5, 3.0])
    assert found["differences"] == [0.5, -0.5, 1.0]
    assert found["n"] == 3


@pytest.mark.parametrize("n", [1, 2])
def test_below_three_pairs_there_is_no_statistic(n):
    found = paired([1.0] * n, [0.0] * n)
    assert found["mean"] == 1.0
    assert all(found[key] is None for key in ("sd", "t", "p", "interval", "sign_flip_p", "bootstrap", "percent"))


def test_below_six_pairs_nothing_is_claimed():
    ours = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0]
    assert not paired(ours[:5], [0.0] * 5)["finding"]
    assert paired(ours[:5], [0.0] * 5)["p"] < 1e-6
    assert paired(ours, [0.0] * 6)["finding"]


def test_a_claim_needs_both_tests():
    """One pair against five: t can be sure while signs are not, and the other way round."""
    d = np.array([1.0, 1.1, 0.9, 1.0, 1.05, -0.2])
    found = paired(d, np.zeros(6))
    assert found["p"] < 0.05 < found["sign_flip_p"]
    assert not found["finding"]


def test_sign_flips_count_all_ways_to_put_signs():
    assert sign_flip_p(np.array([1.0, 1.0, 1.0])) == 2 / 8
    assert sign_flip_p(np.array([0.0, 0.0, 0.0])) == 1.0
    assert sign_flip_p(np.array([3.0, 1.0, -1.0])) == 4 / 8 + 2 / 8
    assert sign_flip_p(np.ones(17)) is None


def test_differences_without_spread_have_no_t_and_signs_decide():
    found = paired([1.0] * 6, [0.0] * 6)
    assert found["t"] is None
    assert found["sign_flip_p"] == 2 / 64
    assert found["finding"]
    assert not paired([0.0] * 6, [0.0] * 6)["finding"]


def test_percentages_need_a_baseline_that_is_clearly_positive():
    assert paired([1.1, 2.2, 3.3], [1.0, 2.0, 3.0])["percent"] == pytest.approx(10)
    assert paired([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0])["percent"] is None
    assert paired([1.0, 2.0, 3.0], [0.1, 5.0, -3.0])["percent"] is None


def test_a_value_that_is_no_number_leaves_no_statistic():
    found = paired([1.0, math.nan, 2.0], [0.0, 0.0, 0.0])
    assert found["t"] is None
    assert described(found) == "-"


def test_t_is_scipys():
    from scipy import stats

    rng = np.random.default_rng(3)
    a, b = rng.normal(size=9), rng.normal(size=9)
    found, theirs = paired(a, b), stats.ttest_rel(a, b)
    assert found["t"] == pytest.approx(theirs.statistic)
    assert found["p"] == pytest.approx(theirs.pvalue)
    assert found["interval"] == pytest.approx([*theirs.confidence_interval(0.95)])
