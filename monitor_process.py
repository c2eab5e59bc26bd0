"""Keep a training run alive: start it, watch it, end it when it hangs, and start it again where it left off.

    python monitor_process.py -- python -m parallel.launch --nproc_per_node=2 train_my_ddp.py FLAGS
    python monitor_process.py --hosts hosts.yaml -- python -m parallel.launch --nproc_per_node=8 train_my_ddp.py FLAGS
    python monitor_process.py --status RUN

The command after -- is run as it is; --resume is added if there is a checkpoint. SIGTERM or Ctrl-C to the monitor ends
the run with a checkpoint. If the monitor itself is killed, the training goes on, and the same command takes it over.
Messages are printed and kept in RUN/monitor/.

Exit codes are those of the training: 0 finished; 2 the command or the data is wrong, or another monitor has the run; 75
stopped on request after saving; 1 given up, with the reason on the last line.
"""

from utils import environment

if __name__ == "__main__":
    environment.check()

import argparse
import errno
import logging
import math
import os
import re
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import psutil

from monitor.command import TrainCommand
from monitor.hosts import read_hosts
from monitor.node import LocalNode
from monitor.policy import Rules
from monitor.remote import OtherVersion, RemoteNode
from monitor.status import ENDED_STATES, Status, describe, last_loss
from monitor.supervisor import Supervisor, SupervisorOptions
from monitor.watch import Limits
from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT
from runs.layout import LOCK, RunPaths
from utils.arguments import Parser
from utils.files import is_passing, lock_file
from utils.paths import a_path, absent, expand
from utils.ssh import SSHProblem
from utils.terminal import run_main

logger = logging.getLogger("monitor")

_LOCK_PATIENCE = 30.0
"""Seconds for which a monitor that is just ending may still have the run."""
_LINES_KEPT = 1000


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The monitor's own options, and the training command after `--`."""
    split = argv.index("--") if "--" in argv else len(argv)
    rules, limits, options = Rules(), Limits(), SupervisorOptions()
    parser = Parser(
        prog="monitor_process.py",
        usage="monitor_process.py [options] -- python -m parallel.launch ... train_my_ddp.py ...",
        description="Keep a training run alive: start it, watch it, end it when it hangs, start it again.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--status", type=a_path, metavar="RUN", help="print what a run is doing, and end")
    add("--hosts", type=a_path, metavar="FILE", help="YAML file of the hosts to run on, over SSH (docs/robustness.md)")
    add("--max_restarts", type=int, default=rules.max_restarts, help="most restarts in all")
    add("--max_without_progress", type=int, default=rules.max_without_progress,
        help="give up only after as many launches in a row without a new step, ...")  # fmt: skip
    add("--give_up_after", type=float, default=rules.give_up_after,
        help="... and seconds without one; waiting for a host or a disk does not count")  # fmt: skip
    add("--backoff", type=float, default=rules.backoff, help="seconds before a restart; doubled without progress")
    add("--max_backoff", type=float, default=rules.max_backoff, help="longest wait before a restart")
    add("--on_nonfinite", choices=("go_back", "stop"), default=rules.on_nonfinite,
        help="non-finite loss: resume before it and leave out its samples, or end")  # fmt: skip
    add("--max_go_back", type=int, default=rules.max_go_back, help="how many times to go back")
    add("--hang_after", type=float, default=limits.step_floor,
        help="shortest time in seconds without a step that counts as a hang")  # fmt: skip
    add("--hang_factor", type=float, default=limits.step_factor, help="... and in median steps of this run")
    add("--first_step_timeout", type=float, default=limits.first_step,
        help="seconds without a step before the median is known")  # fmt: skip
    add("--start_timeout", type=float, default=limits.start, help="seconds from the launch to the first step")
    add("--compile_timeout", type=float, default=limits.compile, help="seconds for the first step with --compile")
    add("--save_timeout", type=float, default=limits.save, help="seconds for a checkpoint, also on the way out")
    add("--validate_timeout", type=float, default=limits.validate,
        help="shortest time in seconds without a batch of a validation that counts as a hang")  # fmt: skip
    add("--unreachable_after", type=float, default=options.unreachable_after,
        help="seconds without an answer after which a host counts as lost, and is told of")  # fmt: skip
    add("--interval", type=float, default=options.interval, help="seconds between looks at the run")
    add("--quiet", action="store_true", help="do not show what the training prints (it is in RUN/monitor/)")
    if "--" not in argv and (begin := next((word for word in argv if _may_be_a_program(word)), None)):
        parser.error(f"the training command goes behind --, as in: monitor_process.py -- {begin} ...")
    return parser.parse_args(argv[:split]), argv[split + 1 :]


