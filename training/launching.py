"""`--nproc N`: the command on several processes of this machine, by parallel/launch.py."""

import argparse
import sys
from contextlib import suppress
from pathlib import Path

from checkpoint.opening import refuse_other_things
from configurator import parse_config
from parallel.launched import exit_record_dir
from runs import exits
from runs.job import run_job
from runs.layout import RunPaths
from training.config import resolve

_MOST_PROCESSES = 1024


def number_of_processes(argv: list[str]) -> tuple[int | None, list[str]]:
    """(value of --nproc, the other words). The flag belongs to the command, not to the run.

    Raises:
        ValueError: its value is not a number of processes.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nproc")
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(f"--nproc: {error.message}") from None
    if found.nproc is not None and not (found.nproc.isdecimal() and 1 <= int(found.nproc) <= _MOST_PROCESSES):
        raise ValueError(f"--nproc must be a number of processes, from 1 to {_MOST_PROCESSES}, got {found.nproc}")
    return found.nproc and int(found.nproc), rest


def launch(nproc: int, argv: list[str]) -> int:
    """Run the command on several processes of this machine; returns their exit code.

    Raises:
        ValueError: the command is wrong.
    """
    config, given = parse_config(argv)
    refuse_folder_of_others(Path(config.run.out_dir))
    if "gradient_accumulation_steps" in given:
        resolve(config, nproc, 1)
    exit_dir = exit_record_dir() or RunPaths(Path(config.run.out_dir)).exit_dir
    for rank in range(nproc):
        exits.clear_exit_record(exit_dir, rank)
    script = Path(__file__).resolve().parent.parent / "train_my_ddp.py"
    launcher = [sys.executable, str(script.parent / "parallel" / "launch.py"), "--standalone", "--quiet"]
    code, _ = run_job([*launcher, f"--nproc_per_node={nproc}", str(script), *argv], exit_dir)
    return code


def refuse_folder_of_others(out_dir: Path) -> None:
    """Refuse a folder that holds something other than a run, before an exit record is left there.

    Raises:
        ValueError: --out_dir is such a folder.
    """
    # If it cannot be read, opening the run will say more.
    with suppress(OSError):
        refuse_other_things(out_dir)
