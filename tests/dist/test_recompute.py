"""--activation_budget_gb on two ranks: one choice, though each rank measures its own times."""

import os
from pathlib import Path

import pytest

import train_my_ddp
from model import Decoder
from model.activations import Activations
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks, use_new_port
from tests.runs import elsewhere, final_state, out_dir, same_bits


def chosen_in_runs(cases: list[list[str]]) -> list[list[str]]:
    """Program of a rank: runs, in which one rank finds that matmuls are best kept, and the other one that nothing is.
    Returns what the blocks keep in each."""
    keeps: list[list[str]] = []
    set_recompute, timed, seen = Decoder.set_recompute, Activations._microseconds, []

    def set_and_tell(model: Decoder, kept: list[str]) -> None:
        seen.append(list(kept))
        set_recompute(model, kept)

    def own_times(measure: Activations, part: object) -> int:
        timed(measure, part)
        is_main = os.environ["RANK"] == "0"
        order = {"all": 1, "matmuls": 2, "nothing": 3} if is_main else {"all": 1, "matmuls": 30, "nothing": 20}
        return order[measure._model.keeps[0]]

    Decoder.set_recompute, Activations._microseconds = set_and_tell, own_times
    for case in cases:
        use_new_port()
        assert train_my_ddp.main(case) == 0
        keeps.append(seen[-1])
    return keeps


def test_ranks_agree(data_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    plain = [
        f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'plain'}", f"--max_seq_len={SEQ_LEN}", "--dtype=float32",
        "--device=cpu", "--train_batch_size=4", "--gradient_accumulation_steps=2", "--valid_iters=2", "--max_iters=2",
        "--lr_schedule=constant", "--num_threads=1", "--sample_texts=0", *TINY_MODEL,
    ]  # fmt: skip
    limited = [*elsewhere(plain, tmp_path / "limited"), "--activation_budget_gb=0.0042"]
    zero, one = run_ranks(2, chosen_in_runs, [plain, limited])
    assert zero == one and zero[0] == ["all", "all"] and zero[1] != zero[0]
    assert same_bits(final_state(plain, 2), final_state(limited, 2))
    # Another number of ranks takes over what was chosen.
    assert train_my_ddp.main([*limited, "--resume", "--max_iters=3"]) == 0
    assert "as the run has chosen before" in (out_dir(limited) / "train.log").read_text()
