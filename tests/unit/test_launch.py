"""Files of docs/launch: their scripts run with stand-ins for python, srun and others, and all must start the same
training."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from configurator import parse_config
from monitor.command import TrainCommand
from monitor.hosts import read_hosts
from parallel.launch import find_meeting_point, parser_of_flags
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT, write_exit_record
from runs.job import meaning
from train_my_ddp import number_of_processes
from train_my_ddp import run as train_run
from training.config import resolve

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "docs" / "launch"
DATA, RUN = "/data/tokens", "/runs/mine"
TRAINING = ["train_my_ddp.py", "docs/launch/train.yaml", f"--data_dir={DATA}", f"--out_dir={RUN}", "--resume"]
SETTINGS = {"DATA_DIR": DATA, "OUT_DIR": RUN}
ADDRESSES = "1: lo    inet 127.0.0.1/8 scope host lo\n2: eth1    inet 10.0.0.{last}/24 scope global eth1\n"
JOB = {"SLURM_JOB_ID": "12345", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_GPUS_ON_NODE": "8",
       "SLURM_CPUS_PER_TASK": "64", "SLURM_NODEID": "1"}  # fmt: skip


class Sandbox:
    """A folder that looks like the project, in which a launch file runs with stand-ins for the programs that it calls.
    `python` writes its words, one per line, to the file `started`."""

    def __init__(self, directory: Path):
        self.directory, self.bin = directory, directory / ".venv" / "bin"
        (directory / "docs" / "launch").mkdir(parents=True)
        self.bin.mkdir(parents=True)
        (directory / "train_my_ddp.py").touch()
        for name in ("launch.sh", "slurm.sbatch"):
            (directory / "docs" / "launch" / name).write_bytes((LAUNCH / name).read_bytes())
        record = f'for word in "$@"; do echo "$word"; done > {directory}/started\nenv > {directory}/env\n'
        self.add("python", record + "exit ${CODE:-0}\n")
        self.add("nvidia-smi", "exit 1\n")
        # Real srun starts its command on each node.
        self.add("srun", 'while [ "${1#--}" != "$1" ]; do shift; done\n"$@"\n')
        for name in ("scontrol", "scancel", "sleep"):
            self.add(name, f'echo {name} "$@" >> {directory}/called\n[ "$1" != show ] || printf "gpu1\\ngpu2\\n"\n')

    def add(self, name: str, script: str) -> None:
        (self.bin / name).write_text("#!/bin/bash\n" + script)
        (self.bin / name).chmod(0o755)

    def run(self, name: str, *words: str, **settings: str) -> subprocess.CompletedProcess:
        command = ["bash", self.directory / "docs" / "launch" / name, *words]
        path = f"{self.bin}:/usr/bin:/bin"
        return subprocess.run(
            command, cwd=self.directory, env={"PATH": path, **settings}, capture_output=True, text=True, timeout=20
        )

    @property
    def started(self) -> list[str]:
        return (self.directory / "started").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        return dict(line.partition("=")[::2] for line in (self.directory / "env").read_text().splitlines())

    @property
    def called(self) -> list[str]:
        return (self.directory / "called").read_text().splitlines()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path / "zero2all")


def check_launcher(words: list[str], node_rank: int, endpoint: str, nproc: str = "8") -> None:
    """After `python` come the launcher with flags that it knows, and the training that all launch files have."""
    assert words[:2] == ["-m", "parallel.launch"]
    flags = parser_of_flags().parse_args(words[2:])
    assert (flags.nnodes, flags.node_rank, flags.nproc_per_node) == ("2", node_rank, nproc)
    assert (flags.rdzv_endpoint, flags.max_restarts) == (endpoint, 0)
    if node_rank:
        flags.local_addr = flags.local_addr and "127.0.0.1"
        place = find_meeting_point(flags)
        assert (f"{place.host}:{place.port}", place.listening, place.timeout_s) == (endpoint, None, 600)
    assert [flags.training_script, *flags.training_script_args] == TRAINING


def monitor_words() -> list[str]:
    """Arguments of the monitor's command in the README."""
    text = (LAUNCH / "README.md").read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "monitor_process.py --hosts" in line)
    words = shlex.split(line)
    return words[words.index("monitor_process.py") + 1 :]


