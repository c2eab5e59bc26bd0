"""Packages that tests compare with: PEFT, bitsandbytes. They import Triton, which must be loaded for its interpreter
before (tests/kernel_checks.py), or the tests of the kernels could not run in the same process."""

import importlib
from contextlib import suppress
from types import ModuleType

import pytest


def peer(name: str) -> ModuleType:
    """The package; the tests are skipped if it is not installed."""
    with suppress(pytest.skip.Exception):
        importlib.import_module("tests.kernel_checks")
    return pytest.importorskip(name)
