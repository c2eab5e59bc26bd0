"""Kinds of faults: signals to processes, and processes that die or are slow at a chosen moment.

A fault is a function (run, random) -> description of its effect. It injects the fault, waits until the effect shows,
and raises Broken if the effect is not the promised one.
"""

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.chaos.run import FIRST_STEP, HANG_AFTER, SETUPS, UNREACHABLE_AFTER, Broken, Run, RunOver, Setup, send

Throw = Callable[[Run, Random], str]


@dataclass(frozen=True)
class Kind:
    name: str
    throw: Throw
    weight: int = 1
    """How often the kind is drawn, relative to the others."""
    needs_two_ranks: bool = False
    needs_own_disk: bool = False
    needs_read_errors: bool = False
    setups: tuple[str, ...] = tuple(SETUPS)
    """Setups in which the kind can occur."""
    comes_first: bool = False
    """Whether the fault starts the run itself."""
    comes_last: bool = False
    """Whether no other fault can follow in the same run."""

    def fits(self, setup: Setup) -> bool:
        return setup.name in self.setups and (setup.world_size > 1 or not self.needs_two_ranks)


KINDS: dict[str, Kind] = {}
LOCAL = tuple(name for name, setup in SETUPS.items() if not setup.over_ssh)
OVER_SSH = tuple(name for name, setup in SETUPS.items() if setup.over_ssh)


def kind(name: str, **properties: object) -> Callable[[Throw], Throw]:
    def register(throw: Throw) -> Throw:
        KINDS[name] = Kind(name, throw, **properties)
        return throw

    return register


def relaunched(run: Run, old: str, least: int) -> str:
    return f"a new launch from step {run.wait_new_launch(old, least)}"


@kind("kill_rank", weight=3)
def kill_rank(run: Run, random: Random) -> str:
    old, least = run.launch(), run.newest_step()
    run.kill([random.choice(run.ranks())["pid"]])
    return relaunched(run, old, least)


@kind("kill_all", weight=3)
def kill_all(run: Run, random: Random) -> str:
    old, least = run.launch(), run.newest_step()
    run.kill_all()
    return relaunched(run, old, least)


@kind("kill_launcher", weight=3)
def kill_launcher(run: Run, random: Random) -> str:
    """The launcher dies. Its ranks may end or go on alone; the run checks all the time that no two launches are alive
    at once."""
    old, least = run.launch(), run.newest_step()
    run.kill(run.launchers())
    target = run.step() + 8
    run.wait(lambda: run.launch() not in ("", old) or run.step() >= target, "the run goes on without its torchrun")
    if run.launch() == old:
        return "its ranks went on alone"
    return relaunched(run, old, least)


@kind("kill_monitor", weight=3)
def kill_monitor(run: Run, random: Random) -> str:
    run.kill_monitor()
    return new_monitor_takes_over(run)


def new_monitor_takes_over(run: Run, must: bool = True) -> str:
    """Run the same command again while the training is alive.

    Args:
        must: the job can be found, so that it must be taken over as it is; False: it may also be restarted.
    """
    old, least, since = run.launch(), run.newest_step(), len(run.lines)
    with run.slowed():
        run.start()
        run.wait(lambda: run.said("^monitor: (took over )?launch", since), "the new monitor has looked around")
    if run.said("^monitor: took over launch", since):
        run.wait_progress(old)
        return "taken over"
    if must:
        raise Broken(f"launch {old} was alive, and the new monitor did not take it over")
    return relaunched(run, old, least)


@kind("kill_monitor_and_all", weight=3)
def kill_monitor_and_all(run: Run, random: Random) -> str:
    old, least = run.launch(), run.newest_step()
    run.kill_monitor()
    run.kill_all()
    run.start()
    return relaunched(run, old, least)


@kind("stop_rank", weight=3)
def stop_rank(run: Run, random: Random) -> str:
    return hang(run, [random.choice(run.ranks())["pid"]])


