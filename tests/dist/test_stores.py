"""Nodes without a shared file system: each has its own store, and resume brings to each rank what it lacks.

A node is a mount namespace: a rank sees its node's directory as the run directory. Two groups of processes make runs,
and continue copies of them whose nodes were exchanged, lost or damaged meanwhile; the tests then look at the nodes'
contents.
"""

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import train_my_ddp
from checkpoint import folder as ckpt
from checkpoint.stores import find_place
from model import flops
from parallel import destroy_context, init_context
from runs.exits import read_exit_records
from runs.reslog import read_reslog
from tests.conftest import SEQ_LEN, TINY_MODEL
from tests.dist.group import run_ranks
from tests.dist.test_parallel_runs import meet
from tests.runs import elsewhere, same_bits
from training import describe

STEPS, KEPT = 6, 4
"""Steps of a run, and the newest checkpoint from which a copy of it goes on."""
MODES = {
    "plain": ["--max_shard_size=100K"],
    "zero1": ["--use_distributed_optimizer", "--overlap_param_gather"],
    "powersgd": ["--use_powerSGD_hook", "--matrix_approximation_rank=4"],
}
CUT = {"fsdp": ["--data_parallel=fsdp"], "hsdp": ["--data_parallel=hsdp", "--ranks_per_machine=2"]}
_CLONE_NEWNS, _MS_BIND, _MS_REC, _MS_PRIVATE = 0x20000, 0x1000, 0x4000, 0x40000


