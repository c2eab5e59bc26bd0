"""Availability of the kernels, and that their files do not need Triton until they are used."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.kernels.support import available, unavailable_reason

WITHOUT_TRITON = """
import sys
import torch
import model, optimizer
from model.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from model.kernels.linear_cross_entropy import linear_cross_entropy_sum
from model.kernels.rms_norm import rms_norm, rms_norm_reference
from model.kernels.rope import rope_reference
from model.kernels.swiglu import swiglu_reference
from optimizer.adamw import adamw_flat_reference
from optimizer.adamw_triton import sum_of_squares

# Importing it takes a second.
assert "triton" not in sys.modules
sys.modules["triton"] = None
x, weight, labels = torch.randn(3, 8), torch.ones(8), torch.tensor([0, 4, -100])
assert rms_norm_reference(x, weight, 1e-5).shape == x.shape
assert linear_cross_entropy_sum(x, torch.randn(5, 8), labels) > 0
for refused in (lambda: rms_norm(x, weight, 1e-5), lambda: cross_entropy(x, labels), lambda: sum_of_squares(x)):
    try:
        refused()
    except ValueError as error:
        assert "CUDA device" in str(error)
    else:
        raise AssertionError
"""


def test_a_cpu_never_gets_the_kernels_unasked():
    assert not available("cpu")
    assert "CUDA" in unavailable_reason(torch.device("cpu"))


def test_everything_but_the_kernels_works_without_triton():
    subprocess.run([sys.executable, "-c", WITHOUT_TRITON], check=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_tests_of_kernels_are_not_skipped():
    """Without a GPU they would not run, if another test file imported Triton before the first of them was collected."""
    try:
        importlib.import_module("tests.kernel_checks")
    except pytest.skip.Exception as skipped:
        pytest.fail(str(skipped))


@pytest.mark.soak
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the other tests compile the kernels")
def test_the_kernels_compile_for_a_gpu(tmp_path: Path):
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.compile_kernels"], check=True, capture_output=True, text=True, env=env
    )
    assert {line.split()[0] for line in done.stdout.splitlines()} == {
        "_rms_norm_forward_kernel", "_add_rms_norm_forward_kernel", "_rms_norm_backward_kernel", "_rope_kernel",
        "_swiglu_forward_kernel", "_swiglu_backward_kernel", "_cross_entropy_forward_kernel",
        "_cross_entropy_backward_kernel", "_cross_entropy_with_gradient_kernel", "_adamw_kernel",
        "_sum_of_squares_kernel", "_sum_kernel", "_lion_kernel", "_adamw8bit_kernel", "_lion8bit_kernel",
        "_attend_part_kernel", "_add_parts_kernel",
    }  # fmt: skip
