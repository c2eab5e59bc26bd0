"""Commands whose output nobody reads, or cannot be written: no traceback, and the right exit code."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PRINTS = """
import logging, sys, time
from utils.terminal import run_main
def main():
    if mode == "long":
        while True:
            print("x" * 100)
    if mode == "caught":
        try:
            for _ in range(100_000):
                print("x")
        except OSError as error:
            print("the data is wrong:", error, file=sys.stderr)
            return 2
    if mode == "short":
        print("a \\u4e2d \\udce9")
    if mode == "wait":
        print("ready", flush=True)
        time.sleep(60)
    if mode == "exit":
        sys.exit(3)
    if mode == "write":
        print(sys.stdout.isatty())
        open(sys.argv[1], "w").write("data")
    print("the last word", file=sys.stderr)
    return 0
"""


def run(mode: str, shell: str, goes_on: bool = False, **more) -> subprocess.CompletedProcess:
    """Run a command through a shell.

    Args:
        shell: rest of the shell's line, after the command.
    """
    code = f"mode = {mode!r}\n{PRINTS}\nrun_main(main, goes_on={goes_on})"
    words = ["bash", "-c", f'"$@" {shell}', "bash", sys.executable, "-c", code, *more.pop("argv", [])]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | more.pop("env", {})
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, env=env, **more)


FIRST = '; exit "${PIPESTATUS[0]}"'


@pytest.mark.parametrize(("mode", "shell", "goes_on", "code", "said"), [
    ("long", f"| head -1{FIRST}", False, 141, ""),
    ("caught", f"| head -1{FIRST}", False, 141, ""),
    ("caught", f"| head -1{FIRST}", True, 0, "the last word\n"),
    ("short", f"| true{FIRST}", True, 0, "the last word\n"),
    ("long", f"2>&1 | head -1{FIRST}", False, 141, ""),
    ("exit", f"2>&1 | true{FIRST}", False, 3, ""),
    ("short", ">&-", False, 0, "the last word\n"),
    ("short", ">&- 2>&- <&-", False, 0, ""),
    ("short", "> /dev/full", False, 1, "the last word\nstandard output cannot be written: No space left on device\n"),
    ("short", "> /dev/full", True, 0, "the last word\nstandard output cannot be written: No space left on device\n"),
    ("short", "2> /dev/full", False, 0, ""),
])  # fmt: skip
def test_output_that_nobody_takes(mode: str, shell: str, goes_on: bool, code: int, said: str):
    done = run(mode, shell, goes_on)
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1:strict"])
def test_a_character_that_cannot_be_printed_is_escaped(encoding: str):
    done = run("short", "", env={"PYTHONIOENCODING": encoding})
    assert done.returncode == 0
    assert done.stdout == ("a 中 \\udce9\n" if encoding == "utf-8" else "a \\u4e2d \\udce9\n")


def test_ctrl_c():
    # A shell ignores Ctrl-C in background processes of a script, and their children inherit that.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{hears}\nmode = 'wait'\n{PRINTS}\nrun_main(main)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1) as process:
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == (b"", b"") and process.returncode == 130


def test_a_closed_output_is_not_the_next_file_that_is_opened(tmp_path: Path):
    """A library's message would end up in the data."""
    done = run("write", ">&-", argv=[str(tmp_path / "a")])
    assert done.returncode == 0 and (tmp_path / "a").read_text() == "data"


def test_every_command_ends_so():
    """Exceptions: commands that speak to a program, or are copied to places without zero2all."""
    lacking = [
        path.relative_to(ROOT).as_posix()
        for path in ROOT.rglob("*.py")
        if not {"tests", ".venv", "out"} & set(path.relative_to(ROOT).parts)
        and '\nif __name__ == "__main__":' in (text := path.read_text(encoding="utf-8"))
        and "run_main(" not in text
        # Old doors: what they open does.
        and "runpy.run_module(" not in text
        and not path.name.startswith("interop_")
    ]
    assert sorted(lacking) == ["docker/make_constraints.py", "monitor/node.py", "train_my_ddp.py"]
    # train_my_ddp.py exits in its own way. Its exit code was 120 once its output was a closed pipe.
    started = (ROOT / "train_my_ddp.py").read_text(encoding="utf-8").partition('if __name__ == "__main__":')[2]
    assert started.index("set_up_output(goes_on=True)") < started.index("run(sys.argv[1:])")
