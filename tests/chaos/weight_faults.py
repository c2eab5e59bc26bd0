"""Kinds of faults in numbers: weights and gradients that are not finite, ranks whose weights drift apart."""

import contextlib
import signal
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file

from checkpoint.folder import find_problem
from tests.chaos.faults import ask, kind, struck
from tests.chaos.plan import FLIPPED_BIT, NAN_LOSS, NAN_WEIGHT, Plan
from tests.chaos.run import MOST_SKIPPED, REPLICA_CHECK, SAVE_INTERVAL, SETUPS, Broken, Run, send

AHEAD = 4
"""Steps of lead: a plan must be there before any rank comes to its step."""
TRIES = 5


def plan_for(run: Run, what: str, ranks: tuple[int, ...], random: Random, steps: int, **more: object) -> Plan:
    """Leave a plan, at a step that is not reached yet, until it has struck on all its ranks.

    Args:
        steps: number of steps that it lasts.
        more: `offset`: its first step is this much beyond a multiple of SAVE_INTERVAL; and fields of the plan.
    """
    offset = more.pop("offset", random.randrange(SAVE_INTERVAL))
    for _ in range(TRIES):
        # Then, if the run goes back, it goes to a step that the undisturbed run has saved, too.
        run.wait(lambda: run.launch() and run.newest_step() % SAVE_INTERVAL == 0, "a save at a usual step")
        first = -(-(run.step() + AHEAD) // SAVE_INTERVAL) * SAVE_INTERVAL + offset
        if first + steps > run.steps - SAVE_INTERVAL:
            run.wait(lambda: False, "the end of the run")
        more["attempt"] = run.records("start")[-1]["attempt"]
        plan = Plan(what, run.launch(), ranks, first, first + steps - 1, random.getrandbits(32), **more)
        plan.write(run.home)

        def over(plan: Plan = plan) -> bool:
            begun = {rank for rank, step in plan.done(run.home) if step == plan.first}
            return begun == set(plan.ranks) or run.step() > plan.first + 1 or run.launch() != plan.launch

        run.wait(over, f"{what} at step {first}")
        if plan.done(run.home):
            return plan
    raise Broken(f"{what}: no plan came in time")


def check_finite(run: Run) -> None:
    """Check that committed checkpoints are finite.

    Raises:
        Broken: a committed checkpoint holds non-finite values.
    """
    for path in run.ckpt_dir.iterdir():
        # It may be deleted meanwhile, when newer ones are there; and another fault may have damaged it since.
        with contextlib.suppress(FileNotFoundError):
            if not path.name.startswith(".") and find_problem(path) is None and not is_finite(path):
                raise Broken(f"{path.name} was committed, and is not finite")


def is_finite(checkpoint: Path) -> bool:
    return all(torch.isfinite(t).all() for file in checkpoint.glob("*.safetensors") for t in load_file(file).values())


def gone_back(run: Run, plan: Plan, least: int) -> str:
    """The launch ends, and the next one goes on from a good checkpoint. It leaves out the samples up to the failure if
    the loss ended the launch, and otherwise none."""

    def begun() -> list[dict]:
        return [record for record in run.records("start") if record["attempt"] > plan.attempt]

    run.wait(lambda: run.launch() not in ("", plan.launch) and begun(), f"a new launch after {plan.launch}")
    check_finite(run)
    # The first of them: it may have been killed meanwhile, and the next one may be on its way.
    start = begun()[0]
    if not least <= start["step"] <= plan.first:
        raise Broken(f"went on from step {start['step']}; {least} was saved, and {plan.first} spoiled")
    if start["left_out"] is None:
        return f"on from step {start['step']}, nothing left out"
    first, last = start["left_out"]
    before = [r for r in run.records("train") if r["samples"][0] >= first and r["time"] < start["time"]]
    # The step in progress when it ended may have no record.
    ends = {r["samples"][1] for r in before[-1:]}
    ends |= {2 * r["samples"][1] - r["samples"][0] + 1 for r in before[-1:]}
    if last not in ends or before[-1]["step"] > plan.first + MOST_SKIPPED + 1:
        raise Broken(f"positions {first} to {last} were left out, and the launch had come to {before[-1]}")
    run.may_leave_out.add(last + 1)
    return f"on from step {start['step']} without positions {first} to {last}"


@kind("nan_weight", weight=2)
def nan_weight(run: Run, random: Random) -> str:
    """On one rank, or on all at once as in an overflow."""
    ranks = tuple(range(run.setup.world_size))
    if random.random() < 0.5:
        ranks = (random.choice(ranks),)
    # Half of them right before a save, when no step has been skipped yet.
    offset = 0 if random.random() < 0.5 else random.randrange(1, SAVE_INTERVAL)
    run.wait(run.newest_step, "a checkpoint")
    least = run.newest_step()
    plan = plan_for(run, NAN_WEIGHT, ranks, random, 1, offset=offset)
    where = f"ranks {', '.join(map(str, ranks))} after step {plan.first}"
    return f"{where}: {gone_back(run, plan, least)}"


@kind("nan_weight_and_resave", setups=tuple(name for name in SETUPS if name != "zero1"))
def nan_weight_and_resave(run: Run, random: Random) -> str:
    """Then a death between the two renames that save again the step to which the run has gone back.

    (Under ZeRO-1 each rank spoils its own weight, which may show as a drift first; then nothing is left out.)
    """
    run.wait(run.newest_step, "a checkpoint")
    least, ranks = run.newest_step(), tuple(range(run.setup.world_size))
    plan = plan_for(run, NAN_WEIGHT, ranks, random, 1)
    ask(run, "between_renames", 0, step=0)
    step = struck(run, "a save in the place of another one")
    return f"after step {plan.first}, died in saving step {step} again; {gone_back(run, plan, least)}"


@kind("skipped_at_save", weight=2)
def skipped_at_save(run: Run, random: Random) -> str:
    """Steps are skipped while a save falls due: it waits for the first good step."""
    before, after = random.randrange(2), random.randrange(2)
    plan = plan_for(run, NAN_LOSS, run.setup.loss_ranks, random, 1 + before + after,
                    offset=SAVE_INTERVAL - before)  # fmt: skip
    due, good = plan.first + before, plan.last + 1
    run.may_skip |= set(range(plan.first, plan.last + 1))
    begun = run.records("start")[-1]["time"]

    def saved_steps() -> list[int]:
        return [record["step"] for record in run.records("save") if record["time"] > begun]

    # A save shows in the records once it is written, which on a busy disk takes more steps than the run has skipped.
    run.wait_progress(plan.launch, plan.last - plan.first + SAVE_INTERVAL)
    run.wait(lambda: max(saved_steps(), default=0) >= due, "a save after the skipped steps")
    saved = saved_steps()
    if due in saved or good not in saved:
        raise Broken(f"steps {plan.first} to {plan.last} were skipped, and saved were {saved[-4:]}")
    return f"steps {plan.first} to {plan.last} skipped: saved {good} instead of {due}"


@kind("stop_while_skipping")
def stop_while_skipping(run: Run, random: Random) -> str:
    """A request to stop meets weights that may be spoiled: the last good checkpoint stays the newest."""
    run.wait(run.newest_step, "a checkpoint")
    plan = plan_for(run, NAN_LOSS, run.setup.loss_ranks, random, MOST_SKIPPED - 1, pause=0.3)
    since = len(run.lines)
    run.wait(lambda: run.step() > plan.first, "a skipped step")
    if random.random() < 0.5:
        send(run.monitor.pid, signal.SIGTERM)
    else:
        (run.out_dir / "stop").touch()
    run.end_monitor(75, "a stop while steps are skipped")
    newest = run.newest_step()
    if newest >= plan.first:
        raise Broken(f"step {newest} was saved, and from {plan.first} on steps were skipped")
    if not run.said(rf"\bstep[- ]{newest}\b", since):
        raise Broken(f"stopped while steps were skipped, without a word of step-{newest}")
    run.start()
    start = run.wait_new_launch(plan.launch, newest)
    return f"at step {plan.first}: exit code 75, step-{newest} named, and on from step {start}"


@kind("drift", setups=("ddp2", "powersgd", "hsdp4", "pp2ddp"), weight=2)
def drift(run: Run, random: Random) -> str:
    """A bit of a weight flips on one rank: the ranks notice before any of it is saved."""
    run.wait(run.newest_step, "a checkpoint")
    least = run.newest_step()
    plan = plan_for(run, FLIPPED_BIT, (random.randrange(run.setup.world_size),), random, 1)
    limit = plan.first + REPLICA_CHECK

    def noticed() -> bool:
        if run.launch() == plan.launch and run.step() > limit + 1:
            raise Broken(f"rank {plan.ranks[0]}'s weights drift since step {plan.first}; step {run.step()} is done")
        return run.launch() not in ("", plan.launch)

    run.wait(noticed, "a drift is noticed")
    start = run.records("start")[-1]
    if not least <= start["step"] <= plan.first or start["left_out"]:
        raise Broken(f"went on from {start}; {least} was saved, and {plan.first} spoiled")
    return f"rank {plan.ranks[0]} after step {plan.first}: noticed, and on from step {start['step']}"


