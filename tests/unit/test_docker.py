"""Files in docker/ fit together and fit the project, and the scripts do what they say. No image is built."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from runs.heartbeat import Heartbeat

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKER = ROOT / "docker"
TARGETS = ("cpu", "gpu")
GPU_EXTRAS = {"liger-kernel"}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def instructions() -> list[list[str]]:
    """The Dockerfile's instructions as words, without flags such as --mount."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [[w for w in line.split() if not w.startswith("--")] for line in text.splitlines() if line.strip()]


def run(script: str, *args: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", DOCKER / script, *args], capture_output=True, text=True, timeout=60, env=os.environ | env
    )


def test_what_is_copied_exists_and_is_not_ignored():
    ignored = [line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()
               if line and not line.startswith("#")]  # fmt: skip
    sources = [source for words in instructions() if words[0] == "COPY" for source in words[1:-1]]
    assert "requirements.txt" in sources
    # Files that the image needs at run time come with "COPY . .".
    for source in [*sources, "docker/entrypoint.sh", "docker/healthcheck.py", "train_my_ddp.py", "demo/run.py"]:
        assert (ROOT / source).exists(), source
        assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored), source


def test_targets_begin_from_stages_that_exist():
    stages = {}
    for words in instructions():
        if words[0] == "FROM":
            assert words[2] == "AS"
            assert words[1] == "${BASE}" or words[1] in stages
            stages[words[3]] = words[1]
    assert set(stages) == {"system", *TARGETS}


def test_the_image_ends_without_root_and_starts_through_tini():
    for target in TARGETS:
        rows = instructions()
        start = next(i for i, words in enumerate(rows) if words[0] == "FROM" and words[3] == target)
        end = next((i for i in range(start + 1, len(rows)) if rows[i][0] == "FROM"), len(rows))
        users = [words[1] for words in rows[start:end] if words[0] == "USER"]
        assert users == ["${UID}:${GID}"]
    entry = next(words for words in instructions() if words[0] == "ENTRYPOINT")
    assert json.loads(" ".join(entry[1:])) == ["/usr/bin/tini", "-s", "--", "/zero2all/docker/entrypoint.sh"]
    check = next(words for words in instructions() if words[0] == "HEALTHCHECK")
    assert "/zero2all/docker/healthcheck.py" in " ".join(check)
    assert os.access(DOCKER / "entrypoint.sh", os.X_OK) and os.access(DOCKER / "build.sh", os.X_OK)


def command_of(service: dict) -> list[str]:
    """Command of a service, as words, with the defaults of its variables."""
    shell, option, command = service["command"]
    assert (shell, option) == ("bash", "-c") and command.startswith("exec ")
    usual = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in service["environment"].items()}
    return shlex.split(re.sub(r"\$\$(\w+)", lambda found: usual[found[1]], command))


@pytest.mark.parametrize("name", ["compose.yaml", "compose-two-nodes.yaml"])
def test_compose_names_targets_images_and_volumes_that_exist(name: str):
    compose = yaml.safe_load((DOCKER / name).read_text())
    arguments = {words[1].partition("=")[0] for words in instructions() if words[0] == "ARG"}
    built, used = set(), set()
    for service in compose["services"].values():
        used.add(service["image"])
        if "build" in service:
            build = service["build"]
            assert (DOCKER / build["context"] / build["dockerfile"]).samefile(DOCKER / "Dockerfile")
            assert build["target"] in TARGETS
            assert set(build["args"]) <= arguments
            built.add(service["image"])
        for volume in service["volumes"]:
            source = re.fullmatch(r"(?:\$\{\w+:[-?])?([^}]*)\}?:(/[\w/]+)(:ro)?", volume)
            assert source, volume
            assert source[2] in ("/data", "/zero2all/out", "/cache")
            assert ":?" in volume or source[1] in compose["volumes"]
        for other in service.get("depends_on", []):
            assert other in compose["services"]
        words = command_of(service)
        assert [word for word in words if word.endswith(".py") and not (ROOT / word).exists()] == []
        assert "train_my_ddp.py" in words
    assert used == built