@kind("stop_all")
def stop_all(run: Run, random: Random) -> str:
    return hang(run, [process.pid for process in run.processes()])


def hang(run: Run, pids: list[int]) -> str:
    """Stop processes, and check that the monitor notices."""
    old, least, since = run.launch(), run.newest_step(), len(run.lines)
    stopped_at = time.time()
    for pid in pids:
        send(pid, signal.SIGSTOP)
    pattern = r"^monitor: hang: .*?([\d.]+) s are the limit"
    at, match = run.wait(lambda: run.said(pattern, since), "a hang is noticed", FIRST_STEP + 60)
    run.seen.delays.append(at - stopped_at - float(match[1]))
    return f"noticed {run.seen.delays[-1]:+.2f} s after the limit of {match[1]} s; {relaunched(run, old, least)}"


@kind("pause_rank", weight=2)
def pause_rank(run: Run, random: Random) -> str:
    """Stop them for less time than counts as a hang: nothing may happen."""
    old, pid, before = run.launch(), random.choice(run.ranks())["pid"], run.step()
    send(pid, signal.SIGSTOP)
    time.sleep(HANG_AFTER / 3)
    still = run.step()
    send(pid, signal.SIGCONT)
    if still > before + 2:
        raise Broken(f"the ranks made steps {before} to {still} while one of them was stopped")
    run.wait_progress(old)
    return "held up, and went on as it was"


@kind("pause_monitor")
def pause_monitor(run: Run, random: Random) -> str:
    """Stop the monitor for longer than a step may take and a host may be silent: whatever it missed, nothing may
    happen. Over SSH, its connection may be gone when it looks again."""
    old, since = run.launch(), len(run.lines)
    send(run.monitor.pid, signal.SIGSTOP)
    if run.sshd is not None and random.random() < 0.5:
        run.sshd.drop_connections()
    with run.slowed():
        time.sleep(1.1 * UNREACHABLE_AFTER if run.sshd is not None else 2.2 * HANG_AFTER)
    send(run.monitor.pid, signal.SIGCONT)
    return went_on(run, old, since)


def went_on(run: Run, launch: str, since: int) -> str:
    """The launch is the same, and the monitor has reported no problem with it."""
    run.wait_progress(launch, 5)
    if found := run.said("^monitor: (hang|launch .* ended|some ranks have ended)", since):
        raise Broken(f"the monitor said without need: {found[1].string}")
    return "and the launch went on"


@kind("pause_everything", weight=2)
def pause_everything(run: Run, random: Random) -> str:
    """As with a laptop that is shut and opened again, monitor and training stand still, even while a launch begins."""
    launch, where = run.launch(), "at work"
    if random.random() < 0.4:
        where = "at its start"
        run.kill_all()
        launch = begun(run, launch, random)
    since = len(run.lines)
    pids = [run.monitor.pid, *(process.pid for process in run.processes())]
    for pid in pids:
        send(pid, signal.SIGSTOP)
    time.sleep(2.2 * HANG_AFTER)
    # The monitor is the first to look around.
    for pid in pids:
        send(pid, signal.SIGCONT)
        time.sleep(0.2 * random.random())
    run.wait(run.launch, "steps after the pause")
    return f"{where}, {went_on(run, launch, since)}"


@kind("stop_launcher")
def stop_launcher(run: Run, random: Random) -> str:
    """A torchrun that no longer reacts when a rank dies."""
    old, least = run.launch(), run.newest_step()
    for pid in run.launchers():
        send(pid, signal.SIGSTOP)
    run.kill([random.choice(run.ranks())["pid"]])
    return relaunched(run, old, least)