def _may_be_a_program(word: str) -> bool:
    return not word.startswith("-") and re.search(r"\.py$|^(python|torchrun)[0-9.]*$", Path(word).name) is not None


def options_of(args: argparse.Namespace) -> SupervisorOptions:
    """The options for the supervisor.

    Raises:
        ValueError: a number makes no sense.
    """
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not 0 <= value < math.inf:
            raise ValueError(f"--{name} must be a number, and not negative, got {value}")
    if not 0 < args.interval <= 60:
        raise ValueError(f"--interval must lie in (0, 60], got {args.interval}")
    for name in ("hang_factor", "max_without_progress"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    rules = Rules(args.max_restarts, args.max_without_progress, args.give_up_after, args.backoff, args.max_backoff,
                  args.on_nonfinite, args.max_go_back)  # fmt: skip
    limits = Limits(args.hang_after, args.hang_factor, args.first_step_timeout, args.start_timeout,
                    args.compile_timeout, args.save_timeout, validate=args.validate_timeout)  # fmt: skip
    return SupervisorOptions(
        rules, limits, args.interval, stop_timeout=args.save_timeout + limits.end,
        unreachable_after=args.unreachable_after, show_output=not args.quiet,
    )  # fmt: skip


def build(args: argparse.Namespace, words: list[str]) -> Supervisor:
    """The supervisor, with a connection to each host.

    Raises:
        ValueError, SSHProblem: the command, the hosts file or a host is wrong.
        OSError: a file cannot be read now.
    """
    options, command = options_of(args), TrainCommand.parse(words)
    out_dir = command.out_dir
    run_dir = Path(expand(out_dir))
    if args.hosts is None:
        if not Path(command.script).exists():
            raise ValueError(absent(command.script, "begin the monitor in the folder of the repository"))
        return Supervisor([LocalNode(run_dir)], command, run_dir, options, None)
    if not command.is_torchrun or command.is_standalone:
        raise ValueError("--hosts needs a command that begins with python -m parallel.launch, without --standalone")
    hosts = read_hosts(Path(args.hosts))
    nodes = [RemoteNode(host, out_dir, index) for index, host in enumerate(hosts.hosts)]
    known = known_hosts_of(run_dir)
    for node in nodes:
        try:
            # Connect before the first launch: only now somebody may be there to answer.
            node.open(confirm=ask_about_host if sys.stdin.isatty() else None)
        except (OSError, ValueError) as error:
            if node.name not in known or isinstance(error, OtherVersion):
                raise
            # This machine may have just booted and have no network yet, or the host may be booting.
            node.expect(error)
    return Supervisor(nodes, command, run_dir, options, hosts)


def known_hosts_of(run_dir: Path) -> list[str]:
    """Names of the hosts that an earlier monitor of this run has reached."""
    try:
        return Status.read(run_dir).hosts
    except (OSError, ValueError):
        return []


def ask_about_host(host: str, key_type: str, fingerprint: str) -> bool:
    """Whether the user confirms the key of a host on the first contact."""
    print(f"The host {host} is not known. Its {key_type} key has the fingerprint {fingerprint}.")
    return input("Is that right? (yes/no) ").strip().lower() == "yes"


def claim(run_dir: Path, stop_requested: Callable[[], bool] = lambda: False) -> BinaryIO | None:
    """Lock the monitor's own files on this machine. The run itself is claimed where its processes are, by
    monitor/claim.py. Waits for a monitor that is just ending, and for a disk; None if asked to stop meanwhile.

    Raises:
        ValueError: another living monitor has the files.
    """
    taken = f"another monitor looks after {run_dir}: see monitor_process.py --status {run_dir}"
    deadline, told = time.monotonic() + _LOCK_PATIENCE, False
    while True:
        try:
            RunPaths(run_dir).monitor_dir.mkdir(parents=True, exist_ok=True)
            return lock_file(RunPaths(run_dir).monitor_dir / LOCK, taken)
        except OSError as error:
            if not is_passing(error):
                raise ValueError(f"{run_dir} cannot be written: {error.strerror}") from None
            problem = f"{run_dir} cannot be written: {error.strerror}"
        except ValueError:
            if is_at_work(run_dir) or time.monotonic() > deadline:
                raise
            problem = f"the last monitor of {run_dir} is about to end"
        if stop_requested():
            return None
        if not told:
            told = True
            logger.warning("waiting: %s", problem)
        time.sleep(0.2)


def is_at_work(run_dir: Path) -> bool:
    """Whether the monitor that wrote the status file is alive and has not ended its work."""
    try:
        status = Status.read(run_dir)
        process = psutil.Process(status.monitor_pid)
        return status.state not in ENDED_STATES and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, ValueError, psutil.Error):
        return False


