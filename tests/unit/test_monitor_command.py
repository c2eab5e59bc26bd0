"""The training command after `--`: taken apart, searched for its run, and put together again with additions."""

import sys
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import monitor_process
from configurator import parse_config
from monitor.command import TrainCommand, interpreter_of, shutdown_flags

TORCHRUN = ["torchrun", "--standalone", "--nproc_per_node=2"]
LAUNCH = str(Path(monitor_process.__file__).resolve().parent / "parallel" / "launch.py")


def parse(*words: str) -> TrainCommand:
    return TrainCommand.parse(list(words))


def test_words_are_never_split_or_joined():
    """The original split the command at spaces."""
    rest = ["my script.py", "--data_dir=/data/of me", "--out_dir", "/runs/a = b", "--user_name", "$(x) 'y'"]
    words = ["python3", "-m", "parallel.launch", "--standalone", *rest]
    command = TrainCommand.parse(words)
    assert command.words(None, [], []) == words
    assert command.script == "my script.py"
    assert command.out_dir == "/runs/a = b"


def test_the_launcher_runs_in_place_of_torchrun(tmp_path: Path):
    """The launcher is called by its path, because the working directory may differ; its flags follow it, the training's
    come last."""
    torchrun = tmp_path / "my venv" / "torchrun"
    torchrun.parent.mkdir()
    torchrun.write_text(f"#!{sys.executable}\n")
    torchrun.chmod(0o755)
    flags = ["--standalone", "--nproc_per_node=2", "train_my_ddp.py", "a.yaml", "--seed=1"]
    for given, launcher in [
        ([str(torchrun)], [sys.executable, LAUNCH]),
        (["python", "-u", "-m", "torch.distributed.run"], ["python", "-u", LAUNCH]),
        (["python", "-m", "parallel.launch"], ["python", "-m", "parallel.launch"]),
        (["python", "parallel/launch.py"], ["python", "parallel/launch.py"]),
    ]:
        command = parse(*given, *flags)
        assert command.is_torchrun and command.is_standalone and command.script == "train_my_ddp.py"
        assert command.words(None, ["--max_restarts=0"], ["--resume"]) == [
            *launcher, "--max_restarts=0", *flags, "--resume",
        ]  # fmt: skip
    # A missing file cannot be replaced: the program that starts it will say so.
    assert parse("no/torchrun", "t.py").words(None, [], []) == ["no/torchrun", "t.py"]


@pytest.mark.parametrize("line, beside, expected", [
    ("#!{here}/python3.11", [], "{here}/python3.11"),
    ("#!/usr/bin/env python3.11", ["python"], "{here}/python3.11"),
    ("#!/usr/bin/env bash", ["python"], "{beside}/python"),
    ("#!/no/such/python", ["python3"], "{beside}/python3"),
    ("#!/bin/sh", [], sys.executable),
    ("\xff\x00", [], sys.executable),
])  # fmt: skip
def test_the_python_of_a_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, beside: list[str], expected: str
):
    """The launcher must run in the environment in which torchrun would have run."""
    places = {"here": tmp_path / "here", "beside": tmp_path / "beside"}
    for path in [places["here"] / "python3.11", *(places["beside"] / name for name in ["torchrun", *beside])]:
        path.parent.mkdir(exist_ok=True)
        path.write_text(line.format(**places) + "\n", encoding="latin-1")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(places["here"]))
    assert interpreter_of(str(places["beside"] / "torchrun")) == expected.format(**places)


def test_without_torchrun_its_flags_are_not_added():
    command = parse("python3", "-u", "t.py", "--seed=1")
    assert not command.is_torchrun
    assert command.words(None, ["--max_restarts=0"], ["--resume"]) == ["python3", "-u", "t.py", "--seed=1", "--resume"]


@pytest.mark.parametrize(
    "launcher", [["torchrun"], ["/opt/my venv/bin/torchrun"], ["/usr/bin/python3.11", "-m", "torch.distributed.run"]]
)
def test_torchrun_in_all_its_forms(launcher: list[str]):
    command = parse(*launcher, "--nproc_per_node=2", "t.py")
    assert command.is_torchrun and not command.is_standalone
    assert parse(*launcher, "--standalone", "t.py").is_standalone


def test_torchrun_behind_a_flag_of_the_interpreter():
    """`python -u -m torch.distributed.run` is torchrun, too: its --max_restarts would fight the monitor's."""
    assert parse("python", "-u", "-m", "torch.distributed.run", "--nproc_per_node=2", "t.py").is_torchrun


def test_on_another_host_its_own_interpreter_launches():
    flags = ["--nnodes=2"]
    for launcher in (["torchrun"], ["python", "-m", "torch.distributed.run"], ["python", LAUNCH]):
        command = parse(*launcher, "--nproc_per_node=2", "t.py", "--seed=1")
        assert command.words(".venv/bin/python", flags, ["--resume"]) == [
            ".venv/bin/python", "-m", "parallel.launch", "--nnodes=2", "--nproc_per_node=2", "t.py", "--seed=1",
            "--resume",
        ]  # fmt: skip