@kind("stop_launcher_to_the_end", comes_last=True)
def stop_launcher_to_the_end(run: Run, random: Random) -> str:
    """A torchrun that does not end when its ranks have ended."""
    for pid in run.launchers():
        send(pid, signal.SIGSTOP)
    run.wait(lambda: not any(process.is_rank for process in run.processes()), "the ranks' end", may_end=True)
    run.wait(lambda: run.monitor.poll() is not None, "the end of the monitor after that of all ranks", 45, may_end=True)
    return "the monitor saw that the ranks had finished"


@kind("sigterm_monitor", weight=2)
def sigterm_monitor(run: Run, random: Random) -> str:
    run.monitor.terminate()
    return stopped_and_on(run, "SIGTERM to the monitor")


@kind("stop_file", weight=2)
def stop_file(run: Run, random: Random) -> str:
    (run.out_dir / "stop").touch()
    return stopped_and_on(run, "a stop file")


def stopped_and_on(run: Run, request: str) -> str:
    """Exit code 75 with a checkpoint of the very last step, and a launch that goes on from there."""
    old = run.launch()
    run.end_monitor(75, request)
    if run.processes():
        raise Broken(f"{request}: processes of the training live on after it")
    last, saved = run.records("train")[-1]["step"], run.newest_step()
    if saved != last:
        raise Broken(f"{request}: step {last} was done, and the newest checkpoint is that of step {saved}")
    run.start()
    start = run.wait_new_launch(old, saved)
    if start != saved or (run.out_dir / "stop").exists():
        raise Broken(f"{request}: stopped at step {saved}, went on from {start}")
    return f"exit code 75 at step {saved}, and on from there"


@kind("double_kill", weight=3)
def double_kill(run: Run, random: Random) -> str:
    """The next launch is hit while it starts."""
    old, least = run.launch(), run.newest_step()
    run.kill_all()
    second = begun(run, old, random)
    victims = {
        "a rank": [p.pid for p in run.processes() if p.is_rank][:1],
        "the launcher": run.launchers(),
        "all": [p.pid for p in run.processes()],
    }
    whom = random.choice(sorted(victims))
    run.kill(victims[whom] or victims["all"])
    if whom == "the launcher":
        # The launcher's ranks may go on without it.
        run.wait(lambda: run.launch() not in ("", old), "a launch that makes steps")
        return f"killed {whom} at the start of {second}; {run.launch()} makes steps"
    return f"killed {whom} at the start of {second}; {relaunched(run, second, least)}"


def begun(run: Run, old: str, random: Random) -> str:
    """Wait until a new launch has processes, and a little longer; returns its name."""
    def found() -> str:
        return next((process.launch for process in run.processes() if process.launch != old), "")

    second = run.wait(found, "processes of the next launch")
    time.sleep(random.random() * 3.0)
    return second


@kind("double_monitor", weight=2)
def double_monitor(run: Run, random: Random) -> str:
    """The monitor dies while the next launch starts."""
    old, least = run.launch(), run.newest_step()
    run.kill([random.choice(run.ranks())["pid"]])
    begun(run, old, random)
    run.kill_monitor()
    run.start()
    return relaunched(run, old, least)


@kind("kill_monitor_in_start", setups=LOCAL)
def kill_monitor_in_start(run: Run, random: Random) -> str:
    """The monitor dies right after it has started a job, before it can record the job."""
    old, least = run.launch(), run.newest_step()
    run.kill_monitor()
    run.kill_all()
    run.start(script="tests/chaos/monitor_with_faults.py")
    run.end_monitor(-signal.SIGKILL, "a monitor that dies when it starts a job")
    run.start()
    return relaunched(run, old, least)


UNCOMMITTED = ("make_directory", "write_tensors", "finish", "before_manifest", "before_rename")
COMMITTED = ("before_prune", "in_prune")


