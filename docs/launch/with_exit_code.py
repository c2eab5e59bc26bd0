"""Run one node's launcher, and end with the exit code that its ranks meant: the launcher turns all of them into 1.

    python -m docs.launch.with_exit_code [--retryable_from=128] python -m parallel.launch ... train_my_ddp.py ...

For schedulers that decide by the exit code whether to start a job again. 0 finished; 2 the command or the data is
wrong, so trying again cannot help; 75 stopped on request, after saving; 1 anything else. --retryable_from=N adds N to
the last two: Kubeflow's restart policy ExitCode starts a pod again whose code is 128 or greater.

SIGTERM goes on to the ranks, which save and end. Not to the launcher, which would kill them after 30 seconds.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from utils.exits import CRASH, OK, STOPPED, WRONG_INPUT, read_exit_records, verdict
from utils.terminal import run_main


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The launcher's children, or the launcher itself before it has any."""
    try:
        process = psutil.Process(launcher.pid)
        return process.children() or [process]
    except psutil.NoSuchProcess:
        return []


def ask_to_stop(launcher: subprocess.Popen) -> None:
    for process in ranks_of(launcher):
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            continue


def meaning(returncode: int, records: list[dict]) -> tuple[int, str]:
    """(exit code, reason) of this node.

    A rank that was killed leaves no record. It cannot hide behind others that left 75: ranks end with that only after
    the checkpoint of all of them is whole.
    """
    if returncode == OK:
        return OK, "finished"
    # A launcher that refuses its own flags, as argparse does, has no ranks that could say so.
    code = verdict([record["code"] for record in records], len(records)) if records else returncode
    if code not in (WRONG_INPUT, STOPPED) or (code == STOPPED and not records):
        code = CRASH
    failed = sorted((record for record in records if record["code"] == code), key=lambda record: record["time"])
    reason = f"rank {failed[0]['rank']}: {failed[0]['reason']}" if failed else "no rank said why"
    return code, "stopped on request, all is saved" if code == STOPPED else reason


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="with_exit_code", description="Run one node's launcher, and end with the exit code that its ranks meant."
    )
    parser.add_argument("--retryable_from", type=int, default=0, metavar="N", help="add N to 75 and 1")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="python -m parallel.launch ... train_my_ddp.py ...")
    args = parser.parse_args(argv)
    if not args.command:
        print("with_exit_code: the command is missing: python -m parallel.launch ... train_my_ddp.py", file=sys.stderr)
        return WRONG_INPUT
    with tempfile.TemporaryDirectory(prefix="zero2all-exit-") as directory:
        try:
            launcher = subprocess.Popen(args.command, env=os.environ | {"ZERO2ALL_EXIT_DIR": directory})
        except (FileNotFoundError, PermissionError) as error:
            print(f"with_exit_code: {args.command[0]} cannot be started: {error.strerror}", file=sys.stderr)
            return WRONG_INPUT
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, lambda *_: ask_to_stop(launcher))
        returncode = launcher.wait()
        code, reason = meaning(returncode, read_exit_records(Path(directory)))
    print(f"with_exit_code: {code}, {reason}", flush=True)
    return code + args.retryable_from if code in (STOPPED, CRASH) else code


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), goes_on=True)
