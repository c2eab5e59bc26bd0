"""Report card of a run: what was trained on what, what it cost, what it survived, and how good it is, on one page.

    python -m evaluation.report RUN [--beside RUN_OR_FOLDER ...] [--output DIR]

writes report.md and report.html, which needs no other file. Exit code 2: there is no such run.
"""

import sys
from pathlib import Path

from evaluation.report.gather import gather
from evaluation.report.markdown import to_markdown
from evaluation.report.page import to_page
from utils.arguments import Parser
from utils.files import atomic_write
from utils.paths import a_path, for_command


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m evaluation.report", description="Write a run's report card as one page.")
    parser.add_argument("run", type=a_path, help="run directory (--out_dir of the training)")
    parser.add_argument(
        "--beside", type=a_path, nargs="+", action="extend", default=[], metavar="RUN_OR_FOLDER",
        help="other runs, or folders with an evaluation's results, whose scores stand beside the run's",
    )  # fmt: skip
    parser.add_argument("--output", type=a_path, help="folder for report.md and report.html (default: the run's)")
    parser.add_argument("--title", default="", help="of the page (default: the run's name)")
    parser.add_argument("--no_audit", action="store_true", help="do not read the data to prove that no sample was lost")
    args = parser.parse_args(argv)
    output = Path(args.output or args.run)
    try:
        card = gather(Path(args.run), [Path(path) for path in args.beside], args.title, not args.no_audit)
        output.mkdir(parents=True, exist_ok=True)
        for name, content in (("report.md", to_markdown(card)), ("report.html", to_page(card))):
            atomic_write(output / name, content.encode())
            print(for_command(output / name))
    except (ValueError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    for remark in card.remarks:
        print(f"note: {remark}", file=sys.stderr)
    return 0
