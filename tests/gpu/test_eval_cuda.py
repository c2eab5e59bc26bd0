"""Evaluations during training on a GPU: scores as on the CPU, texts, and a run with the same bits."""

from pathlib import Path

import pytest
import torch

import train_my_ddp
from tests.conftest import SEQ_LEN
from tests.eval_tasks import Scores, Texts, plain_scores, registered
from tests.runs import elsewhere, final_state, losses, out_dir, records, same_bits
from tests.unit.test_eval_train import samples_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_an_evaluation_on_a_gpu_changes_nothing(tiny_run: list[str], tmp_path: Path):
    flags = [*(flag for flag in tiny_run if not flag.startswith("--device=")), "--device=cuda", "--deterministic"]
    without, with_tasks = elsewhere(flags, tmp_path / "without"), elsewhere(flags, tmp_path / "with")
    with registered(Scores(), Texts()):
        assert train_my_ddp.main(without) == 0
        assert train_my_ddp.main([*with_tasks, "--eval_tasks=zero_scores,zero_texts", "--eval_interval=2"]) == 0
    assert not records(with_tasks, "eval_failed") and len(records(with_tasks, "eval")) == 4
    assert losses(with_tasks) == losses(without)
    assert same_bits(final_state(with_tasks, 4), final_state(without, 4))
    expected = plain_scores(out_dir(with_tasks) / "ckpt" / "step-4", SEQ_LEN)
    found = [one["logprob"] for one in samples_of(with_tasks, 4)]
    assert found == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