@pytest.fixture(scope="module")
def manifests() -> list[dict]:
    return list(yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text()))


@pytest.fixture(scope="module")
def job(manifests: list[dict]) -> dict:
    return manifests[0]


def test_the_common_training_is_accepted(monkeypatch: pytest.MonkeyPatch):
    """The configurator accepts it, and it can be split over the 16 ranks that the files mention."""
    monkeypatch.chdir(ROOT)
    config, given = parse_config(TRAINING[1:])
    assert config.run.resume and (config.data.data_dir, config.run.out_dir) == (DATA, RUN)
    assert set(yaml.safe_load((LAUNCH / "train.yaml").read_text())) <= given
    assert resolve(config, 16, 1_000_000).global_batch_size == 512
    assert config.run.save_interval_minutes > 0, "a crash would cost all since the last validation"


def test_scripts_are_bash():
    for name in ("launch.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / "launch.sh", os.X_OK)


@pytest.mark.parametrize("last", [1, 2])
def test_launch_script(sandbox: Sandbox, last: int):
    """Both hosts run the same command: each finds its place, and the interface that has its address."""
    sandbox.add("ip", f"printf '{ADDRESSES.format(last=last)}'\n")
    hosts = {"HOSTS": "10.0.0.1 10.0.0.2", "NPROC_PER_NODE": "8"}
    done = sandbox.run("launch.sh", **SETTINGS, **hosts)
    assert done.returncode == 0, done.stderr
    check_launcher(sandbox.started, last - 1, "10.0.0.1:29400")
    assert sandbox.environment["GLOO_SOCKET_IFNAME"] == "eth1"
    assert sandbox.environment["NCCL_SOCKET_IFNAME"] == "=eth1"
    # Variables that are already set stay, and further flags go to the training.
    mine = {"NCCL_SOCKET_IFNAME": "ib", "CONFIG": "mine.yaml", "PORT": "1234"}
    assert sandbox.run("launch.sh", "--max_iters=5", **SETTINGS, **hosts, **mine).returncode == 0
    assert sandbox.environment["NCCL_SOCKET_IFNAME"] == "ib" and "--rdzv_endpoint=10.0.0.1:1234" in sandbox.started
    assert sandbox.started[-5:] == ["mine.yaml", *TRAINING[2:], "--max_iters=5"]


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (SETTINGS, "HOSTS is missing"),
        ({"HOSTS": "10.0.0.1", "OUT_DIR": RUN}, "DATA_DIR is missing"),
        ({"HOSTS": "10.0.0.1", "DATA_DIR": DATA}, "OUT_DIR is missing"),
        (SETTINGS | {"HOSTS": "10.0.0.8 10.0.0.9"}, "none of HOSTS (10.0.0.8 10.0.0.9) is an address of this host"),
        (SETTINGS | {"HOSTS": "127.0.0.1 10.0.0.9"}, "loopback"),
    ],
)
def test_launch_script_refuses(sandbox: Sandbox, settings: dict[str, str], sentence: str):
    sandbox.add("ip", f"printf '{ADDRESSES.format(last=1)}'\n")
    done = sandbox.run("launch.sh", **settings)
    assert done.returncode == 2 and sentence in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (sandbox.directory / "started").exists()


def test_hosts_file_and_the_monitors_command(monkeypatch: pytest.MonkeyPatch):
    words = monitor_words()
    split = words.index("--")
    assert words[:split] == ["--hosts", "docs/launch/hosts.yaml"]
    command = TrainCommand.parse(words[split + 1 :])
    assert command.is_torchrun and not command.is_standalone and command.out_dir == RUN
    assert [command.script, *command.flags] == TRAINING
    parser_of_flags().parse_args(words[split + 4 :])
    hosts = read_hosts(ROOT / words[1])
    assert [host.reached_at for host in hosts.hosts] == ["10.0.0.1", "10.0.0.2"]
    assert all(host.env["NCCL_SOCKET_IFNAME"] == f"={host.env['GLOO_SOCKET_IFNAME']}" for host in hosts.hosts)