def test_two_nodes_run_one_command_and_meet_at_the_first():
    services = yaml.safe_load((DOCKER / "compose-two-nodes.yaml").read_text())["services"]
    assert {name: service["hostname"] for name, service in services.items()} == {"node-0": "node-0", "node-1": "node-1"}
    command = command_of(services["node-0"])
    assert services["node-1"]["command"] == services["node-0"]["command"]
    assert {"--nnodes=2", "--rdzv_endpoint=node-0:29400"} <= set(command)


def test_the_bases_are_the_same_everywhere():
    default = next(words[1] for words in instructions() if words[0] == "ARG" and words[1].startswith("BASE="))
    gpu = re.search(r"^gpu_base=(\S+)$", (DOCKER / "build.sh").read_text(), re.M)[1]
    assert f"BASE:-{default.removeprefix('BASE=')}" in (DOCKER / "compose-two-nodes.yaml").read_text()
    assert f"GPU_BASE:-{gpu}" in (DOCKER / "compose.yaml").read_text()


def constraints(target: str) -> dict[str, Version]:
    lines = (DOCKER / f"constraints-{target}.txt").read_text().splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()
            pinned[canonicalize_name(name)] = Version(version)
    return pinned


def requirements(path: Path) -> list[Requirement]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-r")]


@pytest.mark.parametrize("target", TARGETS)
def test_pinned_versions_satisfy_the_requirements(target: str):
    pinned = constraints(target)
    for path in ROOT.glob("requirements*.txt"):
        for requirement in requirements(path):
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is None or requirement.specifier.contains(version), f"{path.name}: {requirement}"


@pytest.mark.parametrize("target", TARGETS)
def test_all_that_the_image_asks_for_is_pinned(target: str):
    asked = [requirement.name for name in ("requirements.txt", "requirements-ssh.txt")
             for requirement in requirements(ROOT / name)]  # fmt: skip
    asked += ["matplotlib", "orjson", *(GPU_EXTRAS if target == "gpu" else ())]
    assert {canonicalize_name(name) for name in asked} <= set(constraints(target))
    text = (DOCKER / "Dockerfile").read_text()
    assert f'ARG EXTRAS="{" ".join(sorted(GPU_EXTRAS))}"' in text


def test_pinned_versions_work_on_both_pythons():
    """The lists are made for 3.11; none of their packages that this environment has may refuse 3.12."""
    from importlib.metadata import PackageNotFoundError, metadata

    for name, version in constraints("cpu").items():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            continue
        if Version(found["Version"]).base_version == version.base_version and found["Requires-Python"]:
            allowed = SpecifierSet(found["Requires-Python"])
            assert allowed.contains("3.11.2") and allowed.contains("3.12.0"), name


@pytest.fixture
def only(tmp_path: Path):
    """A PATH with the programs that build.sh needs, and these tools, which do nothing."""

    def make(*tools: str) -> str:
        for name in ("bash", "cat", "dirname", "env"):
            (tmp_path / name).symlink_to(shutil.which(name))
        for name in tools:
            (tmp_path / name).write_text('#!/bin/bash\nprintf "%s\\n" "$0" "$@"\n')
            (tmp_path / name).chmod(0o755)
        return str(tmp_path)

    return make


COMMON = ["--file", str(DOCKER / "Dockerfile"), "--target", "cpu", "--tag", "zero2all:cpu"]


@pytest.mark.parametrize(
    ("tool", "begin"),
    [
        ("docker", ["docker", "build"]),
        ("podman", ["podman", "build", "--format", "docker", "--layers"]),
        ("buildah", ["buildah", "bud", "--format", "docker", "--layers"]),
    ],
)
def test_build_prints_the_command_of_the_tool_that_is_there(tool: str, begin: list[str], only):
    done = run("build.sh", "--print", PATH=only(tool))
    assert done.returncode == 0, done.stderr
    # Without git in the PATH, the revision is not known.
    assert shlex.split(done.stdout) == [*begin, *COMMON, "--build-arg", "REVISION=unknown", str(ROOT)]


