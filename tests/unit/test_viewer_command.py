"""The viewer's command: pictures without a desktop, and one sentence for anything that cannot be done."""

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from tests.logs import text_line as line

pytest.importorskip("matplotlib", reason="needs matplotlib")

import matplotlib

from tests.sshd import missing
from viewer import command
from viewer.command import main
from viewer.desktop import qt

FONT_CACHE = matplotlib.get_cachedir()
"""Looking for fonts takes seconds."""
ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is at the terminal, and no key is available."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(command.logging, "basicConfig", lambda **_: None)


@pytest.fixture
def run(tmp_path: Path) -> str:
    (tmp_path / "mine").mkdir()
    text = line("start", step=0) + "".join(line("train", step=n, loss=5 / n, lr=n, odd=n) for n in range(1, 9))
    (tmp_path / "mine" / "reslog.jsonl").write_text(text)
    return "mine"


def sentence(text: str) -> str:
    """Message of a failed command: the last line, after the usage if the command line was wrong."""
    last = text.strip().splitlines()[-1]
    assert last.isprintable() and "Traceback" not in text and "Error" not in text, text
    return last


def fails(capsys: pytest.CaptureFixture, *argv: str) -> str:
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code
    shown = capsys.readouterr()
    assert code == 2 and not shown.out, shown
    return sentence(shown.err)


