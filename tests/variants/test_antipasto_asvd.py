"""What ASVD's statistic makes of the gain's directions; the rest is in tests/families/test_oriented_gains.py."""

import torch

from lora_lite.testing.checks import error
from lora_lite.testing.formula import T64
from tests.families.test_oriented_gains import ASVD, R, oriented
from tests.families.test_subspace import batches, kept, leading, projector


def test_channels_of_one_size_give_the_plain_decomposition():
    signs = torch.where(kept(batches()) > 0, 1.0, -1.0).double()
    _, W, adapter = oriented(ASVD, [{"x": 3 * signs}])
    assert error(projector(adapter.U), leading(W)) < 1e-9
    _, W, adapter = oriented(ASVD, asvd_alpha=0.0)
    assert error(projector(adapter.U), leading(W)) < 1e-9
    assert error(projector(oriented(ASVD)[2].U), leading(W)) > 1e-3


def test_sums_of_batch_means_give_the_same_directions_for_batches_of_one_length():
    whole = [{"x": batch["x"]} for batch in batches()]
    _, W, adapter = oriented(ASVD, whole)
    q = sum(batch["x"].abs().mean((0, 1)) for batch in whole) ** 0.5
    assert error(projector(adapter.U), leading(W * (q + 1e-6 * q.max()))) < T64


def test_a_channel_without_data_stays_finite():
    silent = batches()
    for batch in silent:
        batch["x"][..., :3] = 0
    _, _, adapter = oriented(ASVD, silent)
    assert error(adapter.U.T @ adapter.U, torch.eye(R)) < 1e-12


def test_where_few_channels_have_data_the_silent_ones_choose_the_other_directions():
    data = batches()
    for batch in data:
        batch["x"][..., 3:] = 0
    _, W, adapter = oriented(ASVD, data)
    live = torch.linalg.qr(W[:, :3])[0]
    rest = torch.linalg.svd(W[:, 3:] - live @ live.T @ W[:, 3:], full_matrices=False)[0][:, : R - 3]
    assert error(projector(adapter.U), projector(torch.cat([live, rest], 1))) < 1e-4
