"""Collected by `pytest --pyargs lora_lite.testing`: every registered variant against every check."""

from typing import Any

from ..contract import registry
from . import Check, checks


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("check", [c for name in registry.names() for c in checks(name)], ids=str)


def test_contract(check: Check) -> None:
    check()
