"""Every registered variant against every promise of the library."""

from lora_lite.testing.test_contract import pytest_generate_tests, test_contract

__all__ = ["pytest_generate_tests", "test_contract"]