def test_sbatch_directives():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = dict(line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH"))
    first_command = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(n < first_command for n, line in enumerate(lines) if line.startswith("#SBATCH")), "Slurm stops there"
    assert lines[0] == "#!/bin/bash" and options["ntasks-per-node"] == "1" and options["nodes"] == "2"
    assert options["requeue"] == "" and options["open-mode"] == "append", "a requeued job must not empty its log"
    assert re.fullmatch(r"B:TERM@[0-9]+", options["signal"])


def test_sbatch_starts_one_launcher_a_node(sandbox: Sandbox):
    done = sandbox.run("slurm.sbatch", **SETTINGS, **JOB)
    assert done.returncode == 0, done.stderr
    words = sandbox.started
    assert words[:3] == ["-m", "docs.launch.with_exit_code", "python"]
    check_launcher(words[3:], 1, "gpu1:22345")
    assert "scontrol requeue 12345" not in sandbox.called
    sandbox.run("slurm.sbatch", "--run name", "--max_iters=5", **SETTINGS, **JOB)
    assert sandbox.started[-3:] == ["--resume", "--run name", "--max_iters=5"]


@pytest.mark.parametrize(
    "code, restarts, requeued, sentence",
    [
        (0, 0, False, "finished"),
        (2, 0, False, "the command or the data is wrong"),
        (75, 0, True, "stopped after saving"),
        (75, 99, True, "stopped after saving"),
        (1, 19, True, "crashed with code 1"),
        (137, 0, True, "crashed with code 137"),
        (1, 20, False, "not started again after 20 restarts"),
    ],
)
def test_sbatch_requeues_what_can_go_on(sandbox: Sandbox, code: int, restarts: int, requeued: bool, sentence: str):
    done = sandbox.run("slurm.sbatch", CODE=str(code), SLURM_RESTART_COUNT=str(restarts), **SETTINGS, **JOB)
    assert done.returncode == code and sentence in done.stdout
    assert ("scontrol requeue 12345" in sandbox.called) is requeued


@pytest.mark.parametrize("signum, requeued", [(signal.SIGTERM, True), (signal.SIGUSR2, False)])
def test_sbatch_passes_signals_on(sandbox: Sandbox, signum: signal.Signals, requeued: bool):
    """The signal comes while the step runs, which then saves and ends with 75: the script waits for that."""
    sandbox.add("python", f"touch {sandbox.directory}/running\n/bin/sleep 0.5\nexit 75\n")
    script = subprocess.Popen(
        ["bash", "docs/launch/slurm.sbatch"], cwd=sandbox.directory, stdout=subprocess.PIPE, text=True,
        env={"PATH": f"{sandbox.bin}:/usr/bin:/bin", **SETTINGS, **JOB},
    )  # fmt: skip
    deadline = time.monotonic() + 10
    while not (sandbox.directory / "running").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    script.send_signal(signum)
    output, _ = script.communicate(timeout=10)
    assert script.returncode == 75 and "stopped after saving" in output
    assert "scancel --signal=TERM 12345" in sandbox.called
    assert ("scontrol requeue 12345" in sandbox.called) is requeued


def test_sbatch_refuses(sandbox: Sandbox):
    assert "no job" in sandbox.run("slurm.sbatch", **SETTINGS).stderr
    done = sandbox.run("slurm.sbatch", OUT_DIR=RUN, **JOB)
    assert done.returncode == 2 and "DATA_DIR is missing" in done.stderr
    (sandbox.directory / "train_my_ddp.py").unlink()
    done = sandbox.run("slurm.sbatch", **SETTINGS, **JOB)
    assert done.returncode == 2 and "project's folder" in done.stderr and not (sandbox.directory / "started").exists()


def test_manifest(job: dict):
    """Requirements of the operator and of our exit codes. The file as a whole was checked against the operator's
    schema."""
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"} and replicas["Master"]["replicas"] == 1
    assert replicas["Master"]["template"] == replicas["Worker"]["template"]
    # 2 must fail the job, 75 and crashes must not: only this policy looks at the code.
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"ExitCode"}
    pod = replicas["Worker"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch", "the operator sets the environment of this one"
    (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "pytorchjob-port"]
    wrapper = ["python", "-m", "docs.launch.with_exit_code", "--retryable_from=128", "python"]
    assert container["args"][:5] == wrapper and "command" not in container, "it would replace the image's entry point"
    nproc = job["spec"]["nprocPerNode"]
    assert nproc == str(container["resources"]["limits"]["nvidia.com/gpu"])
    # As pkg/controller.v1/pytorch/envvar.go of the operator sets them, on the second of two pods.
    operator = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_NPROC_PER_NODE": nproc, "MASTER_PORT": str(port),
                "MASTER_ADDR": "zero2all-master-0", "POD_IP": "10.0.0.7"}  # fmt: skip
    words = [re.sub(r"\$\((\w+)\)", lambda match: operator[match[1]], word) for word in container["args"][5:]]
    check_launcher(words, 1, f"zero2all-master-0:{port}", nproc)
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
    claims = {path: volumes[mounts[path]]["persistentVolumeClaim"]["claimName"] for path in ("/data", "/runs")}
    assert len(set(claims.values())) == 2 and DATA.startswith("/data/") and RUN.startswith("/runs/")
    env = {variable["name"]: variable.get("value", "") for variable in container["env"]}
    assert "POD_IP" in env
    assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) <= pod["terminationGracePeriodSeconds"]
    assert all(isinstance(value, str) for value in env.values()), "Kubernetes refuses numbers"


