"""A CUDA error that stays with the process: seen after it, and not before. Never run without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

CODE = """
import torch
from serving.failures import works

device = torch.device("cuda")
assert works(device)
try:
    torch.zeros(2, device=device)[torch.tensor([5], device=device)].sum().item()
except RuntimeError:
    print("works" if works(device) else "lost")
"""


def test_a_failed_assertion_in_a_kernel_stays():
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout == "lost\n", done.stderr
