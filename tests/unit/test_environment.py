"""Commands in a Python that cannot run them, or run by their path: one sentence."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runs.exits import read_exit_records
from utils import environment

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/**/*.py")]
    if not {".venv", "tests", "docker", "out"} & set(path.relative_to(ROOT).parts)
    and '\nif __name__ == "__main__":' in path.read_text(encoding="utf-8")
)


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run with a Python that has no packages except its own library."""
    command = [sys.executable, "-S", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})


@pytest.mark.parametrize(
    "words, package",
    [(["train_my_ddp.py", "--nproc", "2"], "tyro"), (["generate.py"], "yaml"), (["monitor_process.py"], "psutil"),
     (["-m", "tokenizer.train_tokenizer"], "tqdm"), (["-m", "parallel.launch"], "torch"),
     (["-m", "data_preprocess.pretokenize_pretrain_data"], "tqdm"), (["-m", "dataset.inspect"], "numpy"),
     (["-m", "checkpoint"], "yaml"), (["-m", "utils.checkpoint"], "yaml"),
     (["-m", "benchmarks.memory"], "torch")],
)  # fmt: skip
def test_without_the_packages_a_command_says_what_to_do(words: list[str], package: str):
    ended = run(*words)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr
    assert f"the package {package} is missing in this Python (" in ended.stderr
    assert ".venv/bin/activate`" in ended.stderr


@pytest.mark.parametrize("path", ["dataset/inspect.py", "utils/checkpoint.py", "checkpoint/__main__.py"])
def test_a_command_runs_by_its_path_from_anywhere(path: str, tmp_path: Path):
    """Their folders hold files with the names of Python's own modules: inspect.py, logging.py."""
    ended = subprocess.run([sys.executable, ROOT / path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_asks_before_it_imports_anything_else(path: str):
    source = (ROOT / path).read_text(encoding="utf-8")
    # An old Python must be able to read it, so that its user gets the message.
    tree = ast.parse(source, feature_version=(3, 8))
    names = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.If)]
    asks = next(index for index, node in enumerate(names) if isinstance(node, ast.If))
    assert "environment.check(" in ast.unparse(names[asks])
    assert {ast.unparse(node) for node in names[:asks]} <= {"import sys", "from utils import environment"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of one file, and a package that lacks another one."""
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "asks.py").write_text("import no_such_package.part")
    (tmp_path / "ours" / "has_a_slip.py").write_text("import ours.no_such_file")
    (tmp_path / "ours" / "asks_a_broken_one.py").write_text("import an_installed_one")
    (tmp_path / "site-packages" / "an_installed_one").mkdir(parents=True)
    (tmp_path / "site-packages" / "an_installed_one" / "__init__.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("name, is_told", [("asks", True), ("has_a_slip", False), ("asks_a_broken_one", False)])
def test_only_a_package_that_we_ask_for_is_called_missing(project: Path, name: str, is_told: bool):
    """If an installed package or our own code lacks a module, that error is shown unchanged."""
    with pytest.raises(ModuleNotFoundError) as failed:
        importlib.import_module(f"ours.{name}")
    assert ("the package no_such_package is missing" in environment.what_is_missing(failed.value)) == is_told
    assert environment.what_is_missing(ImportError("libGL.so.1", name="no_such_package")) == ""


@pytest.mark.parametrize(
    "has_venv, prefix, requirements, advice",
    [(True, "/usr", "requirements.txt", "activate the environment with `. .venv/bin/activate`"),
     (False, "/usr", "requirements.txt", "run `make setup`, then `. .venv/bin/activate`"),
     (False, "/usr", "requirements-viewer.txt", f"run `{sys.executable} -m pip install -r requirements-viewer.txt`"),
     (True, ".venv", "requirements.txt", f"run `{sys.executable} -m pip install -r requirements.txt`")],
)  # fmt: skip
def test_the_advice_fits_what_is_there(
    project: Path, monkeypatch: pytest.MonkeyPatch, has_venv: bool, prefix: str, requirements: str, advice: str
):
    (project / ".venv" / "bin").mkdir(parents=True)
    if has_venv:
        (project / ".venv" / "bin" / "python").touch()
    monkeypatch.setattr(environment, "VENV", project / ".venv")
    monkeypatch.setattr(sys, "prefix", str(project / prefix))
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    monkeypatch.chdir(project)
    with pytest.raises(ModuleNotFoundError) as failed:
        importlib.import_module("ours.asks")
    assert environment.what_is_missing(failed.value, requirements).endswith(f"({sys.executable}): {advice}")


def test_an_old_python_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    with pytest.raises(SystemExit) as ended:
        environment.check()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert f"this is Python 3.9 ({sys.executable}), and 3.11 or 3.12 is needed: " in said


def test_ctrl_c_while_packages_are_imported_gives_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    environment.check()
    with pytest.raises(SystemExit) as ended:
        sys.excepthook(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert (ended.value.code, capsys.readouterr().err) == (130, "")
    sys.excepthook(ValueError, ValueError("a bug"), None)
    assert "ValueError: a bug" in capsys.readouterr().err


def test_training_that_lacks_a_package_is_not_a_crash(tmp_path: Path):
    """Further commands are imported once the command line is checked."""
    program = """
import sys, train_my_ddp as train
parse = train.parse_config
train.parse_config = lambda argv: (parse(argv), sys.modules.update(torch=None))[0]
sys.exit(train.main(sys.argv[1:]))
"""
    flags = [f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'run'}"]
    ended = subprocess.run([sys.executable, "-c", program, *flags], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and "train_my_ddp: the package torch is missing in this Python (" in ended.stdout
    assert [record["code"] for record in read_exit_records(tmp_path / "run" / "exit")] == [2]