def test_only_the_jobs_own_pods_reach_it(manifests: list[dict]):
    job, policy = manifests
    # The operator gives the pods this label.
    pods = {"podSelector": {"matchLabels": {"training.kubeflow.org/job-name": job["metadata"]["name"]}}}
    assert policy["kind"] == "NetworkPolicy"
    assert policy["spec"] == {**pods, "policyTypes": ["Ingress"], "ingress": [{"from": [pods]}]}


def test_settings_are_explained(job: dict):
    """The README's table explains each variable that a file sets, and no file sets one that the program itself
    reads."""
    table = [line for line in (LAUNCH / "README.md").read_text().splitlines() if line.startswith("| `")]
    explained = {name for line in table for name in re.findall(r"`([A-Z][A-Z_]+)", line.split("|")[1])}
    files = "\n".join(path.read_text() for path in LAUNCH.iterdir() if path.suffix != ".md" and path.is_file())
    used = set(re.findall(r"\b(?:NCCL|GLOO|TORCH)_[A-Z_]+[A-Z]", files))
    assert used and used <= explained, used - explained


def record(code: int, rank: int = 0, when: float = 0.0) -> dict:
    return {"rank": rank, "code": code, "reason": f"reason {rank}", "time": when}


@pytest.mark.parametrize(
    "returncode, records, code, reason",
    [
        (0, [record(0), record(0, 1)], OK, "finished"),
        (1, [record(75), record(75, 1)], STOPPED, "stopped on request"),
        (1, [record(75)], STOPPED, "stopped on request"),
        (1, [record(1, 0, 5.0), record(1, 1, 4.0)], CRASH, "rank 1: reason 1"),
        (1, [record(1), record(2, 1)], WRONG_INPUT, "rank 1: reason 1"),
        (1, [record(75), record(1, 1)], CRASH, "rank 1: reason 1"),
        (1, [record(0), record(75, 1)], CRASH, "no rank said why"),
        (1, [], CRASH, "no rank said why"),
        (75, [], CRASH, "no rank said why"),
        (-9, [], CRASH, "no rank said why"),
        (2, [], WRONG_INPUT, "no rank said why"),
    ],
)
def test_meaning_of_a_nodes_end(returncode: int, records: list[dict], code: int, reason: str):
    found, why = meaning(returncode, records)
    assert found == code and why.startswith(reason)


