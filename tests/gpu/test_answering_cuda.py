"""Log-probabilities of continuations on a GPU equal those of the CPU."""

from pathlib import Path

import pytest
import torch

from evaluation.answering import answerer_of
from serving.loading import load
from tests.unit.test_answering import folder_of, questions, tokenizer

__all__ = ["tokenizer"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_scores_equal_the_cpu(tmp_path: Path, tokenizer, model_type: str):
    base, asked = folder_of(tmp_path, tokenizer, model_type), questions(8)
    served = [load(base, {}, torch.device(device), torch.float32) for device in ("cpu", "cuda")]
    found = [dict(answerer_of(one).score(asked)) for one in served]
    assert max(abs(found[0][n].logprob - found[1][n].logprob) for n in found[0]) < 1e-3
