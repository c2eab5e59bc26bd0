"""`python -m utils.resplot`: the command line of the viewer, and pictures without a desktop."""

import argparse
import getpass
import locale
import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.arguments import Parser
from utils.paths import a_path, absent
from utils.text import plain
from viewer.desktop.qt import WITHOUT_WINDOW, debian_package
from viewer.sources.addresses import RunAddress
from viewer.sources.labels import labels
from viewer.sources.source import RunSource, open_sources
from viewer.text import LANGUAGES

_EXAMPLES = """examples:
  python -m utils.resplot out/mine                       one run, live
  python -m utils.resplot out                            all runs in a folder, and those that begin later
  python -m utils.resplot me@server:runs/a out/b         over SSH and from here, in one window
  python -m utils.resplot ssh://me@server:2222/~/runs/a  another port
  python -m utils.resplot out/mine --png curves.png --panels loss,lr --smoothing 0.9
"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="python -m utils.resplot", description="See the curves of runs, while they are being trained or later.",
        epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "runs", nargs="*", metavar="RUN",
        help="a run's directory, its reslog.jsonl, or a folder of runs: here, or on another machine as [user@]host:RUN "
        "or ssh://[user@]host[:port]/RUN, by the keys, names and ports of ~/.ssh/config",
    )  # fmt: skip
    parser.add_argument(
        "--png", type=a_path, metavar="FILE",
        help="draw into a file and end, without a desktop; .svg, .pdf and .csv work too",
    )  # fmt: skip
    parser.add_argument(
        "--panels", metavar="A,B",
        help="panels to draw: loss, lr, grad_norm, ...; 'all'; 'list' prints those that the runs have",
    )
    parser.add_argument("--x", choices=("step", "tokens", "time", "clock"), help="x axis; time leaves out the pauses "
                        "between launches (default: step)")  # fmt: skip
    parser.add_argument("--log", action=argparse.BooleanOptionalAction, help="logarithmic y axes")
    parser.add_argument(
        "--smoothing", type=float, metavar="W",
        help="weight of the past in a moving average, from 0 (none) to 0.999 (default: by the length of each curve)",
    )  # fmt: skip
    parser.add_argument(
        "--theme", choices=("light", "dark"), help="default: light; the window remembers its last one"
    )
    parser.add_argument("--language", choices=LANGUAGES, help="default: the system's language")
    parser.add_argument("--size", metavar="WxH", default="1400x900", help="pixels of a --png (default: 1400x900)")
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="S", help="seconds between two looks at the files (default: 1)"
    )
    parser.add_argument("--ssh_config", type=a_path, metavar="FILE", help="used instead of ~/.ssh/config")
    parser.add_argument("--forget_layout", action="store_true", help="open the window as if for the first time")
    args = parser.parse_args(argv)
    try:
        args.addresses = [RunAddress.parse(text) for text in args.runs]
        args.size = _size(args.size)
    except ValueError as error:
        parser.error(str(error))
    if args.smoothing is not None and not 0 <= args.smoothing <= 0.999:
        parser.error(f"--smoothing is a number from 0 to 0.999, got {args.smoothing}")
    if not 0.05 <= args.interval <= 3600:
        parser.error(f"--interval is a number of seconds from 0.05 to 3600, got {args.interval}")
    if args.ssh_config and not Path(args.ssh_config).is_file():
        parser.error(f"--ssh_config: {absent(args.ssh_config)}")
    if (args.png or args.panels == "list") and not args.addresses:
        parser.error(f"{'--png' if args.png else '--panels list'} needs a RUN")
    return args


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and 200 <= int(width) <= 20000 and 150 <= int(height) <= 20000):
        raise ValueError(f"--size is like 1400x900, from 200x150 to 20000x20000, got {text!r}")
    return int(width), int(height)


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code: 0, or 2 if the command line or something it names is wrong."""
    args = parse_arguments(argv)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    args.language = args.language or _system_language()
    try:
        if args.png or args.panels == "list":
            # A window would wait for the files.
            here = [address.path for address in args.addresses if address.target is None]
            gone = next((path for path in here if not os.path.exists(path)), None)
            return _fail(plain(absent(gone))) if gone else _without_desktop(args)
        from viewer.desktop.application import show
    except ImportError as error:
        if not isinstance(error, ModuleNotFoundError):
            # The package is installed, but it needs a system library that is not.
            library = re.search(r"lib\S+\.so\.\d+", str(error))
            where = f" (on Debian and Ubuntu: apt install {debian_package(library[0])})" if library else ""
            without = "" if args.png else f"; {WITHOUT_WINDOW}"
            return _fail(f"{error.name or 'a package'} cannot be loaded: {plain(error)}{where}{without}")
        return _fail(f"{error.name} is missing: pip install -r requirements-viewer.txt")
    return show(args)


