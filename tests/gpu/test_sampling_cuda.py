"""Choice of next tokens on a GPU: that of a CPU, and independent of the batch."""

import random

import pytest
import torch

from serving.sampling import sample
from tests.unit.test_sampling import VOCAB, random_rows, row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("vocab_size", [VOCAB, 151_936])
def test_tokens(vocab_size: int):
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    scores_RV = 4 * torch.randn(48, vocab_size, generator=generator)
    rows = [row(*case) for case in random_rows(rng, 48)]
    on_cpu, on_gpu = sample(scores_RV, rows), sample(scores_RV.cuda(), rows)
    assert [token.id for token in on_gpu] == [token.id for token in on_cpu]
    assert [token.logprob for token in on_gpu] == [pytest.approx(token.logprob, abs=1e-9) for token in on_cpu]
    for n in range(48):
        assert sample(scores_RV[n : n + 1].cuda(), rows[n : n + 1]) == [on_gpu[n]]
