"""Run a launcher of several ranks, and end with the ranks' exit code: a launcher turns every code into 1."""

import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from runs.exits import CRASH, OK, STOPPED, WRONG_INPUT, read_exit_records, verdict


def run_job(command: Sequence[str], exit_dir: Path, env: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Run it to its end.

    A request to stop (SIGTERM, Ctrl-C, a closed terminal) goes to the ranks, which save and end. It does not go to
    the launcher, which would kill them after 30 seconds; it has a session of its own, so that a terminal's Ctrl-C does
    not reach it.

    Args:
        exit_dir: the folder of the ranks' exit records.
        env: the command's environment; this process's by default.
    Returns:
        exit code and reason, see meaning.
    Raises:
        OSError: the command cannot be started.
    """
    launcher = subprocess.Popen(command, env=env, start_new_session=True)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, lambda got, _frame: _hand_on(launcher, got))
    returncode = launcher.wait()
    return meaning(returncode, read_exit_records(exit_dir))


def _hand_on(launcher: subprocess.Popen, signum: int) -> None:
    """Send the same signal to the ranks: a second Ctrl-C ends a rank at once."""
    for process in _ranks_of(launcher):
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue


def _ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The launcher's children, or the launcher itself before it has any."""
    try:
        process = psutil.Process(launcher.pid)
        return process.children() or [process]
    except psutil.NoSuchProcess:
        return []


def meaning(returncode: int, records: list[dict]) -> tuple[int, str]:
    """(exit code, reason) of this node.

    A rank that was killed leaves no record. If the others left 75, it does not matter: ranks end with 75 only after the
    checkpoint of all of them is whole.
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
