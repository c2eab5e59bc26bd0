"""Checkpoints of a model that is cut over the ranks: written by all of them, read by every mesh, and after every kind
of death."""

import json
import os
import shutil
import signal
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import checkpoint.writing
import train_my_ddp
from checkpoint.folder import MANIFEST, find_problem
from checkpoint.named import Piece, load_named_state
from checkpoint.writing import CheckpointWriter
from dataset import audit
from model import Decoder, hf
from model.adapters.outline import read_adapter
from runs.exits import CRASH
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks, use_new_port
from tests.runs import elsewhere, final_state, losses, out_dir, records, relative_difference, same_bits

pytestmark = pytest.mark.slow

STEPS = 8
DDP, ZERO1 = ["--no-use_distributed_optimizer"], ["--use_distributed_optimizer"]
FSDP = ["--no-use_distributed_optimizer", "--data_parallel=fsdp"]
HSDP = ["--data_parallel=hsdp", "--ranks_per_machine=2"]
PHASES = {"copy_now": 4, "write_tensors": 4, "finish": 4, "recorded": 4, "commit": 6, "renamed": 6}
"""Phases of a save, in their order -> the step whose save a rank dies in. Once all ranks' records are there, the first
rank does without the others."""


@pytest.fixture(scope="module")
def flags(data_dir: Path) -> list[str]:
    """A run with a global batch of 8 rows and a constant rate, so that it can be made in parts."""
    return [
        f"--data_dir={data_dir}", "--out_dir=-", f"--max_seq_len={SEQ_LEN}", "--device=cpu", "--train_batch_size=2",
        "--gradient_accumulation_steps=4", "--valid_iters=2", f"--max_iters={STEPS}", "--save_interval=2",
        "--keep_last=9", "--learning_rate=1e-2", "--lr_schedule=constant", "--warmup_ratio=0", "--num_threads=1",
        "--sample_texts=0", "--dist_timeout=30", "--dtype=float32",
        "--vocab_size=530", *TINY_MODEL,
    ]  # fmt: skip


def forked(case: list[str], phase: str = "") -> int:
    """Train in a child of this process; returns its exit code, negative if a signal ended it.

    Args:
        phase: of a save, in which a rank kills itself.
    """
    use_new_port()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if phase:
        die_in(phase, PHASES[phase])
    code = 1
    try:
        code = train_my_ddp.main(case)
    finally:
        os._exit(code)


def killer(phase: str) -> int:
    """The rank that is killed: the last in what any rank does, the first in what only that does."""
    return 0 if phase in ("commit", "renamed") else 1