def start_with_exit_code(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "docs.launch.with_exit_code", *words]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_exit_code_comes_through(tmp_path: Path):
    """A launcher that ends with 1, as torchrun does, after its ranks have left their records in the given directory."""
    offset = "--retryable_from=128"
    for code, options, expected in ((75, [], 75), (75, [offset], 203), (2, [offset], 2)):
        write_exit_record(tmp_path / str(code), 0, code, "as asked", None)
        script = f'cp {tmp_path}/{code}/*.json "$ZERO2ALL_EXIT_DIR"; exit 1'
        process = start_with_exit_code(*options, "bash", "-c", script)
        assert process.wait(20) == expected, process.stdout.read()


def test_sigterm_goes_only_to_the_ranks(tmp_path: Path):
    """The signal does not go to the launcher, which would give the ranks 30 seconds."""
    write_exit_record(tmp_path / "records", 0, STOPPED, "stopped on request", 7)
    rank, launcher = tmp_path / "rank.sh", tmp_path / "launcher.sh"
    rank.write_text(
        f"trap 'cp {tmp_path}/records/*.json \"$ZERO2ALL_EXIT_DIR\"; exit 75' TERM\n"
        f"touch {tmp_path}/up\nwhile true; do sleep 0.05; done\n"
    )
    launcher.write_text(f"trap 'touch {tmp_path}/launcher-was-told' TERM\nbash {rank}\nexit 1\n")
    process = start_with_exit_code("bash", str(launcher))
    deadline = time.monotonic() + 10
    while not (tmp_path / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.terminate()
    assert process.wait(20) == STOPPED, process.stdout.read()
    assert not (tmp_path / "launcher-was-told").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [(["--gradient_accumulation_steps=2"], "must be a multiple of their number, 3: use 3"),
     (["--out_dir=corpus"], "--out_dir corpus holds other things than a run: choose a new or empty directory"),
     (["--out_dir=corpus/a.txt"], "--out_dir corpus/a.txt is a file: choose a new or empty directory"),
     (["--hiden_size=8"], "did you mean --hidden_size?")],
)  # fmt: skip
def test_what_a_command_shows_is_said_before_its_ranks_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, more: list[str], sentence: str
):
    """Nothing is left behind, such as an exit record among the files of a corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.launching.run_job", lambda *_: pytest.fail("ranks were started"))
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").touch()
    assert train_run(["--nproc=3", "--data_dir=corpus", "--out_dir=new", *more]) == 2
    assert sentence in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "corpus"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a.yaml", "--seed=1"], (None, ["a.yaml", "--seed=1"])),
        (["--nproc", "2", "a.yaml"], (2, ["a.yaml"])),
        (["a.yaml", "--nproc=16", "--resume"], (16, ["a.yaml", "--resume"])),
        (["--nproc"], "--nproc: expected one argument"), (["--nproc=0"], "--nproc must be a number of processes"),
        (["--nproc=two"], "got two"), (["--nproc=1025"], "from 1 to 1024, got 1025"), (["--nproc="], "got $"),
    ],
)  # fmt: skip
def test_number_of_processes(words: list[str], expected: object):
    if isinstance(expected, tuple):
        assert number_of_processes(words) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            number_of_processes(words)


def test_a_script_keeps_flags_that_begin_like_torchruns():
    flags = parser_of_flags().parse_args(["--nproc_per_node=2", "generate.py", "--n", "4", "--no-x"])
    assert flags.training_script_args == ["--n", "4", "--no-x"]
    with pytest.raises(SystemExit):
        parser_of_flags().parse_args(["--nproc_per", "2", "generate.py"])