def _system_language() -> str:
    name = locale.getlocale()[0] or ""
    return "zh" if name.lower().startswith(("zh", "chinese")) else "en"


def _fail(sentence: str) -> int:
    print(f"resplot: {sentence}", file=sys.stderr)
    return 2


class Terminal:
    """Asks a host's questions on the terminal."""

    def confirm(self, name: str, key_type: str, fingerprint: str) -> bool:
        print(f"{name} is unknown. It shows the key {key_type} {fingerprint}.", file=sys.stderr)
        return input("Is that the host's fingerprint (yes/no)? ").strip().lower() in ("yes", "y")

    def password(self, prompt: str) -> str | None:
        try:
            return getpass.getpass(prompt) or None
        except EOFError:
            return None


def _without_desktop(args: argparse.Namespace) -> int:
    import matplotlib

    from viewer.colours import look
    from viewer.drawing.export import check_suffix, save
    from viewer.panels import available, chosen_panels, left_out
    from viewer.view import ShownRun, View

    if args.png:
        try:
            # This comes before anything is fetched for the picture.
            check_suffix(Path(args.png))
        except ValueError as error:
            return _fail(str(error))
    matplotlib.use("Agg")
    questions = Terminal() if sys.stdin.isatty() else None
    sources = open_sources(args.addresses, on_change=lambda: None, questions=questions, ssh_config=args.ssh_config)
    problem = _read_all(sources)
    runs = [run for source in sources for run in source.runs]
    snapshots = [run.history.snapshot() for run in runs]
    for run, snapshot in zip(runs, snapshots):
        if not problem and not snapshot.launches and not snapshot.tables:
            nothing = f"{plain(run.log.path)} does not exist or holds no results: name a run's directory"
            problem = run.health.problem or nothing
    if problem:
        return _fail(problem.partition("; tried again in")[0])
    shown = []
    for index, (label, snapshot) in enumerate(zip(labels(runs), snapshots)):
        colour, mark = look(index)
        shown.append(ShownRun(label, colour, snapshot, mark))
    found = available(snapshots)
    if args.panels == "list":
        for panel in found:
            print(f"{panel.key:20} {panel.title}")
        _say_left_out(left_out(shown, 0, 0, "en"))
        return 0
    wanted = [panel.key for panel in found] if args.panels == "all" else _names(args.panels)
    view = View(
        tuple(wanted), x=args.x or "step", log_y=bool(args.log), smoothing=args.smoothing, dark=args.theme == "dark",
        language=args.language,
    )  # fmt: skip
    unknown = sorted(set(wanted) - {panel.key for panel in found})
    if unknown:
        return _fail(f"these runs have no {', '.join(unknown)}; they have: {', '.join(p.key for p in found)}")
    chosen = chosen_panels(shown, view)
    if not chosen:
        return _fail("these runs have nothing to draw yet: try again after their first logged step")
    try:
        drawn = save(Path(args.png), shown, view, args.size)
    except OSError as error:
        return _fail(f"{args.png} cannot be written: {error.strerror or error}")
    print(args.png)
    _say_left_out(left_out(shown, len(chosen), drawn, "en"))
    return 0


def _say_left_out(found: list[str]) -> None:
    for text in found:
        print(f"resplot: left out: {text}", file=sys.stderr)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _read_all(sources: list[RunSource]) -> str:
    """Read everything that is there now. Returns why that is impossible; empty if it is not."""
    for source in sources:
        source.start()
    for source in sources:
        source.loaded.wait()
    for source in sources:
        source.stop()
        source.join(5.0)
    return next((f"{source.name}: {source.problem}" for source in sources if source.problem), "")
