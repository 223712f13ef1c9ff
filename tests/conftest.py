"""Small tensors run fastest on one thread, and a test must not depend on how many there are."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)
torch.set_warn_always(True)  # a warning that torch gives once per process would hang on the order of the tests


@pytest.hookimpl(tryfirst=True)  # before -m takes out what is marked
def pytest_collection_modifyitems(items):
    """Compiling takes longer than the other checks together: every day for one variant of a kind, with its defaults."""
    from lora_lite.testing import Check, toy
    from tests.oracles.kinds import representatives

    found = [(item, getattr(item, "callspec", None)) for item in items]
    checks = [(item, spec.params.get("check")) for item, spec in found if spec]
    compiling = [(item, c) for item, c in checks if isinstance(c, Check) and c.function.__name__ == "check_compiles"]
    if compiling:
        daily = representatives()
        for item, check in compiling:
            defaults = item.function.__name__ == "test_contract" and check.cfg == toy.small(check.cls)
            if not (defaults and getattr(check.cls, "variant", None) in daily):
                item.add_marker("long")
