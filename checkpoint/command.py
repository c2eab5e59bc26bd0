"""The command that looks after a run's checkpoints.

    python -m checkpoint ls RUN        list them
    python -m checkpoint verify RUN    read every file and compare its checksum
    python -m checkpoint prune RUN     delete all but those to keep
"""

import sys
import time
from pathlib import Path

from checkpoint.folder import Checkpoint, Unreadable, find_problem, list_checkpoints
from checkpoint.opening import lock_run
from checkpoint.retention import Retention, delete_leftovers, doomed_by, prune
from runs.layout import RunPaths
from utils.arguments import Parser
from utils.paths import a_path, absent


def _age(seconds: float) -> str:
    """5 s, 3 min, 2.5 h or 4.0 days."""
    for unit, length in (("days", 86400), ("h", 3600)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{max(seconds, 0):.0f} s"


def _line(checkpoint: Checkpoint) -> str:
    if checkpoint.unreadable:
        return f"{checkpoint.path.name:<14} cannot be read: {checkpoint.unreadable}"
    size = sum(path.stat().st_size for path in checkpoint.path.iterdir())
    loss = f"{checkpoint.valid_loss:.4f}" if checkpoint.valid_loss is not None else "-"
    age = f"{_age(time.time() - checkpoint.saved_at)} ago" if checkpoint.saved_at else "-"
    part = checkpoint.part
    ranks = f"{len(part.ranks)} of {part.world_size} ranks" if len(part.ranks) < part.world_size else (
        f"{part.world_size} rank{'s' if part.world_size > 1 else ''}")  # fmt: skip
    return f"{checkpoint.path.name:<14} {size / 1e6:>10,.1f} MB  valid loss {loss:>8}  {age:>12}  {ranks}"


def _list(checkpoints: list[Checkpoint]) -> int:
    for checkpoint in checkpoints:
        print(_line(checkpoint))
    return 0


def _verify(checkpoints: list[Checkpoint]) -> int:
    broken = 0
    for checkpoint in checkpoints:
        try:
            problem = find_problem(checkpoint.path)
            verdict = "ok" if problem is None else f"BROKEN: {problem}"
        except Unreadable as error:
            problem = verdict = f"UNREADABLE: {error}"
        broken += problem is not None
        print(f"{_line(checkpoint)}  {verdict}", flush=True)
    return 1 if broken else 0


def _prune(run: Path, checkpoints: list[Checkpoint], retention: Retention, dry_run: bool) -> int:
    lock = None if dry_run else lock_run(run, patience_s=0)
    doomed = doomed_by(retention, checkpoints)
    for checkpoint in doomed:
        print(f"{'would delete' if dry_run else 'deleting'} {_line(checkpoint)}")
    if lock is not None:
        prune(RunPaths(run).ckpt_dir, retention)
        delete_leftovers(RunPaths(run).ckpt_dir)
        lock.close()
    print(f"{len(checkpoints) - len(doomed)} of {len(checkpoints)} checkpoints stay")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m checkpoint", description="Look after the checkpoints of a run.")
    commands = parser.add_subparsers(dest="command", required=True)
    defaults = Retention()
    for name, text in (
        ("ls", "list them"),
        ("verify", "compare every file with its checksum; exit code 1 if one is broken"),
        ("prune", "delete all but those to keep"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("run", type=a_path, help="run directory (--out_dir of the training)")
        if name == "prune":
            command.add_argument("--keep_last", type=int, default=defaults.keep_last, help="newest ones to keep")
            command.add_argument("--keep_best", type=int, default=defaults.keep_best,
                                 help="ones with the lowest validation loss to keep")  # fmt: skip
            command.add_argument("--keep_every", type=int, default=defaults.keep_every,
                                 help="keep those of steps that are a multiple of this")  # fmt: skip
            command.add_argument("--dry_run", action="store_true", help="only say what would be deleted")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = _parser().parse_args(argv)
    run = Path(args.run)
    ckpt_dir = RunPaths(run).ckpt_dir
    try:
        checkpoints = list_checkpoints(ckpt_dir)
        if not ckpt_dir.is_dir():
            raise ValueError(f"{run} is not a run directory: it has no ckpt folder" if run.exists() else absent(run))
        if args.command == "prune":
            for name, least in (("keep_last", 1), ("keep_best", 0), ("keep_every", 0)):
                if getattr(args, name) < least:
                    raise ValueError(f"--{name} must be at least {least}, got {getattr(args, name)}")
            retention = Retention(args.keep_last, args.keep_best, args.keep_every)
            return _prune(run, checkpoints, retention, args.dry_run)
        if not checkpoints:
            raise ValueError(f"{run} holds no checkpoint yet")
        return (_list if args.command == "ls" else _verify)(checkpoints)
    except (ValueError, OSError) as error:
        print(f"checkpoint: {error}", file=sys.stderr)
        return 2
