"""Saves from a GPU: the copy runs on its own stream while training goes on, and holds the values at the time of the
save."""

import pytest
import torch

import train_my_ddp
from checkpoint.host_copies import HostCopies
from tests.runs import elsewhere, final_state, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_a_copy_is_of_the_time_it_was_asked_for():
    """`before_update` lets the main stream change the tensor only after it was copied."""
    device = torch.device("cuda", 0)
    tensor = torch.zeros(1 << 26, device=device)
    copies = HostCopies(device)
    for value in range(5):
        copies.begin()
        copy = copies.copy("x", tensor)
        copies.end()
        copies.before_update()
        tensor.add_(1.0)
        copies.wait()
        assert (copy == value).all()


def test_a_copy_made_now_outlives_its_tensor():
    """The main stream may give its memory to another tensor at once."""
    device = torch.device("cuda", 0)
    copies = HostCopies(device)
    for value in range(5):
        copies.begin()
        copy = copies.copy_now("x", torch.full((1 << 26,), float(value), device=device))
        torch.full((1 << 26,), -1.0, device=device)
        copies.wait()
        assert (copy == value).all()


@pytest.mark.parametrize("mode", [[], ["--overlap_optim_step", "--grad_clip=0"], ["--data_parallel=fsdp"]])
def test_saved_in_the_background_equals_saved_while_waiting(tiny_run: list[str], tmp_path, mode: list[str]):
    common = ["--device=cuda", "--deterministic", "--save_interval=1", "--keep_last=9", *mode]
    waiting = elsewhere(tiny_run, tmp_path / "waiting")
    assert train_my_ddp.main([*waiting, *common, "--no-async_save"]) == 0
    assert train_my_ddp.main([*tiny_run, *common]) == 0
    for step in range(1, 5):
        assert same_bits(final_state(tiny_run, step), final_state(waiting, step)), step