def test_build_hands_on_every_option(only, tmp_path: Path):
    (tmp_path / "pip.conf").write_text("[global]\n")
    done = run("build.sh", "--tool", "buildah", "--target", "gpu", "--base", "my/base:1", "--tag", "me:2",
               "--torch-index", "URL", "--extras", "a b", "--pip-config", str(tmp_path / "pip.conf"), "--print",
               "--", "--isolation", "chroot", PATH=only("docker", "buildah"))  # fmt: skip
    words = shlex.split(done.stdout)
    assert words[0] == "buildah" and words[-3:] == ["--isolation", "chroot", str(ROOT)]
    pairs = list(zip(words, words[1:]))
    for pair in [("--target", "gpu"), ("--tag", "me:2"), ("--build-arg", "BASE=my/base:1"),
                 ("--build-arg", "TORCH_INDEX=URL"), ("--build-arg", "EXTRAS=a b"),
                 ("--secret", f"id=pip_conf,src={tmp_path / 'pip.conf'}")]:  # fmt: skip
        assert pair in pairs, pair


def test_build_runs_the_command_that_it_prints(only):
    path = only("podman", "docker")
    shown = shlex.split(run("build.sh", "--print", PATH=path).stdout)
    assert run("build.sh", PATH=path).stdout.splitlines() == [f"{path}/docker", *shown[1:]]


def test_build_of_the_gpu_image_begins_from_cuda(only):
    done = run("build.sh", "--target", "gpu", "--print", PATH=only("docker"))
    assert re.search(r"BASE=\S*/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04 ", done.stdout)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--target", "tpu"], "--target is cpu or gpu, not tpu."),
        (["--tool", "make"], "--tool is docker, podman or buildah, not make."),
        (["--tool", "podman"], "podman is not installed: install it, or leave out --tool."),
        (["--tag"], "--tag needs a value"),
        (["--tag", "--print"], "--tag needs a value"),
        (["--isolation", "chroot"], "--isolation is not an option here"),
        (["--pip-config", "/nowhere/pip.conf"], "/nowhere/pip.conf cannot be read"),
    ],
)
def test_build_refuses_in_one_sentence(args: list[str], sentence: str, only):
    done = run("build.sh", *args, PATH=only("docker"))
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_build_without_a_tool_says_so(only):
    done = run("build.sh", PATH=only())
    assert done.returncode == 2 and "install one of them" in done.stderr


def test_build_help_lists_every_option(only):
    done = run("build.sh", "--help", PATH=only())
    assert done.returncode == 0
    for option in re.findall(r"^ +--([\w-]+)\)", (DOCKER / "build.sh").read_text(), re.M):
        assert f"--{option} " in done.stdout


@pytest.mark.parametrize("args", [[], ["help"], ["--help"]])
def test_entrypoint_shows_help(args: list[str]):
    done = run("entrypoint.sh", *args)
    assert done.returncode == 0 and "python -m demo.run" in done.stdout
    for word in re.findall(r"\b(\w+\.py)\b", done.stdout):
        assert (ROOT / word).exists(), word


@pytest.mark.parametrize("code", [0, 2, 75])
def test_entrypoint_runs_the_command_and_ends_with_its_code(code: int):
    done = run("entrypoint.sh", sys.executable, "-c", f"import sys; print(sys.argv[1:]); sys.exit({code})", "a b", "*")
    assert (done.returncode, done.stdout) == (code, "['a b', '*']\n")