def _call(name: str, *arguments: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def enter_own_mounts() -> None:
    """From here on, no other process sees mounts of this thread and of those that it starts."""
    _call("unshare", _CLONE_NEWNS)
    _call("mount", b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None)


def bind(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    _call("mount", os.fsencode(source), os.fsencode(target), None, ctypes.c_ulong(_MS_BIND), None)


def mount_small_disk(target: Path, size: int) -> None:
    target.mkdir(parents=True, exist_ok=True)
    _call("mount", b"none", os.fsencode(target), b"tmpfs", ctypes.c_ulong(0), f"size={size}".encode())


def skip_unless_mounting_is_allowed() -> None:
    try:
        done = subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the command unshare")
    if done.returncode != 0:
        pytest.skip("needs the permission to mount")


@pytest.fixture(scope="module", autouse=True)
def _may_mount() -> None:
    skip_unless_mounting_is_allowed()


@dataclass
class Run:
    """A run on several nodes."""

    out_dir: Path
    """Path at which each rank sees its node's directory."""
    node_of: list[int]
    """Rank -> its node; all equal: a shared file system."""
    flags: list[str]
    codes: list[int | str] = field(default_factory=list)

    def node(self, number: int) -> Path:
        """Directory of a node, seen from outside."""
        return self.out_dir.with_name(f"{self.out_dir.name} node {number}")

    @property
    def nodes(self) -> list[Path]:
        return [self.node(number) for number in sorted(set(self.node_of))]

    @property
    def first(self) -> Path:
        """Node of the first rank, which has the results."""
        return self.node(self.node_of[0])

    def losses(self) -> dict[int, float]:
        """Step -> loss of the steps recorded on the first rank's node."""
        return {r["step"]: r["loss"] for r in read_reslog(self.first / "reslog.jsonl") if r["name"] == "train"}

    def parent(self) -> str | None:
        return [r for r in read_reslog(self.first / "reslog.jsonl") if r["name"] == "start"][-1]["parent_ckpt"]

    def log(self, node: Path | None = None) -> str:
        return ((node or self.first) / "train.log").read_text()


def do_runs(jobs: list[dict], meeting: str) -> list[int | str]:
    """Program of a rank: its part of each run; returns exit codes, or causes of death."""
    enter_own_mounts()
    rank, codes = int(os.environ["RANK"]), []
    # These take time and matter to no test here.
    flops.device_peak_flops = lambda *_: 1e11
    describe.measure_bandwidth = lambda *_: 1e9
    os.fsync = lambda _: None
    for index, job in enumerate(jobs):
        bind(Path(job["nodes"][rank]), Path(job["out_dir"]))
        meet(Path(meeting) / str(index), rank)
        try:
            codes.append(train_my_ddp.main(job["flags"]))
        except Exception as error:
            codes.append(f"{type(error).__name__}: {error}")
        if dist.is_initialized():
            dist.destroy_process_group()
    return codes


class Plan:
    """Runs to be made by one group of ranks, then their results: plan[name] is a run that succeeded."""

    def __init__(self, flags: list[str], home: Path, ranks: int):
        self.flags, self.home, self.ranks, self.runs = flags, home, ranks, {}

    def add(self, name: str, node_of: list[int], mode: str) -> Run:
        run = Run(self.home / name, node_of, [*elsewhere(self.flags, self.home / name), *(MODES | CUT)[mode]])
        for node in run.nodes:
            node.mkdir(parents=True, exist_ok=True)
        self.runs[name] = run
        return run

    def resume(self, name: str, source: Run, node_of: list[int], mode: str, keep: int = KEPT) -> Run:
        """Go on with a copy of `source`, as if it had been killed after the save of step `keep`."""
        for node in source.nodes:
            copy = Run(self.home / name, node_of, []).node(int(node.name[-1]))
            shutil.copytree(node, copy)
            for checkpoint in ckpt.list_checkpoints(copy / "ckpt"):
                if checkpoint.step > keep:
                    shutil.rmtree(checkpoint.path)
        run = self.add(name, node_of, mode)
        run.flags.append("--resume")
        return run

    def go(self) -> None:
        jobs = [{"out_dir": str(run.out_dir), "nodes": [str(run.node(n)) for n in run.node_of], "flags": run.flags}
                for run in self.runs.values()]  # fmt: skip
        meeting = self.home / "meeting"
        meeting.mkdir()
        answers = run_ranks(self.ranks, do_runs, jobs, str(meeting))
        for index, run in enumerate(self.runs.values()):
            run.codes = [answer[index] for answer in answers]

    def __getitem__(self, name: str) -> Run:
        run = self.runs[name]
        assert run.codes == [0] * len(run.codes), (name, run.codes)
        return run


def state(run: Run, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, from all nodes; copies on several nodes are equal."""
    found: dict[str, torch.Tensor] = {}
    for node in run.nodes:
        for file in sorted((node / "ckpt" / f"step-{step}").glob("*.safetensors")):
            # Unlike pieces of the optimizer's state, the hook states of two ranks have the same names.
            prefix = f"{file.name} " if ckpt.is_hook_file(file.name) else ""
            for key, tensor in load_file(file).items():
                assert torch.equal(found.setdefault(prefix + key, tensor), tensor), (file, key)
    return found


def check_same(run: Run, whole: Run, since: int = 0) -> None:
    """The same result as an undisturbed run on a shared file system, and no files left over."""
    assert run.losses() == {step: loss for step, loss in whole.losses().items() if step > since}
    assert same_bits(state(run, STEPS), state(whole, STEPS))
    check_tidy(run)


def check_tidy(run: Run) -> None:
    for node in run.nodes:
        assert not [path.name for path in (node / "ckpt").iterdir() if path.name.startswith(".")]
        assert not [path.name for path in node.iterdir() if path.name.startswith(".seen-")]


def damage(checkpoint: Path) -> None:
    """Flip a bit in the middle of a rank's state."""
    victim = next(checkpoint.glob("optim-*.safetensors"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 4
    victim.write_bytes(content)


@pytest.fixture(scope="module")
def flags(data_dir: Path) -> list[str]:
    """A run with a global batch of 8 rows that keeps its checkpoints of steps 2, 4 and 6."""
    return [
        f"--data_dir={data_dir}", "--out_dir=-", f"--max_seq_len={SEQ_LEN}", "--dtype=float32", "--device=cpu",
        "--train_batch_size=2", "--gradient_accumulation_steps=4", "--valid_iters=2", f"--max_iters={STEPS}",
        "--save_interval=2", "--keep_last=9", "--learning_rate=1e-2", "--num_threads=1", "--sample_tokens=4",
        "--bucket_size=20000",
        "--dist_timeout=30", *TINY_MODEL,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Each mode on two ranks: "MODE shared", and "MODE" with a node for each rank."""
    plan = Plan(flags, tmp_path_factory.mktemp("made"), 2)
    for mode in MODES:
        plan.add(f"{mode} shared", [0, 0], mode)
        plan.add(mode, [0, 1], mode)
    for name, node_of in (("lora shared", [0, 0]), ("lora", [0, 1])):
        plan.add(name, node_of, "plain").flags += lora(plan)
    plan.go()
    return plan


def lora(made: Plan) -> list[str]:
    """Flags of an adapter on what the first run has learnt."""
    return [f"--init_from={made.runs['plain shared'].node(0)}", "--lora_r=4"]


@pytest.fixture(scope="module")
def resumed(made: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Two ranks per node go on from step 4, or from what is left."""
    plan = Plan(made.flags, tmp_path_factory.mktemp("resumed"), 2)
    for mode in MODES:
        plan.resume(f"{mode} same", made[mode], [0, 1], mode)
        plan.resume(f"{mode} exchanged", made[mode], [1, 0], mode)
        run = plan.resume(f"{mode} replaced", made[mode], [0, 1], mode)
        shutil.rmtree(run.node(1))
        run.node(1).mkdir()
    run = plan.resume("lora replaced", made["lora"], [0, 1], "plain")
    run.flags += lora(made)
    shutil.rmtree(run.node(1))
    run.node(1).mkdir()
    for mode in ("plain", "zero1"):
        run = plan.resume(f"{mode} on one only", made[mode], [0, 1], mode)
        shutil.rmtree(run.node(1) / "ckpt" / f"step-{KEPT}")
        run = plan.resume(f"{mode} damaged", made[mode], [0, 1], mode)
        damage(run.node(0) / "ckpt" / f"step-{KEPT}")
    run = plan.resume("zero1 without manifest", made["zero1"], [0, 1], "zero1")
    (run.node(1) / "ckpt" / f"step-{KEPT}" / ckpt.MANIFEST).unlink()
    plan.go()
    return plan


@pytest.mark.parametrize("mode", MODES)
def test_separate_stores_change_no_bit(made: Plan, mode: str):
    """Each node holds the model and its ranks' files, and passes the check alone."""
    run, shared = made[mode], made[f"{mode} shared"]
    check_same(run, shared)
    parts = [{c.step: c.part for c in ckpt.list_checkpoints(node / "ckpt")} for node in run.nodes]
    assert [sorted(steps) for steps in parts] == [[2, 4, 6], [2, 4, 6]]
    for step in (2, 4, 6):
        first, second = (steps[step] for steps in parts)
        assert first.save_id == second.save_id and (first.ranks, second.ranks) == ((0,), (1,))
        assert (first.covers, second.covers) == (((0,), (1,)) if mode == "zero1" else ((0, 1), (0, 1)))
        assert first.world_size == 2
    for rank, node in enumerate(run.nodes):
        path = node / "ckpt" / f"step-{STEPS}"
        assert ckpt.find_problem(path) is None
        assert [file.name for file in path.glob("optim-*")] == [f"optim-{rank}.safetensors"]
        weights = "model.safetensors.index.json" if mode == "plain" else "model.safetensors"
        hugging_face = {weights, "config.json", "generation_config.json", "tokenizer.json"}
        assert hugging_face | {"trainer_state.json"} <= set(os.listdir(path))
        if mode != "zero1":
            whole = {key: tensor for key, tensor in state(shared, STEPS).items() if "@" in key}
            assert same_bits(load_file(path / f"optim-{rank}.safetensors"), whole)
    assert not (run.node(1) / "reslog.jsonl").exists()


@pytest.mark.parametrize("mode", MODES)
def test_resumed_on_the_same_nodes(made: Plan, resumed: Plan, mode: str):
    run = resumed[f"{mode} same"]
    check_same(run, made[f"{mode} shared"])
    assert run.parent() == "step-4" and "brought" not in run.log()


@pytest.mark.parametrize("mode", MODES)
def test_resumed_on_exchanged_nodes(made: Plan, resumed: Plan, mode: str):
    """The first rank is on the second one's node: under ZeRO-1 its state is brought, with PowerSGD its residual."""
    run = resumed[f"{mode} exchanged"]
    check_same(run, made[f"{mode} shared"], since=KEPT)
    assert run.parent() == "step-4"
    # The first rank's log is on the other node now.
    assert ("brought" in run.log()) == (mode != "plain")


def test_a_replaced_node_gets_all_from_the_other(made: Plan, resumed: Plan):
    run = resumed["plain replaced"]
    check_same(run, made["plain shared"])
    assert run.parent() == "step-4" and "brought" in run.log()
    assert [c.step for c in ckpt.list_checkpoints(run.node(1) / "ckpt")] == [6]


def test_a_replaced_node_gets_the_adapter(made: Plan, resumed: Plan):
    run = resumed["lora replaced"]
    check_same(made["lora"], made["lora shared"])
    check_same(run, made["lora shared"])
    assert run.parent() == "step-4" and "brought" in run.log()
    assert (run.node(1) / "ckpt" / "step-6" / "adapter_model.safetensors").exists()


def test_zero1_cannot_do_without_a_lost_node(resumed: Plan):
    """The state of its rank was nowhere else; both ranks say so, and exit with 2."""
    run = resumed.runs["zero1 replaced"]
    assert run.codes == [2, 2]
    for rank, node in enumerate(run.nodes):
        (record,) = read_exit_records(node / "exit")
        assert (record["rank"], record["code"]) == (rank, 2)
        assert "no node holds the optimizer state of ranks 1" in record["reason"]
        assert "none is left to resume from" in record["reason"] and "\n" not in record["reason"]
    assert [c.step for c in ckpt.list_checkpoints(run.node(0) / "ckpt")] == [2, 4]
    check_tidy(run)


def test_a_lost_residual_of_powersgd_is_warned_of(resumed: Plan):
    """Weights and moments are whole, but gradients that the lost node's rank had not sent yet are gone."""
    run = resumed["powersgd replaced"]
    assert run.parent() == "step-4"
    lines = [line for node in run.nodes for line in run.log(node).splitlines()]
    assert [line for line in lines if "WARNING" in line and "the memory of the comm hooks of ranks" in line]
    check_tidy(run)


def test_what_only_one_node_committed_is_used_where_it_is_whole(made: Plan, resumed: Plan):
    run = resumed["plain on one only"]
    check_same(run, made["plain shared"])
    assert run.parent() == "step-4" and "brought" in run.log()


def test_what_only_one_node_committed_is_passed_over_under_zero1(made: Plan, resumed: Plan):
    """The node that has it sets it aside, and both go on from the previous one."""
    run = resumed["zero1 on one only"]
    check_same(run, made["zero1 shared"])
    assert run.parent() == "step-2"
    assert "WARNING checkpoint step-4 is skipped: no node holds the optimizer state of ranks 1" in run.log()
    assert len(list((run.node(0) / "ckpt").glob("abandoned-step-4-*"))) == 1
    assert [[c.step for c in ckpt.list_checkpoints(node / "ckpt")] for node in run.nodes] == [[2, 4, 6]] * 2


def test_a_damaged_part_is_replaced_by_the_other_nodes(made: Plan, resumed: Plan):
    run = resumed["plain damaged"]
    check_same(run, made["plain shared"])
    assert run.parent() == "step-4" and "brought" in run.log()
    assert "optim-0.safetensors does not match its checksum (on the node of rank 0)" in run.log()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("zero1 damaged", "optim-0.safetensors does not match its checksum (on the node of rank 0)"),
        ("zero1 without manifest", "it has no manifest (on the node of rank 1)"),
    ],
)
def test_a_damaged_part_spoils_the_whole_under_zero1(made: Plan, resumed: Plan, name: str, problem: str):
    run = resumed[name]
    check_same(run, made["zero1 shared"])
    assert run.parent() == "step-2"
    assert any("WARNING" in line and "step-4" in line and problem in line for line in run.log().splitlines())


@pytest.fixture(scope="module")
def four(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """Four ranks: on two nodes of two with ZeRO-1, and on three nodes without."""
    plan = Plan(flags, tmp_path_factory.mktemp("four"), 4)
    plan.add("zero1 shared", [0, 0, 0, 0], "zero1")
    plan.add("zero1", [0, 0, 1, 1], "zero1")
    plan.add("plain shared", [0, 0, 0, 0], "plain")
    plan.add("plain", [0, 1, 2, 2], "plain")
    for mode in CUT:
        plan.add(mode, [0, 0, 1, 1], mode)
    plan.go()
    return plan


@pytest.fixture(scope="module")
def four_resumed(four: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    plan = Plan(four.flags, tmp_path_factory.mktemp("four-resumed"), 4)
    plan.resume("zero1 dealt anew", four["zero1"], [0, 1, 0, 1], "zero1")
    run = plan.resume("plain replaced", four["plain"], [0, 1, 2, 2], "plain")
    shutil.rmtree(run.node(2))
    run.node(2).mkdir()
    plan.resume("fsdp dealt anew", four["fsdp"], [0, 1, 0, 1], "fsdp")
    run = plan.resume("hsdp replaced", four["hsdp"], [0, 0, 1, 1], "hsdp")
    shutil.rmtree(run.node(0))
    run.node(0).mkdir()
    plan.go()
    return plan


def test_four_ranks_on_two_nodes(four: Plan):
    run = four["zero1"]
    check_same(run, four["zero1 shared"])
    for node, ranks in zip(run.nodes, ((0, 1), (2, 3))):
        (*_, last) = ckpt.list_checkpoints(node / "ckpt")
        assert last.part.ranks == ranks and ckpt.find_problem(last.path) is None


def test_ranks_dealt_again_to_the_nodes(four: Plan, four_resumed: Plan):
    """Of the two ranks of each node, one finds its state there and the other has it brought."""
    run = four_resumed["zero1 dealt anew"]
    check_same(run, four["zero1 shared"])
    assert run.parent() == "step-4" and "brought" in run.log()


def test_a_replaced_node_where_two_others_hold_the_whole(four: Plan, four_resumed: Plan):
    """Two nodes each have every element: the new node must not count them twice."""
    run = four_resumed["plain replaced"]
    check_same(run, four["plain shared"])
    assert run.parent() == "step-4"


@pytest.mark.parametrize("mode", CUT)
def test_a_cut_model_is_whole_on_every_node(four: Plan, mode: str):
    """The ranks of each node write all of it; of the optimizer's state each node has what its ranks hold: with HSDP,
    where a node has a copy of the model, all."""
    run = four[mode]
    check_tidy(run)
    weights = []
    for node, ranks in zip(run.nodes, ((0, 1), (2, 3))):
        (*_, last) = ckpt.list_checkpoints(node / "ckpt")
        assert last.part.ranks == ranks and ckpt.find_problem(last.path) is None
        assert last.part.covers == (ranks if mode == "fsdp" else (0, 1, 2, 3))
        weights.append({k: v for f in last.path.glob("model-*") for k, v in load_file(f).items()})
    assert same_bits(*weights) and len(weights[0]) > 10


def test_a_rank_of_a_cut_model_fetches_its_own_state_alone(four: Plan, four_resumed: Plan):
    run = four_resumed["fsdp dealt anew"]
    check_same(run, four["fsdp"])
    assert run.parent() == "step-4" and "brought 2 files" in run.log()


def test_a_replaced_node_gets_its_copy_of_a_cut_model_from_the_other(four: Plan, four_resumed: Plan):
    run = four_resumed["hsdp replaced"]
    check_same(run, four["hsdp"], since=KEPT)
    assert run.parent() == "step-4" and "brought" in run.log()


def find_places(home: str) -> dict[str, list]:
    """Program of one of four ranks: the store that it finds itself in, by directory; then some files are sent."""
    enter_own_mounts()
    context = init_context(device="cpu")
    rank, answer = context.rank, {}
    for name, node_of in (("shared", [0] * 4), ("separate", [0, 1, 2, 3]), ("two", [0, 1, 0, 1])):
        node = Path(home) / f"{name} {node_of[rank]}"
        node.mkdir(exist_ok=True)
        bind(node, Path(home) / name)
        place = find_place(Path(home) / name / "run", rank, 4, context.gather)
        # Each rank removes its own mark.
        context.barrier()
        answer[name] = [place.store, place.is_first_of_store, place.shared_by_all, os.listdir(node / "run")]
    file = Path(home) / "file"
    file.touch()
    for name, out_dir in (("a file", file), ("below a file", file / "run")):
        try:
            answer[name] = str(find_place(out_dir if rank == 1 else Path(home) / "shared", rank, 4, context.gather))
        except Exception as error:
            answer[name] = f"{type(error).__name__}: {error}"
    sent = []
    for index, size in enumerate((0, 1, (1 << 24) - 1, 1 << 24, (1 << 25) + 3)):
        path = Path(home) / f"{'source' if rank == 3 else rank} {index}"
        if rank == 3:
            path.write_bytes(os.urandom(1 << 10) * (size // (1 << 10)) + b"x" * (size % (1 << 10)))
        context.send_file(path, source=3, target=1)
        context.barrier()
        sent.append((Path(home) / f"source {index}").read_bytes() == path.read_bytes() if path.exists() else None)
    destroy_context(context)
    return answer | {"sent": sent}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return run_ranks(4, find_places, str(tmp_path_factory.mktemp("places")))


def test_ranks_find_out_who_shares_their_file_system(places: list[dict]):
    """They leave no marks in the directories."""
    assert [answer["shared"] for answer in places] == [[[0, 1, 2, 3], rank == 0, True, []] for rank in range(4)]
    assert [answer["separate"] for answer in places] == [[[rank], True, False, []] for rank in range(4)]
    both = [[rank % 2, rank % 2 + 2] for rank in range(4)]
    assert [answer["two"] for answer in places] == [[both[rank], rank < 2, False, []] for rank in range(4)]


@pytest.mark.parametrize("what", ["a file", "below a file"])
def test_a_directory_that_one_rank_cannot_write_is_refused_by_all(places: list[dict], what: str):
    for answer in places:
        assert answer[what].startswith("ValueError: --out_dir ") and "cannot be written" in answer[what]


def test_a_file_is_sent_from_one_rank_to_one_other(places: list[dict]):
    """Empty, smaller than a piece, a piece, and several with a rest; the other two ranks get none."""
    assert [answer["sent"] for answer in places] == [[None] * 5, [True] * 5, [None] * 5, [True] * 5]
