"""The optimizer's state in host memory (optimizer/offload.py): the same bits as on the device."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

import train_my_ddp
from configurator import parse_config
from optimizer import offload
from optimizer.config import AdamWConfig, LionConfig, MuonConfig, OptimizerConfig
from optimizer.mixed_precision import LossScaler, MixedPrecisionOptimizer
from optimizer.offload import OffloadedOptimizer
from optimizer.rules import new_rules
from parallel.buffer import SliceWithGrad
from parallel.gradients import PlainGradients
from tests.runs import elsewhere, final_state, losses, out_dir, same_bits

RULES = sorted({*get_args(get_type_hints(OptimizerConfig)["optimizer"])} - {"muon"})
BUCKETS = [[("lm_head", (64, 5)), ("norm", (5,))], [("layers.0.up", (31, 17))], [], [("embed", (3, 300)), ("v", (1,))]]
"""A bucket without slices is one of which this rank owns no shard."""


class Late:
    """Copies that are made at the last moment: whoever forgets to wait reads what was there before."""

    def __init__(self, device: torch.device):
        pass

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> "Late":
        self = Late(torch.device("cpu"))
        self.pairs = list(pairs)
        return self

    def wait(self) -> None:
        for target, source in self.pairs:
            target.copy_(source)
        self.pairs = []

    wait_on_device = wait


def trained(rule: str, dtype: torch.dtype, grad_dtype: torch.dtype, offloads: bool) -> dict[str, Tensor]:
    """Weights and state after four steps, one of which is skipped; gradients of all buckets come in one memory."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.zeros(4096, dtype=grad_dtype)

    def piece(name: str, shape: tuple[int, ...], grad: Tensor) -> SliceWithGrad:
        size = math.prod(shape)
        return SliceWithGrad(name, 0, shape, torch.randn(size, generator=generator).to(dtype), grad, grad)

    slices = [[piece(name, shape, torch.zeros(math.prod(shape))) for name, shape in bucket] for bucket in BUCKETS]

    class InOneMemory(PlainGradients):
        def take(self, bucket: int) -> list[Tensor]:
            lengths = [len(its.grad) for its in self.slices[bucket]]
            taken = [*shared[: sum(lengths)].split(lengths)] if lengths else []
            for target, its in zip(taken, self.slices[bucket]):
                target.copy_(its.grad)
            return taken

    gradients = InOneMemory(slices)
    rules = new_rules(rule, AdamWConfig(), MuonConfig(), LionConfig())
    scaler = LossScaler(enabled=dtype == torch.float16, initial=8.0)
    optimizer = (
        OffloadedOptimizer(gradients, rules, 1.0, scaler, torch.device("cpu"))
        if offloads else MixedPrecisionOptimizer(gradients, rules, 1.0, scaler)
    )  # fmt: skip
    stepped = []
    for step in range(4):
        for its in (its for bucket in slices for its in bucket):
            its.grad.copy_(torch.randn(len(its.grad), generator=generator).to(grad_dtype))
        if step == 2:
            slices[0][0].grad[0] = math.nan
        result = optimizer.step(1e-2, stepped.append)
        assert result.skipped == (step == 2)
        assert not any(its.grad.any() for bucket in slices for its in bucket)
    assert stepped == [3, 2, 1, 0] * 3
    found = {its.name: its.param for bucket in slices for its in bucket}
    for at, tensors in optimizer.named_state():
        found |= {f"{at}/{name}": tensor for name, tensor in tensors.items()}
    return found


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_steps_have_the_same_bits(rule: str, dtype: torch.dtype, late: bool, monkeypatch: pytest.MonkeyPatch):
    if late:
        monkeypatch.setattr(offload, "_Copier", Late)
    grad_dtype = torch.float32 if late else dtype
    assert same_bits(trained(rule, dtype, grad_dtype, True), trained(rule, dtype, grad_dtype, False))


def test_a_run_and_its_checkpoints_are_the_same(tiny_run: list[str], tmp_path: Path):
    """Also when it is resumed without what it began with, and the other way round, with buckets and without."""
    plain = [*tiny_run, "--dtype=bfloat16", "--bucket_size=20000", "--lr_schedule=constant"]
    naive, offloads = "--ddp_impl=naive", "--offload_optimizer"
    legs = {"without": ([], []), "at first": ([offloads], ["--no-offload_optimizer"]), "later": ([naive], [offloads])}
    runs = {name: elsewhere(plain, tmp_path / name) for name in legs}
    for name, (first, then) in legs.items():
        assert train_my_ddp.main([*runs[name], *first, "--max_iters=2"]) == 0
        assert train_my_ddp.main([*runs[name], *then, "--max_iters=3", "--resume"]) == 0
    for run in runs.values():
        assert losses(run) == losses(runs["without"])
        for step in (2, 3):
            assert same_bits(final_state(run, step), final_state(runs["without"], step))
    said = (out_dir(runs["at first"]) / "train.log").read_text()
    assert said.count("main parameters and moments in host memory, stepped by the CPU") == 1


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--optimizer=muon"], "Muon's matrix multiplications"),
        (["--overlap_optim_step", "--grad_clip=0"], "give only one of them"),
        (["--adamw_kernel=triton"], "leave out --adamw_kernel=triton"),
    ],
)
def test_what_does_not_go_with_it_is_refused(flags: list[str], reason: str):
    with pytest.raises(ValueError, match=reason):
        parse_config(["--data_dir=O", "--offload_optimizer", *flags])
