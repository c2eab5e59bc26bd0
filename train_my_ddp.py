"""Train a model, on one process or many.

    python train_my_ddp.py --data_dir=D --out_dir=R [--resume] [--help]
    python train_my_ddp.py --nproc 2 configs/demo-cpu.yaml --data_dir=D --out_dir=R
    python -m parallel.launch --nnodes=2 --nproc_per_node=8 ... train_my_ddp.py ... (also torchrun)
    train_my_ddp.py --task_type=sft --init_from=R --data_dir=CONVERSATIONS --out_dir=R2   (then dpo, with preferences)

Exit codes, also in R/exit/rank-N.json, because a launcher hides them (--nproc does not): 0 finished; 2 the command or
the data is wrong; 75 stopped on request (SIGTERM, Ctrl-C, a file R/stop) after saving; anything else is a crash.

The loop is in training/trainer.py; the other files of that folder build its parts and report.
"""

from utils import environment

if __name__ == "__main__":
    environment.check()

import logging
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from configurator import parse_config
from parallel.launched import exit_record_dir, launch_token, launched_rank, launched_world_size
from runs import exits
from runs.layout import RunPaths
from training.launching import launch, number_of_processes, refuse_folder_of_others
from utils.logging import log_traceback, setup_console
from utils.terminal import INTERRUPTED, set_up_output

logger = logging.getLogger("train")

def main(argv: list[str]) -> int:
    """Run, and leave an exit record whatever happens; returns the exit code.

    Raises:
        Exception, KeyboardInterrupt: a crash, after its record was written.
    """
    rank = launched_rank()
    setup_console(rank)
    exit_dir, config, context, trainer, report = exit_record_dir(), None, None, None, None
    is_watched = exit_dir is not None

    def leave(code: int, reason: str, **more: object) -> int:
        if exit_dir is not None:
            step = trainer.progress.step if trainer else None
            try:
                exits.write_exit_record(
                    exit_dir, rank, code, reason, step, world_size=launched_world_size(), launch=launch_token(), **more
                )
            except OSError as error:
                # The reason is in the log already, and there is no other place for it.
                logger.debug("no exit record: %s", error)
        return code

    try:
        try:
            config, given = parse_config(argv)
            refuse_folder_of_others(Path(config.run.out_dir))
            exit_dir = exit_dir or RunPaths(Path(config.run.out_dir)).exit_dir
            exits.clear_exit_record(exit_dir, rank)
            # These import torch, which takes seconds: mistakes in the command are told before.
            from parallel import destroy_context, init_context
            from training import report
            from training.data import fit_context, prepare_data
            from training.trainer import StopRequest, Trainer

            # Before a request to stop waits for a step: the tokens written so far are kept anyway.
            config = replace(config, data=fit_context(config.run, config.data, given))
            data_dirs = prepare_data(config.run, config.data, given, config.adapter)
            stop = StopRequest(says_so=rank == 0)
            if not config.run.valid_only:
                for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(signum, stop)
            context = init_context(config.system.device, config.parallel.ddp_backend, config.parallel.dist_timeout)
            trainer = Trainer(config, given, context, stop, data_dirs)
        except (exits.StopRequested, KeyboardInterrupt) as request:
            if isinstance(request, KeyboardInterrupt) and context is not None:
                # Other ranks may wait for this one.
                raise
            logger.info("stopped on request before the first step")
            return leave(exits.STOPPED, "stopped on request")
        except (ValueError, ModuleNotFoundError) as error:
            problem = str(error) if isinstance(error, ValueError) else environment.what_is_missing(error)
            if not problem:
                raise
            # The groups stay as they are: to leave NCCL's in order, all ranks would have to take part.
            code = leave(exits.WRONG_INPUT, problem)
            if exit_dir is None or not exits.is_told_by_lower_rank(exit_dir, rank, problem, launch_token()):
                logger.error("train_my_ddp: %s", problem)
            log_traceback()
            return code
        if config.run.valid_only:
            trainer.validate()
            code = exits.OK
        else:
            code = trainer.train()
        trainer.close()
        destroy_context(context)
        return leave(code, "finished" if code == exits.OK else "stopped on request")
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt):
            logger.error("interrupted before anything more was saved")
            log_traceback()
        else:
            logger.error("crashed:\n%s", traceback.format_exc())
        # For the monitor: the position behind the samples that made the loss non-finite.
        non_finite = isinstance(error, FloatingPointError) and trainer is not None
        more = {"non_finite_until": trainer.next_sample} if non_finite else {}
        leave(exits.CRASH, f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-8000:], **more)
        if trainer is not None:
            # A monitor gives a save that is in flight its time.
            trainer.heartbeat.beat("save", trainer.progress.step)
            trainer.release()
        # Last: a save that was in flight may be the one to continue from.
        if report is not None and not is_watched:
            for line in report.ways_on(config.run, context, error):
                logger.error(line)
        raise


def run(argv: list[str]) -> int:
    """Run the command; returns the exit code."""
    try:
        nproc, argv = number_of_processes(argv)
        if nproc is not None:
            return launch(nproc, argv)
    except ValueError as error:
        setup_console(0)
        logger.error("train_my_ddp: %s", error)
        return exits.WRONG_INPUT
    return main(argv)


if __name__ == "__main__":
    # Its output may be lost: all of it is in the run's train.log.
    set_up_output(goes_on=True)
    try:
        exit_code = run(sys.argv[1:])
    except Exception:
        exit_code = exits.CRASH
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    if exit_code in (exits.CRASH, exits.WRONG_INPUT, INTERRUPTED):
        # Everything is logged. Leave at once: a thread that waits for another rank would hold the process back.
        sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
