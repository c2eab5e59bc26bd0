"""Operations of a model that only serves: against the reference, in float64 and no worse than it."""

import pytest
import torch
from torch import Tensor

from model import Decoder, ModelConfig
from model.kernels.few_calls import Rotation, add_rms_norm, compute_in_few_calls
from model.kernels.rms_norm import add_rms_norm_reference
from model.kernels.rope import rope_reference
from model.rope import rope_tables

DTYPES = [torch.float32, torch.bfloat16]


def require_as_exact(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """Found has at most twice the reference's error, or one unit in the last place of the largest value."""
    assert found.dtype == plain.dtype and found.shape == plain.shape
    unit = float(torch.finfo(found.dtype).eps * exact.abs().max())
    errors = [float((x.double() - exact).abs().max()) for x in (found, plain)]
    assert errors[0] <= max(2 * errors[1], unit), errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 16])
def test_norm_of_a_sum(num_rows: int, dtype: torch.dtype):
    torch.manual_seed(num_rows)
    h, x = torch.randn(2, 1, num_rows, 40).to(dtype)
    kept, weight = h.clone(), torch.randn(40).to(dtype)
    found, plain = (norm(h, x, weight, 1e-2) for norm in (add_rms_norm, add_rms_norm_reference))
    assert torch.equal(found[0], plain[0]) and torch.equal(h, kept)
    sums = plain[0].double()
    exact = weight.double() * sums / (sums.square().mean(-1, keepdim=True) + 1e-2).sqrt()
    require_as_exact(found[1], plain[1], exact)


def test_norm_of_a_wider_sum():
    """Hidden states in float32 beside weights in 16 bits (residual_in_fp32)."""
    h, x, weight = torch.randn(2, 3, 8), torch.randn(2, 3, 8).bfloat16(), torch.randn(8).bfloat16()
    found, plain = (norm(h, x, weight, 1e-5) for norm in (add_rms_norm, add_rms_norm_reference))
    assert [one.dtype for one in found] == [one.dtype for one in plain] == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(found, plain)


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
            found = rotate(q_BHTD, k_BKTD, *tables, interleaved)
            plain = rope_reference(q_BHTD, k_BKTD, *tables, interleaved)
            wide = (x.double() for x in (q_BHTD, k_BKTD))
            for one, other, exact in zip(found, plain, rope_in_float64(*wide, *tables, interleaved)):
                require_as_exact(one, other, exact)


def rope_in_float64(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[Tensor]:
    """Each pair of channels as a complex number."""
    turns, width, found = torch.complex(cos.double(), sin.double()), 2 * cos.shape[-1], []
    for x in (q, k):
        pairs = x[..., :width].unflatten(-1, (-1, 2) if interleaved else (2, -1))
        first, second = pairs.unbind(-1 if interleaved else -2)
        turned = torch.complex(first, second) * turns
        pairs = torch.stack((turned.real, turned.imag), -1 if interleaved else -2)
        found.append(torch.cat((pairs.flatten(-2), x[..., width:]), -1))
    return found


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
        torch.testing.assert_close(model(ids), expected)


def _rotates(module: torch.nn.Module) -> bool:
    return isinstance(getattr(getattr(module, "ops", None), "rope", None), Rotation)