def test_a_png_of_the_size_that_was_asked_for(run: str, capsys: pytest.CaptureFixture):
    assert main([run, "--png", "a.png", "--size", "640x333", "--panels", "loss", "--smoothing", "0.9", "--log",
                 "--x", "time", "--theme", "dark", "--language", "zh"]) == 0  # fmt: skip
    content = Path("a.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content[-8:-4] == b"IEND"
    assert (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")) == (640, 333)
    assert capsys.readouterr() == ("a.png\n", "")


@pytest.mark.parametrize("name, begins", [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("a.CSV", b"run,record,step")])
def test_other_files(run: str, name: str, begins: bytes):
    assert main([run, f"{run}/reslog.jsonl", "--png", name, "--size", "300x200", "--panels", "loss"]) == 0
    assert Path(name).read_bytes().startswith(begins)
    assert sorted(path.name for path in Path().iterdir()) == sorted([name, "mine"])


def test_the_panels_are_listed(run: str, capsys: pytest.CaptureFixture):
    assert main([run, "--panels", "list"]) == 0
    assert [text.split()[0] for text in capsys.readouterr().out.splitlines()] == ["loss", "lr", "odd"]
    assert main([run, "--panels", "all", "--png", "a.csv"]) == 0
    assert Path("a.csv").read_text().startswith("run,record,step,time,tokens,loss,lr,odd\n")
    assert main([".", "--png", "b.csv"]) == 0
    assert Path("b.csv").read_text().startswith("run,record,step,time,tokens,loss,lr\nmine,train,1,")


@pytest.mark.parametrize("argv", [["--panels", "list"], ["--panels", "loss", "--png", "a.csv"]])
def test_what_is_left_out_is_said(run: str, argv: list[str], capsys: pytest.CaptureFixture):
    Path("odd").mkdir()
    text = line("train", step=1, loss=1.0, **{f"m{n}": 1.0 for n in range(300)}) + "[]\n" * 1234
    Path("odd/reslog.jsonl").write_text(text)
    assert main([run, "odd", *argv]) == 0
    assert capsys.readouterr().err.splitlines() == [
        "resplot: left out: odd: lines that hold no record (1,234)",
        "resplot: left out: odd: metrics of train but the first 197",
    ]


def test_more_metrics_than_a_table_can_show(capsys: pytest.CaptureFixture):
    Path("wide").mkdir()
    Path("wide/reslog.jsonl").write_text(line("train", step=1, **{f"m{n:03}": 1.0 for n in range(100)}))
    assert main(["wide", "--panels", "all", "--png", "a.csv"]) == 0
    assert Path("a.csv").read_text().partition("\n")[0].endswith(",m058,m059")
    assert capsys.readouterr().err == "resplot: left out: panels but the first 60\n"


def test_more_panels_than_have_room(run: str, capsys: pytest.CaptureFixture):
    Path("wide").mkdir()
    Path("wide/reslog.jsonl").write_text(line("train", step=1, **{f"m{n:03}": 1.0 for n in range(40)}))
    assert main(["wide", "--panels", "all", "--png", "a.svg", "--size", "400x300", "--language", "en"]) == 0
    said = capsys.readouterr().err.removeprefix("resplot: left out: panels but the first ").strip()
    text = Path("a.svg").read_text()
    assert 2 < int(said) < 40 and f"left out: panels but the first {said}<" in text
    assert sum(f">m{n:03}<" in text for n in range(40)) == int(said)


@pytest.mark.parametrize("size", ["640", "x", "1x1", "640x", "640x400x3", "1e3x500", "9999999x500", "²x300"])
def test_a_wrong_size(run: str, size: str, capsys: pytest.CaptureFixture):
    assert "--size" in fails(capsys, run, "--png", "a.png", f"--size={size}") and not Path("a.png").exists()


@pytest.mark.parametrize("flag", [
    "--smoothing=1", "--smoothing=-0.1", "--smoothing=nan", "--smoothing=x", "--x=loss", "--theme=red", "--interval=0",
    "--interval=nan", "--interval=1e9", "--language=fr", "--ssh_config=absent", "--nonsense", "$(id):run", "node1:22/x",
])  # fmt: skip
def test_a_wrong_flag(run: str, flag: str, capsys: pytest.CaptureFixture):
    assert fails(capsys, run, "--png", "a.png", flag).startswith("python -m utils.resplot: ")
    assert not Path("a.png").exists()


def test_what_cannot_be_drawn(run: str, capsys: pytest.CaptureFixture):
    assert "these runs have no grad_norm, x; they have: loss, lr, odd" in fails(
        capsys, run, "--png", "a.png", "--panels", "loss,x,grad_norm"
    )
    assert "ends in none of .png" in fails(capsys, run, "--png", "a.exe")
    assert "needs a RUN" in fails(capsys, "--png", "a.png")
    assert "needs a RUN" in fails(capsys, "--panels", "list")
    Path("begun").mkdir()
    Path("begun/reslog.jsonl").write_text(line("start", step=0))
    assert "nothing to draw yet" in fails(capsys, "begun", "--png", "a.png")
    Path("empty").mkdir()
    assert fails(capsys, run, "begn", "--png", "a.png") == "resplot: begn does not exist: did you mean begun?"
    for missing_run in ("absent", "empty", "absent/reslog.jsonl", "x" * 300, "a\x1b[2Jb\nc"):
        assert fails(capsys, run, missing_run, "--png", "a.png").startswith("resplot: ")
    assert not Path("a.png").exists()


def test_what_cannot_be_written(run: str, capsys: pytest.CaptureFixture):
    Path("folder.png").mkdir()
    for path in ("absent/a.png", "folder.png", f"{run}/reslog.jsonl/a.png", "/proc/a.png", "x" * 300 + ".png"):
        said = fails(capsys, run, "--png", path, "--size", "200x150", "--panels", "loss")
        assert "cannot be written" in said
    assert not list(Path("folder.png").iterdir())


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_a_host_that_is_not_there(capsys: pytest.CaptureFixture):
    assert "refuses connections" in fails(capsys, "ssh://ada@127.0.0.1:1/run", "--png", "a.png")


def without(*modules: str) -> str:
    """A program in which modules cannot be imported, and which then runs the command."""
    lines = ["import sys", *(f"sys.modules[{name!r}] = None" for name in modules)]
    return "\n".join([*lines, "from viewer.command import main", "sys.exit(main(sys.argv[1:]))"])


def in_process_without(modules: list[str], *argv: str, **variables: str) -> subprocess.CompletedProcess:
    hidden = ("DISPLAY", "WAYLAND_DISPLAY", "QT_QPA_PLATFORM")
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    return subprocess.run(
        [sys.executable, "-c", without(*modules), *argv], capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": str(ROOT), "MPLCONFIGDIR": FONT_CACHE} | variables,
    )  # fmt: skip


def test_pictures_need_no_desktop(run: str):
    done = in_process_without(["PyQt5", "torch", "paramiko", "orjson"], run, "--png", "a.png", "--size", "300x200")
    assert (done.returncode, done.stdout, done.stderr) == (0, "a.png\n", "")
    assert Path("a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module, argv", [("matplotlib", ["--png", "a.png"]), ("PyQt5", [])])
def test_what_to_install(run: str, module: str, argv: list[str]):
    done = in_process_without([module], run, *argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert sentence(done.stderr).startswith(f"resplot: {module}") and "pip install -r" in done.stderr


def test_a_library_that_is_missing(run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def broken(_args) -> int:
        raise ImportError("libGL.so.1: cannot open shared object file: No such file or directory", name="PyQt5.QtGui")

    monkeypatch.setattr(command, "_without_desktop", broken)
    said = fails(capsys, run, "--png", "a.png")
    assert "libGL.so.1" in said and "is missing: pip" not in said
    assert "apt install libgl1" in said and "draws without" not in said
    # A window lacks it, a picture may not.
    window = types.ModuleType("viewer.desktop.application")
    window.__getattr__ = broken
    monkeypatch.setitem(sys.modules, "viewer.desktop.application", window)
    assert fails(capsys, run).endswith("apt install libgl1); --png FILE draws without a window")


@pytest.mark.parametrize("platform", ["xcb", "nowhere"])
def test_no_window_can_be_opened(run: str, platform: str):
    pytest.importorskip("PyQt5.QtWidgets", reason="needs PyQt5", exc_type=ImportError)
    done = in_process_without([], run, QT_QPA_PLATFORM=platform)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    said = sentence(done.stderr)
    assert said.startswith("resplot: Qt cannot open a window: ") and said.endswith("--png FILE draws without a window")
    # Here, the libraries of its plugin are missing or there is no display.
    assert ("QT_QPA_PLATFORM" if platform == "nowhere" else "missing" if ".so." in said else "no display") in said


def test_what_qt_lacks_is_named(monkeypatch: pytest.MonkeyPatch):
    found = """
        linux-vdso.so.1 (0x00007ffd)
        libxcb-icccm.so.4 => not found
        libX11.so.6 => /lib/libX11.so.6 (0x00007f)
        libxcb-keysyms.so.1 => not found
        libxcb-icccm.so.4 => not found
    """
    assert qt.lacking(found) == ["libxcb-icccm.so.4", "libxcb-keysyms.so.1"]
    packages = ["libxcb-icccm4", "libxcb-xinerama0", "libxkbcommon-x11-0", "libdbus-1-3", "libx11-6", "libgl1"]
    libraries = ["libxcb-icccm.so.4", "libxcb-xinerama.so.0", "libxkbcommon-x11.so.0", "libdbus-1.so.3.1",
                 "libX11.so.6", "libGL.so.1"]  # fmt: skip
    assert list(map(qt.debian_package, libraries)) == packages
    could_not = 'Could not load the Qt platform plugin "xcb" in "" even though it was found.'
    monkeypatch.setattr(qt, "_missing_libraries", lambda platform: f"libraries of {platform}")
    assert "libraries of xcb; --png FILE" in qt.why_no_window([could_not, "This application failed to start"])
    assert "there is no display" in qt.why_no_window(["could not connect to display :7", could_not])
    assert "of its own; --png" in qt.why_no_window(["something\nof its own"])


@pytest.mark.parametrize("module", ["utils.resplot", "viewer", "utils.timeline", "viewer.timeline"])
def test_the_module_can_be_run(module: str):
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--png " in done.stdout and not done.stderr