def die_in(phase: str, step: int) -> None:
    """Let this process kill itself in a phase of the save of a step, if it is the one."""
    is_mine = os.environ["RANK"] == str(killer(phase))
    name = {"recorded": "finish", "renamed": "commit"}.get(phase, phase)
    original = getattr(CheckpointWriter, name)

    def dying(self: CheckpointWriter, *arguments: object) -> object:
        if not is_mine or self.step != step:
            return original(self, *arguments)
        if phase == "write_tensors":
            (self.directory / str(arguments[0])).write_bytes(b"half a file")
        if phase != name:
            original(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    setattr(CheckpointWriter, name, dying)


def do_runs(jobs: list[list]) -> list[int]:
    """Program of a rank."""
    checkpoint.writing.os.fsync = lambda _: None
    return [forked(*job) for job in jobs]


@dataclass
class Runs:
    """The flags of finished runs."""

    whole: list[str]
    """FSDP in bfloat16."""
    chain: list[str]
    """DDP, ZeRO-1, FSDP, twice HSDP, one process."""
    copies: list[str]
    """The chain up to FSDP, then HSDP in one go."""
    alone: list[str]
    """What the chain does, in one process."""
    adapter: list[str]
    """An adapter on the first of these: DDP with PowerSGD, then FSDP without saving in the background."""


@pytest.fixture(scope="module")
def runs(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    home = tmp_path_factory.mktemp("fsdp")
    runs = Runs(*(elsewhere(flags, home / item.name) for item in fields(Runs)))
    in_bf16 = ["--dtype=bfloat16", "--max_shard_size=20K", *FSDP]
    runs.whole = [*runs.whole, *in_bf16]
    two = [[runs.whole]]
    two += [[[*runs.chain, *mode, "--resume", f"--max_iters={to}"]] for to, mode in ((2, DDP), (4, ZERO1), (6, FSDP))]
    runs.adapter += [f"--init_from={out_dir(runs.whole)}", "--lora_r=4", "--lora_target_modules=all-linear"]
    two += [[[*runs.adapter, "--use_powerSGD_hook", "--min_compression_rate=0", "--max_iters=2"]]]
    two += [[[*runs.adapter, "--no-use_powerSGD_hook", *FSDP, "--no-async_save", "--resume", "--max_iters=4"]]]
    assert run_ranks(2, do_runs, two) == [[0] * len(two)] * 2

    shutil.copytree(out_dir(runs.chain), out_dir(runs.copies))
    four = [[[*runs.chain, *HSDP, "--resume", f"--max_iters={to}"]] for to in (8, 10)]
    four += [[[*runs.copies, *HSDP, "--resume", "--max_iters=10"]]]
    assert run_ranks(4, do_runs, four) == [[0] * len(four)] * 4

    for case in (runs.chain, runs.alone):
        more = ["--data_parallel=auto", "--ranks_per_machine=0"]
        assert train_my_ddp.main([*case, *more, "--resume", "--max_iters=12"]) == 0
    return runs


@pytest.mark.soak
def test_killed_in_each_phase_of_a_save(runs: Runs, tmp_path: Path):
    """Nothing is lost, and the run goes on with the same bits. It is saved from the rename on."""
    killed = elsewhere([*runs.whole, "--resume"], tmp_path / "killed")
    answers = run_ranks(2, do_runs, [*([killed, phase] for phase in PHASES), [killed]])
    for rank, codes in enumerate(answers):
        assert codes == [*(-signal.SIGKILL if rank == killer(phase) else CRASH for phase in PHASES), 0], answers
    starts = [record["parent_ckpt"] for record in records(killed, "start")]
    assert starts == [None, "step-2", "step-2", "step-2", "step-4", "step-4", "step-6"]
    assert losses(killed) == losses(runs.whole)
    assert same_bits(final_state(killed, STEPS), final_state(runs.whole, STEPS))
    assert sorted(os.listdir(out_dir(killed) / "ckpt")) == ["step-2", "step-4", "step-6", "step-8"]


def test_copies_of_the_model_go_on_with_the_same_bits(runs: Runs):
    assert losses(runs.chain)[:10] == losses(runs.copies)
    assert same_bits(final_state(runs.chain, 10), final_state(runs.copies, 10))


def test_every_mesh_goes_on_from_every_other(runs: Runs):
    """The same samples and, within rounding, the same run as one process's."""
    assert [record["world_size"] for record in records(runs.chain, "start")] == [2, 2, 2, 4, 4, 1]
    assert [r["digest"] for r in records(runs.chain, "train")] == [r["digest"] for r in records(runs.alone, "train")]
    assert losses(runs.chain) == pytest.approx(losses(runs.alone), rel=1e-5)
    assert relative_difference(final_state(runs.chain, 12), final_state(runs.alone, 12)) < 1e-3
    assert audit.main([str(out_dir(runs.chain))]) == 0


def test_each_checkpoint_is_a_folder_for_other_programs(runs: Runs):
    """Its weights are the main parameters, rounded once."""
    places = [(runs.chain, step, 1 if step in (2, 4, 12) else 2) for step in (2, 4, 6, 8, 10, 12)]
    for case, step, files in [*places, (runs.whole, 6, 2)]:
        path = out_dir(case) / "ckpt" / f"step-{step}"
        assert find_problem(path) is None
        assert len(list(path.glob("model*.safetensors"))) >= files
        config = hf.read_config(path)
        model = Decoder(replace(config, vocab_size=config.vocab_size + hf.count_padding(path)))
        main = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
        pieces = [(Piece.flat(n, v.shape, 0, v.numel()), {"main": v.view(-1)}) for n, v in main.items()]
        load_named_state([path], pieces)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
        assert theirs.dtype == (torch.bfloat16 if case is runs.whole else torch.float32)
        ours = {name: tensor.to(theirs.dtype) for name, tensor in main.items()}
        hf.load_weights(model.to(theirs.dtype), path)
        assert same_bits({name: p.detach() for name, p in model.named_parameters()}, ours)


def test_an_adapter_is_written_whole(runs: Runs):
    """One file has what trains, as the main parameters have it. What PowerSGD remembered has no place here."""
    path = out_dir(runs.adapter) / "ckpt" / "step-4"
    base = hf.read_config(out_dir(runs.whole) / "ckpt" / f"step-{STEPS}")
    values = dict(read_adapter(path, replace(base, vocab_size=base.vocab_size)).named_parameters())
    trained = {name: value.detach() for name, value in values.items() if not value.is_meta}
    main = {name: torch.zeros(value.shape) for name, value in trained.items()}
    load_named_state([path], [(Piece.flat(n, v.shape, 0, v.numel()), {"main": v.view(-1)}) for n, v in main.items()])
    assert len(trained) == 2 * 7 * 2 and same_bits(trained, main)
    log = (out_dir(runs.adapter) / "train.log").read_text()
    assert "the memory of the comm hook in step-2" in log and "is dropped" in log


def test_all_ranks_write(runs: Runs):
    """The copies of the model divide their optimizer state, and all ranks the files of weights."""
    path = out_dir(runs.chain) / "ckpt" / "step-10"
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["covers"] == manifest["ranks"] == [0, 1, 2, 3]
    for rank in range(4):
        with safe_open(path / f"optim-{rank}.safetensors", "pt") as file:
            assert len(list(file.keys())) > 0
