"""The import rules of the design, read from the source."""

import ast
import fnmatch
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
OURS = {p.name for p in ROOT.iterdir() if p.is_dir() and any(p.glob("*.py"))} | {p.stem for p in ROOT.glob("*.py")}

# Options and their checks, beside the code that they configure: plain data without heavy imports.
CONFIGS = {
    f"{room}.config"
    for room in ("dataset", "evaluation", "model", "model.adapters", "optimizer", "parallel", "tasks", "training")
}
ALLOWED = {
    "utils": set(),
    "runs": {"utils"},
    "checkpoint": {"runs", "utils"},
    "viewer": {"runs", "utils"},
    "configurator": {"configs", *CONFIGS, "runs.layout", "utils.paths", "utils.small_files"},
    "configs": {"utils.small_files"},
    "model": {"utils.balance", "utils.options"},
    "dataset": {"runs", "utils"},
    "parallel": {"checkpoint.named", "utils.balance", "utils.options"},
    "optimizer": {"checkpoint.named", "parallel.buffer", "parallel.contract", "utils.options"},
    "tasks": {"dataset", "model", "runs", "utils"},
    # One dtype for all commands: that of training.
    "serving": {"checkpoint", "model", "optimizer.mixed_precision", "parallel", "tokenizer", "utils"},
    "evaluation": {
        "checkpoint",
        "dataset",
        "model",
        "optimizer.mixed_precision",
        "parallel",
        "runs",
        "serving",
        "tasks",
        "tokenizer",
        "utils",
    },  # fmt: skip
    "tokenizer": {"utils"},
    "data_preprocess": {"utils", "dataset.format", "dataset.sequences", "tokenizer"},
    # Readers need no tokenizer, and layouts of conversations need only its messages.
    "data_preprocess/readers": {"data_preprocess.readers", "dataset.format", "utils"},
    "data_preprocess/conversations": {"data_preprocess.conversations", "tokenizer.messages"},
    # All rooms except the scripts: with train_my_ddp.py, it is the one place that sees everything.
    "training": {
        "checkpoint",
        "configurator",
        "data_preprocess",
        "dataset",
        "evaluation",
        "model",
        "optimizer",
        "parallel",
        "runs",
        "serving",
        "tasks",
        "tokenizer",
        "utils",
        # It draws a profiled step. The viewer is below the training: it imports only runs and utils, and no torch.
        "viewer.timeline",
    },  # fmt: skip
    "monitor": {"checkpoint", "runs", "utils"},
    "monitor_process": {"monitor", "runs", "utils"},
}
# Commands for the reader; nothing imports them.
ALLOWED_TO_FILE = {
    "dataset/inspect.py": {"tokenizer"},
    "dataset/show_mask.py": {"tokenizer", "data_preprocess"},
    "evaluation/report/commands.py": {"configurator", "training.config"},
    "evaluation/report/curves.py": {"viewer.curves"},
    "evaluation/report/faults.py": {"monitor.status"},
    "model/adapters/merge.py": {"checkpoint.choosing", "tokenizer", "utils"},
    "model/memory.py": {"checkpoint.choosing", "utils.environment", "utils.terminal"},
    "parallel/launch.py": {"utils.environment", "utils.terminal"},
    "tokenizer/train_tokenizer.py": {"data_preprocess.readers", "data_preprocess.sampling", "runs.layout"},
}


def imports_of(path: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from utils import paths` names a module, too.
            is_package = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names}
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_it_may(package: str):
    files = [ROOT / f"{package}.py"] if (ROOT / f"{package}.py").exists() else sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        may = ALLOWED[package] | {package} | ALLOWED_TO_FILE.get(path.relative_to(ROOT).as_posix(), set())
        for name in imports_of(path):
            allowed = any(name == a or name.startswith(f"{a}.") for a in may)
            assert allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_only_the_training_script_imports_what_builds_its_parts():
    """And benchmarks, which measure what a run does."""
    importing = set()
    for name in OURS - {"tests", "training", "benchmarks"}:
        files = [ROOT / f"{name}.py"] if (ROOT / f"{name}.py").exists() else (ROOT / name).rglob("*.py")
        importing |= {path for path in files if any(n.split(".")[0] == "training" for n in imports_of(path) - CONFIGS)}
    assert importing == {ROOT / "train_my_ddp.py"}


def test_model_knows_nothing_of_other_processes():
    for path in (ROOT / "model").rglob("*.py"):
        assert "torch.distributed" not in path.read_text(encoding="utf-8"), path


def test_a_command_line_is_judged_without_torch(capfd: pytest.CaptureFixture):
    """Importing torch takes seconds, and a typing mistake should not."""
    judge = "import sys, train_my_ddp as t; n = t.main(sys.argv[1:]); sys.exit(99 if 'torch' in sys.modules else n)"
    assert subprocess.run([sys.executable, "-c", judge, "--hiden_size=3"], cwd=ROOT).returncode == 2
    assert "did you mean --hidden_size?" in capfd.readouterr().out


def test_a_desk_and_a_monitor_need_no_torch():
    """The rooms below them do not import it either, directly or through other modules."""
    modules = [path.relative_to(ROOT).with_suffix("") for room in ("runs", "viewer", "monitor")
               for path in (ROOT / room).rglob("*.py") if not path.name.startswith("__")]  # fmt: skip
    # The parts that a view in a terminal or a browser will need import neither matplotlib nor Qt.
    names = sorted(".".join(path.parts) for path in modules if not {"desktop", "drawing"} & set(path.parts))
    code = f"import importlib, sys\nlist(map(importlib.import_module, {names}))\n"
    code += "print([name for name in ('torch', 'matplotlib', 'PyQt5') if name in sys.modules])"
    assert len(names) > 20
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_the_environment_is_read_in_one_place():
    for package in ("model", "dataset", "optimizer", "tasks", "utils", "tokenizer", "parallel", "training"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name not in ("context.py", "launched.py"):
                assert "os.environ" not in path.read_text(encoding="utf-8"), path
    assert "os.environ" not in (ROOT / "train_my_ddp.py").read_text(encoding="utf-8")


def test_nothing_is_pickled_or_executed():
    """The original broadcast pickled checkpoints and read its configuration with exec."""
    forbidden = ("pickle.", "torch.load(", "torch.save(", "object_list(", "gather_object(", "exec(")
    for path in ROOT.rglob("*.py"):
        if any(part.startswith(".") or part in ("tests", "out") for part in path.relative_to(ROOT).parts):
            continue
        text = path.read_text(encoding="utf-8")
        assert not [word for word in forbidden if word in text], path


def test_every_test_file_is_collected(pytestconfig: pytest.Config):
    """pytest's default list of folders to skip has "dist", which holds the tests of parallelism."""
    skipped = pytestconfig.getini("norecursedirs")
    folders = {part for path in (ROOT / "tests").rglob("test_*.py") for part in path.relative_to(ROOT).parts[:-1]}
    assert "dist" in folders
    assert not [folder for folder in folders for pattern in skipped if fnmatch.fnmatch(folder, pattern)]