def test_a_signal_reaches_the_command():
    code = "import signal as s, sys; s.signal(s.SIGTERM, lambda *_: sys.exit(75)); print(1, flush=True); s.pause()"
    command = ["bash", DOCKER / "entrypoint.sh", sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"1\n"
        job.send_signal(signal.SIGTERM)
        assert job.wait(20) == 75


@pytest.mark.parametrize(
    ("args", "env", "sentence"),
    [
        (["--max_iters=3"], {}, "--max_iters=3 is not a command"),
        (["true"], {"ZERO2ALL_SSHD": "yes"}, "ZERO2ALL_SSHD is yes: give 1 to start sshd, 0 not to."),
        (["sshd", "-d"], {}, "sshd takes no arguments"),
    ],
)
def test_entrypoint_refuses_in_one_sentence(args: list[str], env: dict[str, str], sentence: str):
    done = run("entrypoint.sh", *args, **env)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence in done.stderr and done.stderr.count("\n") == 1


def test_sshd_is_off_unless_asked_for(tmp_path: Path):
    home = tmp_path / "sshd"
    done = run("entrypoint.sh", "true", ZERO2ALL_SSHD="0", ZERO2ALL_SSHD_DIR=str(home))
    assert done.returncode == 0 and not home.exists()


def test_sshd_without_keys_is_refused(tmp_path: Path):
    done = run("entrypoint.sh", "sshd", ZERO2ALL_AUTHORIZED_KEYS=str(tmp_path / "none"))
    assert done.returncode == 2
    assert ("as root" if os.geteuid() == 0 else "needs public keys") in done.stderr


# --- healthcheck.py --------------------------------------------------------------------------------------------------

RANK = """
import os, signal, sys
from pathlib import Path
from runs.heartbeat import Heartbeat
heartbeat = Heartbeat(Path(sys.argv[1]) / "heartbeat", 0, 1)
heartbeat.beat("step", 7)
print(1, flush=True)
signal.pause()
"""


def health(run_dir: Path, *args: str) -> tuple[int, str]:
    command = [sys.executable, DOCKER / "healthcheck.py", "--run", run_dir, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd="/")
    assert done.stderr == ""
    return done.returncode, done.stdout


@pytest.fixture
def rank(tmp_path: Path):
    """A process that beats once, at step 7, and then hangs."""
    with subprocess.Popen([sys.executable, "-c", RANK, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"1\n"
        yield process
        process.kill()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs Linux's /proc")
class TestHealth:
    def test_idle_is_healthy(self, tmp_path: Path):
        assert health(tmp_path) == (0, "idle: nothing trains here\n")

    def test_a_rank_that_beats_is_healthy(self, rank, tmp_path: Path):
        assert health(tmp_path) == (0, f"{tmp_path}: 1 rank here, phase step, step 7\n")

    def test_a_rank_is_overdue_by_the_runs_own_seconds_a_step(self, rank, tmp_path: Path):
        time.sleep(0.3)
        # No step is logged yet: the first one may take long.
        assert health(tmp_path, "--hang_after=0.1")[0] == 0
        (tmp_path / "reslog.jsonl").write_text('{"name": "train", "step": 7, "dt": 0.01}\n{"name": "save", "st')
        code, said = health(tmp_path, "--hang_after=0.1")
        assert code == 1 and "no sign of life from rank 0" in said and "in phase step at step 7" in said
        (tmp_path / "reslog.jsonl").write_text('{"name": "train", "step": 7, "dt": 30.0}\n')
        assert health(tmp_path, "--hang_after=0.1")[0] == 0

    def test_the_files_of_a_dead_rank_do_not_count(self, rank, tmp_path: Path):
        (tmp_path / "reslog.jsonl").write_text('{"name": "train", "step": 7, "dt": 0.01}\n')
        rank.kill()
        rank.wait()
        assert health(tmp_path, "--hang_after=0.1") == (0, "idle: nothing trains here\n")

    def test_the_files_of_another_machine_do_not_count(self, rank, tmp_path: Path):
        (tmp_path / "reslog.jsonl").write_text('{"name": "train", "step": 7, "dt": 30.0}\n')
        Heartbeat(tmp_path / "heartbeat", 1, 2).beat("step", 1)
        other = tmp_path / "heartbeat" / "rank-1.json"
        other.write_text(json.dumps(json.loads(other.read_bytes()) | {"pid": 1, "monotonic": -1e9}))
        assert health(tmp_path) == (0, f"{tmp_path}: 1 rank here, phase step, step 7\n")
