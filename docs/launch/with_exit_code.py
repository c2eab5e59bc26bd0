"""Run one node's launcher, and end with the exit code of its ranks, which the launcher turns into 1.

    python -m docs.launch.with_exit_code [--retryable_from=128] python -m parallel.launch ... train_my_ddp.py ...

It is for schedulers that decide by the exit code whether to restart a job. 0 finished; 2 the command or the data is
wrong, so trying again cannot help; 75 stopped on request, after saving; 1 anything else. --retryable_from=N adds N to
the last two: Kubeflow's restart policy ExitCode restarts a pod whose code is 128 or greater.

SIGTERM is passed on to the ranks, which save and end, but not to the launcher, which would kill them after 30 seconds
(runs/job.py).
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 3)[0]
    from utils import environment

    environment.check()

import argparse
import os
import tempfile
from pathlib import Path

from runs.exits import CRASH, STOPPED, WRONG_INPUT
from runs.job import run_job
from utils.terminal import run_main


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="with_exit_code", description="Run one node's launcher, and end with the exit code of its ranks."
    )
    parser.add_argument("--retryable_from", type=int, default=0, metavar="N", help="add N to 75 and 1")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="python -m parallel.launch ... train_my_ddp.py ...")
    args = parser.parse_args(argv)
    if not args.command:
        print("with_exit_code: the command is missing: python -m parallel.launch ... train_my_ddp.py", file=sys.stderr)
        return WRONG_INPUT
    with tempfile.TemporaryDirectory(prefix="zero2all-exit-") as directory:
        try:
            code, reason = run_job(args.command, Path(directory), os.environ | {"ZERO2ALL_EXIT_DIR": directory})
        except (FileNotFoundError, PermissionError) as error:
            print(f"with_exit_code: {args.command[0]} cannot be started: {error.strerror}", file=sys.stderr)
            return WRONG_INPUT
    print(f"with_exit_code: {code}, {reason}", flush=True)
    return code + args.retryable_from if code in (STOPPED, CRASH) else code


if __name__ == "__main__":
    run_main(lambda: main(sys.argv[1:]), goes_on=True)