def die_in_save(phase: str, rank: int) -> Throw:
    def throw(run: Run, random: Random) -> str:
        old, least = run.launch(), run.newest_step()
        saved = arm(run, phase, rank, step=0)
        start = run.wait_new_launch(old, least)
        if phase in COMMITTED and start != saved:
            raise Broken(f"the save of step {saved} was whole, and the run went on from step {start}")
        if phase in UNCOMMITTED and start >= saved:
            raise Broken(f"the save of step {saved} was not whole, and the run went on from step {start}")
        return f"died in the save of step {saved}, went on from step {start}"

    return throw


def ask(run: Run, phase: str, rank: int, step: int, seconds: float = 0) -> None:
    """Request a fault at the next moment of a phase."""
    (run.home / "fired.json").unlink(missing_ok=True)
    request = run.home / "armed.tmp"
    request.write_text(json.dumps({"phase": phase, "rank": rank, "step": step, "seconds": seconds}))
    request.replace(run.home / "armed.json")


def struck(run: Run, what: str, may_end: bool = False) -> int:
    """Wait until the requested fault has struck; returns the step of the last save before it."""
    fired = run.home / "fired.json"
    try:
        run.wait(fired.exists, what, may_end=may_end)
    except RunOver:
        (run.home / "armed.json").unlink(missing_ok=True)
        raise
    return json.loads(fired.read_text())["step"]


def arm(run: Run, phase: str, rank: int, step: int, seconds: float = 0) -> int:
    """Request a fault in the next save; returns the step of the save that it hit."""
    ask(run, phase, rank, step, seconds)
    return struck(run, f"{phase} of the next save on rank {rank}")


for _phase in (*UNCOMMITTED, *COMMITTED):
    kind(f"save_{_phase}_0")(die_in_save(_phase, 0))
for _phase in ("make_directory", "write_tensors", "finish", "after_finish"):
    kind(f"save_{_phase}_1", needs_two_ranks=True)(die_in_save(_phase, 1))


@kind("slow_save", weight=2)
def slow_save(run: Run, random: Random) -> str:
    """All processes die while a rank is slow in writing."""
    phase = random.choice(("make_directory", "write_tensors", "finish", "before_rename", "before_prune"))
    old, least = run.launch(), run.newest_step()
    saved = arm(run, phase, 0, step=0, seconds=5.0)
    run.kill_all()
    start = run.wait_new_launch(old, least)
    if (start == saved) != (phase == "before_prune"):
        raise Broken(f"killed in {phase} of the save of step {saved}, the run went on from step {start}")
    return f"killed in {phase} of step {saved}, went on from step {start}"


@kind("save_final", comes_last=True)
def save_final(run: Run, random: Random) -> str:
    """A process dies in the last save of the run."""
    phase = random.choice((*UNCOMMITTED, *COMMITTED))
    launches = run.seen.launches
    arm(run, phase, 0, step=run.steps)
    run.wait(lambda: run.seen.launches > launches, "a launch after a death in the last save")
    return f"died in {phase} of the last save; launched again"


SLOW_SINK_SECONDS = 17.0
"""Longer than ranks may usually outlive another."""


@kind("slow_sink", needs_two_ranks=True, comes_last=True)
def slow_sink(run: Run, random: Random) -> str:
    """A service that takes the results is slow to end: the other ranks have long ended, and the run has finished."""
    launches = run.seen.launches
    ask(run, "sink_close", 0, step=0, seconds=SLOW_SINK_SECONDS)
    struck(run, "the end of a slow service", may_end=True)
    run.wait(lambda: run.monitor.poll() is not None, "the end of the monitor", SLOW_SINK_SECONDS + 60, may_end=True)
    if run.seen.launches > launches:
        raise Broken("a run that had finished was launched again")
    return "waited for"


@kind("slow_sink_stop", needs_two_ranks=True)
def slow_sink_stop(run: Run, random: Random) -> str:
    """The same when the run is asked to stop."""
    ask(run, "sink_close", 0, step=0, seconds=SLOW_SINK_SECONDS)
    run.monitor.terminate()
    return stopped_and_on(run, "SIGTERM with a slow service")