def set_up_log() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("monitor: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


class SteadyLog(logging.Handler):
    """Appends lines to a file. Lines that cannot be written (a full disk, a file system that is away) are kept, and
    written in order as soon as they can be.

    Args:
        path: opened anew for each of the few lines, so that it does not matter what happens to it in between.
    """

    def __init__(self, path: Path):
        super().__init__()
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._path, self._is_told = path, False
        self._lines: deque[bytes] = deque(maxlen=_LINES_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record).encode(errors="replace") + b"\n")
        try:
            with open(self._path, "ab", buffering=0) as file:
                while self._lines:
                    self._append(file, self._lines[0])
                    self._lines.popleft()
            self._is_told = False
        except OSError as error:
            if not self._is_told:
                self._is_told = True
                logger.warning("%s cannot be written, its lines are kept: %s", self._path, error.strerror)

    def _append(self, file: BinaryIO, line: bytes) -> None:
        end = os.fstat(file.fileno()).st_size
        if file.write(line) != len(line):
            os.ftruncate(file.fileno(), end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(argv: list[str]) -> int:
    args, words = parse_arguments(argv)
    set_up_log()
    try:
        if args.status is not None:
            run_dir = Path(args.status)
            for line in describe(Status.read(run_dir), last_loss(run_dir), time.time()):
                print(line)
            return OK
        supervisor = build(args, words)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # nohup means that a closed terminal is not a request to stop.
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, lambda *_: supervisor.request_stop())
        lock = claim(supervisor.run_dir, lambda: supervisor.stop_requested)
    except (ValueError, SSHProblem) as error:
        logger.error("%s", error)
        return WRONG_INPUT
    except OSError as error:
        # Nobody is to blame for a disk that does not answer now.
        logger.error("%s", error)
        return CRASH
    if lock is None:
        logger.info("stopped on request before a launch")
        return STOPPED
    logger.addHandler(SteadyLog(RunPaths(supervisor.run_dir).monitor_dir / "monitor.log"))
    try:
        return supervisor.run()
    finally:
        supervisor.close()
        lock.close()


if __name__ == "__main__":
    # The monitor looks after the training even if nobody reads its output any more.
    run_main(lambda: main(sys.argv[1:]), goes_on=True)
