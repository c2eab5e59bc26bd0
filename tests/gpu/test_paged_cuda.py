"""Several texts in one pass on a GPU, with the kernel for single queries: against whole texts without a cache."""

import pytest
import torch

from model.kernels.paged_decoding import attend_table
from model.paged import PagedCache
from tests.unit.test_paged import run, scattered, small, texts_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda")


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [
    {}, {"head_dim": 64, "num_attention_heads": 8}, {"sliding_window": 7, "full_attention_layers": "1"},
    {"position_embedding": "alibi", "sliding_window": 5}, {"local_filter": True},
], ids=str)  # fmt: skip
def test_any_schedule(options: dict, dtype: torch.dtype):
    model = small(**options).to(CUDA)
    texts = texts_of(model)
    exact = torch.cat([model.logits(model(torch.tensor([text], device=CUDA)))[0] for text in texts])
    model = model.to(dtype)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert PagedCache(model.config, 1, 4, dtype, CUDA).attend_table is attend_table
    alone = torch.cat([model.logits(model(torch.tensor([text], device=CUDA)))[0] for text in texts]).double()
    found = torch.cat(run(model, texts, 1, scattered)).double()
    error, allowed = ((scores - exact.double()).square().mean().sqrt() for scores in (found, alone))
    assert error < (1.2 * allowed if dtype == torch.bfloat16 else 1e-4)