@pytest.mark.parametrize("words", [[], ["torchrun"], ["torchrun", "--standalone"], ["ls", "-l"], ["t.py", "--seed=1"]])
def test_a_missing_command_is_refused(words: list[str]):
    lacks = "is missing|names no script|begins with its script"
    with pytest.raises(ValueError, match=f"the training command ({lacks}): write it after --"):
        TrainCommand.parse(words)


@pytest.mark.parametrize(
    "flags", [["--max_restarts=3"], ["--max-restarts", "3"], ["--max_restarts=0", "--max-restarts=1"]]
)
def test_restarting_is_the_monitors_work(flags: list[str]):
    with pytest.raises(ValueError, match="leave --max_restarts out"):
        parse("torchrun", *flags, "t.py")


def test_no_restarts_may_be_said():
    assert parse("torchrun", "--max_restarts=0", "t.py").is_torchrun
    # After the script it is a flag of the training, which will complain itself.
    assert parse("torchrun", "t.py", "--max_restarts=3").flags == ("--max_restarts=3",)


OUT_DIRS = {
    "default": ([], "out/run"),
    "=": (["--out_dir=a b"], "a b"),
    "blank": (["--out_dir", "a"], "a"),
    "hyphen": (["--out-dir=a"], "a"),
    "hyphen and blank": (["--out-dir", "a"], "a"),
    "the last one counts": (["--out_dir=a", "--seed=1", "--out-dir", "b"], "b"),
    "= inside": (["--out_dir=a=b"], "a=b"),
    "YAML first": (["{yaml}"], "from/yaml"),
    "YAML by its flag": (["--exp_config_file={yaml}"], "from/yaml"),
    "YAML by its flag, blank": (["--seed=1", "--exp-config-file", "{yaml}"], "from/yaml"),
    "the flag beats the YAML": (["{yaml}", "--out_dir=a"], "a"),
    "YAML that does not say": (["{silent}"], "out/run"),
    "home": (["--out_dir=~/a"], "~/a"),
    "home in YAML": (["{home}"], "~/a"),
    "YAML at home": (["~/yaml 1.yaml"], "from/yaml"),
}


@pytest.mark.parametrize("name", OUT_DIRS)
def test_out_dir_is_the_trainings_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Flags are resolved as in the training, except for `~`, which may differ on another machine."""
    monkeypatch.setenv("HOME", str(tmp_path))
    files = {"yaml": "out_dir: from/yaml\n", "silent": "seed: 3\n", "home": "out_dir: ~/a\n"}
    for stem, text in files.items():
        (tmp_path / f"{stem} 1.yaml").write_text(text)
    words, expected = OUT_DIRS[name]
    flags = [word.format(**{stem: tmp_path / f"{stem} 1.yaml" for stem in files}) for word in words]
    assert parse("python", "t.py", *flags).out_dir == expected
    assert parse_config([*flags, "--data_dir=d"])[0].run.out_dir == expected.replace("~", str(tmp_path))


@pytest.mark.parametrize("text", [
    None, "a: [", "- a\n- b\n", "\xff", "x", "a: 2000-99-99", "!!bool x", "!!int ''", "- " * 9000, "a: 1\na: 2", "\0",
    "#" * (2 << 20),
], ids=lambda text: text and text[:20])  # fmt: skip
def test_a_yaml_file_that_cannot_be_read(tmp_path: Path, text: str | None):
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    expected = "--out_dir is not among the flags, and .*c.yaml cannot be read: give it"
    with pytest.raises(ValueError, match=expected) as said:
        _ = parse("python", "t.py", str(path)).out_dir
    assert "\n" not in str(said.value)
    assert parse("python", "t.py", str(path), "--out_dir=a").out_dir == "a"


def test_torchrun_is_told_how_long_ranks_may_take_if_it_knows_the_flag():
    own = Path(sys.executable).parent / "torchrun"
    if not own.exists():
        pytest.skip("no torchrun beside this interpreter")
    known = "shutdown_timeout" in vars(get_args_parser().parse_args(["t.py"]))
    assert shutdown_flags(str(own), 90) == (["--shutdown-timeout=90"] if known else [])


def test_of_a_foreign_torchrun_nothing_is_known(tmp_path: Path):
    foreign = tmp_path / "torchrun"
    foreign.write_text("#!/bin/sh\n")
    foreign.chmod(0o755)
    assert shutdown_flags(str(foreign), 90) == []
    assert shutdown_flags(str(tmp_path / "nothing"), 90) == []


@pytest.mark.parametrize("given", [["--nproc", "2"], ["--nproc=2"]])
def test_several_processes_by_the_training_itself(given: list[str]):
    """The monitor starts the launcher itself, because that is how it holds the ranks."""
    command = parse("python", "train_my_ddp.py", *given, "a.yaml", "--seed=1")
    assert command == parse("python", "-m", "parallel.launch", "--standalone", "--nproc_per_node=2", "train_my_ddp.py",
                            "a.yaml", "--seed=1")  # fmt: skip
    assert command.is_torchrun and command.flag("nproc") is None
