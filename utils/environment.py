"""The first question of every command: whether this Python can run it.

    if __name__ == "__main__":
        environment.check()

Outside the environment, an import fails because a package is missing; that becomes one sentence and exit code 2. An
import that fails inside an installed package, or an import of a module of this project, keeps its traceback.

Older Pythons must be able to read this file and the first lines of each command.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
_WRONG, _INTERRUPTED = 2, 130
"""Exit codes, as in runs/exits.py and utils/terminal.py, which an old Python cannot read."""


def check(requirements: str = "requirements.txt") -> None:
    """Refuse a Python that is too old; from now on, an import of a missing package ends the command with a sentence,
    and Ctrl-C during an import ends it with 130.

    Args:
        requirements: file that lists what this command needs.
    Raises:
        SystemExit: with code 2.
    """
    if sys.version_info < OLDEST:
        has, way_in = "{}.{}".format(*sys.version_info), _way_in("", " PYTHON=python3.12")
        _end(f"this is Python {has} ({sys.executable}), and 3.11 or 3.12 is needed: {way_in}")

    def tell(kind: type, error: BaseException, traceback: object) -> None:
        lacking = what_is_missing(error, requirements)
        if lacking:
            _end(lacking)
        if issubclass(kind, KeyboardInterrupt):
            sys.exit(_INTERRUPTED)
        sys.__excepthook__(kind, error, traceback)

    sys.excepthook = tell


def what_is_missing(error: BaseException, requirements: str = "requirements.txt") -> str:
    """A sentence about the package that this project imports and this Python lacks; empty for any other error."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name or not _is_asked_for_by_us(error):
        return ""
    if (ROOT / name).exists() or (ROOT / f"{name}.py").exists() or find_spec(name) is not None:
        return ""
    return f"the package {name} is missing in this Python ({sys.executable}): {_way_in(requirements)}"


def _is_asked_for_by_us(error: BaseException) -> bool:
    """Whether the import is in this project, not in an installed package that lacks something itself."""
    asking, frame = "", error.__traceback__
    while frame is not None:
        name = frame.tb_frame.f_code.co_filename
        asking, frame = asking if name.startswith("<frozen importlib") else name, frame.tb_next
    path = Path(asking).resolve()
    return ROOT in path.parents and "site-packages" not in path.parts


def _way_in(requirements: str, setup_option: str = "") -> str:
    """The way to a Python that can run the command.

    Args:
        requirements: file of packages to install if that is enough; empty if it is not.
    """
    beside = "" if Path.cwd() == ROOT else f"{ROOT}/"
    is_inside = Path(sys.prefix).resolve() == VENV.resolve()
    if (VENV / "bin" / "python").exists() and not is_inside:
        return f"activate the environment with `. {beside}.venv/bin/activate`"
    if requirements and (is_inside or sys.prefix != sys.base_prefix or requirements != "requirements.txt"):
        return f"run `{sys.executable} -m pip install -r {beside}{requirements}`"
    there = f" in {ROOT}" if beside else ""
    return f"run `make setup{setup_option}`{there}, then `. {beside}.venv/bin/activate`"


def _end(sentence: str) -> None:
    command = Path(sys.argv[0])
    name = command.parent.name if command.stem == "__main__" else command.stem
    print(f"{name}: {sentence}", file=sys.stderr)
    sys.exit(_WRONG)
