"""The hard numbers of test_hard_numbers.py mixed: hypothesis chooses weight, dtype, sizes, data, input and parameters."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_lite as ll
from lora_lite.testing import toy
from tests.contract.test_hard_numbers import check
from tests.oracles.hard import DATA, INPUTS, PARAMETERS, WEIGHTS, Case
from tests.oracles.kinds import one_of_each_kind

SCALES = {
    torch.float32: [1e-30, 1e-12, 1.0, 1e12, 1e30],
    torch.bfloat16: [1e-30, 1e-4, 1.0, 1e4],
    torch.float16: [1e-7, 1.0, 1e3],
}
GRADED = "singular values down to 1e-11"  # what antipasto_dplr reads off these has as few digits as its review page says
AXES = [case.shape for case in INPUTS.values() if case.shape not in ((5,), (6, 5))]


@st.composite
def cases(draw):
    """Where the input or the parameters are extreme, the other is usual: their product has to be in the range of the dtype."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    far = draw(st.booleans())
    narrow = dtype is not torch.float32
    x = {"size": draw(st.sampled_from([0.0, 1.0] if narrow else [0.0, 1e-3, 1.0, 1e3, 1e6]))}
    moved = {"parameters": draw(st.sampled_from([case.parameters for case in PARAMETERS.values()][: 3 if narrow else 4]))}
    size = st.sampled_from([1, 2, 3, 4, 6, 8, 24, 32, 65])
    return Case(
        o=draw(size),
        i=draw(size),
        r=draw(st.integers(1, 8)),
        weight=draw(st.sampled_from([toy_weight, *(case.weight for label, case in WEIGHTS.items() if label != GRADED)])),
        scale=draw(st.sampled_from(SCALES[dtype])),
        dtype=dtype,
        bias=draw(st.booleans()),
        shape=draw(st.sampled_from(AXES)),
        data=draw(st.sampled_from([case.data for case in DATA.values()])),
        keyword=draw(st.booleans()),
        **(x if far else moved),
    )


def toy_weight(o, i):
    return toy.inputs(o, i, seed=7)


def mixed(examples):
    """Of one kind each time, so that a failure comes again."""
    health = list(HealthCheck)
    quiet = settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=health)
    return lambda test: quiet(given(case=cases())(test))


@pytest.mark.parametrize("name", one_of_each_kind(ll.names()))
@mixed(8)
def test_mixtures_are_lawful_or_refused(name, case):
    check(name, case)


@pytest.mark.long
@pytest.mark.parametrize("name", ll.names())
@mixed(200)
def test_many_mixtures_are_lawful_or_refused(name, case):
    check(name, case)
