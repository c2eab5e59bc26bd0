"""Operations of a model that only serves: equal to the reference, to the bit."""

import pytest
import torch

from model import Decoder, ModelConfig
from model.kernels.few_calls import Rotation, add_rms_norm, compute_in_few_calls
from model.kernels.rms_norm import add_rms_norm_reference
from model.kernels.rope import rope_reference
from model.rope import rope_tables

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wider", [False, True])
@pytest.mark.parametrize("num_rows", [1, 16])
def test_norm_of_a_sum(num_rows: int, wider: bool, dtype: torch.dtype):
    torch.manual_seed(num_rows)
    x, weight = torch.randn(1, num_rows, 40).to(dtype), torch.randn(40).to(dtype)
    # Hidden states may be in float32 beside weights in 16 bits (residual_in_fp32).
    h = torch.randn(1, num_rows, 40).to(torch.float32 if wider else dtype)
    kept = h.clone()
    found, plain = (norm(h, x, weight, 1e-2) for norm in (add_rms_norm, add_rms_norm_reference))
    assert [one.dtype for one in found] == [one.dtype for one in plain] == [h.dtype, dtype]
    assert all(map(torch.equal, found, plain)) and torch.equal(h, kept)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [16, 8])
@pytest.mark.parametrize("num_keys", [4, 1])
def test_rotation(num_keys: int, rotated: int, interleaved: bool, dtype: torch.dtype):
    torch.manual_seed(num_keys)
    q_BHTD, k_BKTD = (torch.randn(2, 5, heads, 16).to(dtype).transpose(1, 2) for heads in (4, num_keys))
    rotate = Rotation()
    # The tables of one pass are not those of the next.
    for first in (0, 7):
        positions = torch.arange(first, first + 5).expand(2, -1)
        tables = rope_tables(1.0 / 10.0 ** (torch.arange(0, rotated, 2) / rotated), positions, scale=1.25)
        for _ in range(2):
            found, plain = (f(q_BHTD, k_BKTD, *tables, interleaved) for f in (rotate, rope_reference))
            assert all(map(torch.equal, found, plain)), first


def test_every_norm_and_every_attention_of_a_model():
    config = ModelConfig(hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, qk_norm=True)
    model, ids = Decoder(config.resolve(32, 32)), torch.arange(16).view(1, 16)
    model.initialize(0)
    with torch.inference_mode():
        expected = model(ids)
        compute_in_few_calls(model.modules())
        changed = {name.rpartition(".")[2] for name, module in model.named_modules() if _rotates(module)}
        assert changed == {
            "", "self_attn", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm", "mlp", "norm",
            "lm_head",
        }  # fmt: skip
        assert torch.equal(model(ids), expected)


def _rotates(module: torch.nn.Module) -> bool:
    return isinstance(getattr(getattr(module, "ops", None), "rope", None), Rotation)
