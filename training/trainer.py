"""The loop of a run. Trainer.train is the loop, and Trainer._step is one step of it. The other files of this folder
build the parts beforehand and write the reports."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import torch

from dataset.loader import Step, batch_digest, num_tokens, validation_batches
from model.layer_losses import router_figures
from optimizer.schedule import learning_rate
from parallel.context import DistContext
from parallel.contract import StepResult
from parallel.engine import StepPlan
from parallel.spans import span
from runs import exits
from training import report
from training.build import build
from training.config import Config
from training.energy import open_energy
from training.evaluation import Evaluations
from training.meter import StepMeter
from training.progress import Unlogged
from training.records import start_records
from training.samples import Samples
from training.saves import Saves, is_due
from training.stopping import LONG_S, Rounds, Stopping, StopRequest, Teller

logger = logging.getLogger("train")


class Trainer:
    """A run, from its first step to its end. The constructor builds the parts, in order.

    Args:
        given: names of the flags that were given.
        data_dirs: set -> its pretokenized directory.
    Raises:
        ValueError: the command or the data is wrong.
    """

    def __init__(
        self,
        config: Config,
        given: frozenset[str],
        context: DistContext,
        stop: StopRequest,
        data_dirs: dict[str, Path],
    ):
        self.context = context
        self.skipped_in_a_row, self.compared_at = 0, -1
        self.train_loss: float | None = None
        self.unlogged: Unlogged | None = None
        # Position after the samples of the current step.
        self.next_sample = 0
        # Duration of the last step; before the first step it is unknown, and assumed to be long.
        self.step_seconds = math.inf
        with ExitStack() as resources:
            built = self.built = build(config, given, context, data_dirs, lambda: stop.requested, resources)
            energy = open_energy(context)
            self.reslog, self.flops = start_records(built, energy.names)
            # Data and DPO's reference are ready: training begins here.
            self.launched = time.perf_counter()
            # From now on, released at the end; before, by the ExitStack if anything fails.
            self.resources = resources.pop_all()
        # The built configuration includes the settings that were left to the data.
        self.config, self.progress, self.run_dir = built.config, built.progress, built.run_dir
        self.model, self.task, self.engine, self.loader = built.model, built.task, built.engine, built.loader
        self.heartbeat = built.run_dir.heartbeat
        self.stopping = Stopping(stop, built.run_dir, context, looks_for_file=not self.config.run.valid_only)
        self.samples = Samples(built)
        self.meter, self.first_step = StepMeter(self.progress.samples_consumed, energy), self.progress.step
        self.saves = Saves(built, self.reslog, self._untimed)
        self.evaluations = Evaluations(built, self.reslog, self.stopping, self._leave_out)

    def train(self) -> int:
        """Run to the last step, or until a stop is requested; returns the exit code."""
        progress, max_iters, saves = self.progress, self.built.derived.max_iters, self.saves
        has_valid, valid_interval = self.built.data.valid is not None, self.config.data.valid_interval
        if progress.step >= max_iters and not progress.validation_due:
            logger.info(
                "nothing left to do: the run is at step %d of %d; to go on, raise --%s",
                progress.step, max_iters, "max_iters" if self.config.run.max_iters else "epoch",
            )  # fmt: skip
        self.model.train()
        self.profile = report.open_profile(self.built, self._untimed)
        # Discard waits recorded before the first step, such as those for the weights of a resumed run.
        self.engine.communication_s()
        if self.built.left_out:
            logger.info("left out the samples at positions %d to %d, as requested", *self.built.left_out)
            self._save(valid_loss=None)
        elif progress.step < max_iters or progress.validation_due:
            saves.reserve()
        phase = "compile" if self.config.system.compile else "step"
        progress.validation_due &= has_valid
        # The run may have been stopped in the evaluation of the checkpoint that it goes on from.
        if self.run_dir.resumed_from and not progress.validation_due and not self._evaluate(is_saved=True):
            return self._stop()
        while progress.step < max_iters or progress.validation_due:
            # If the run was stopped in a validation, it is due from the start.
            if not progress.validation_due:
                self.heartbeat.beat(phase, progress.step)
                phase = "step"
                if not self.profile.step(progress.step + 1, self._step):
                    return self._stop()
            finished = progress.step >= max_iters
            progress.validation_due |= has_valid and (finished or is_due(progress.step, valid_interval))
            valid_loss = None
            if progress.validation_due:
                valid_loss = self.validate()
                if valid_loss is None:
                    return self._stop()
                progress.validation_due = False
            # In a streak, the weights themselves may be wrong, so a save waits for the first good step.
            saves_now = saves.are_due(self.evaluations.are_due(finished) or valid_loss is not None)
            if finished or (saves_now and not self.in_streak):
                self._log_step()
                self._save(valid_loss, must=finished)
                if not self._evaluate():
                    return self._stop()
        saves.settle(must=True)
        self._end(finished=True)
        return exits.OK

    @property
    def in_streak(self) -> bool:
        """Whether steps are being skipped. In float16, a single skip is normal: it finds the loss scale."""
        return self.skipped_in_a_row > (1 if self.built.scaler.enabled else 0)

    def _stop(self) -> int:
        """Save and end the run on request; all ranks take part."""
        self._log_step()
        try:
            self.saves.settle()
            if self.in_streak:
                self.saves.say_last_good(
                    f"gradients were not finite in the last steps ({self.skipped_in_a_row} skipped)"
                )
            elif self.saves.saved_step != self.progress.step:
                self._save(valid_loss=None, must=True)
        except FloatingPointError as error:
            self.saves.say_last_good(str(error))
        self._end(finished=False)
        return exits.STOPPED

    def _save(self, valid_loss: float | None, must: bool = False) -> None:
        """Save the present state in the background; all ranks take part.

        Args:
            must: wait for the save, and raise if it fails; see Saves.settle.
        """
        self.saves.settle()
        with self._untimed():
            self.engine.settle()
            if self.config.parallel.replica_check_interval and self.compared_at != self.progress.step:
                self._compare_replicas()
            # If a run's last step lies in a streak, its save must not replace earlier checkpoints.
            self.saves.start(valid_loss, prune=not self.in_streak)
        if must or not self.run_dir.saver.background:
            self.saves.settle(must)

    def _compare_replicas(self) -> None:
        self.engine.check_replicas(self.progress.step)
        self.compared_at = self.progress.step

    def _end(self, finished: bool) -> None:
        """Write the traces, record the end, and show where everything is. Everything is already saved."""
        self.profile.finish()
        # Finish cleaning up: nobody restarts an ended run just for that.
        self.run_dir.saver.wait_for_prune()
        self.heartbeat.end(self.progress.step, exits.OK if finished else exits.STOPPED)
        if not finished:
            # If a rank dies before any has recorded its end, a new launch follows, which must find the request.
            self.context.barrier()
        if self.run_dir.place.is_first_of_store:
            with suppress(OSError):
                self.run_dir.paths.stop_file.unlink(missing_ok=True)
        steps_now, seconds = self.progress.step - self.first_step, time.perf_counter() - self.launched
        report.report_end(self.reslog, self.built, finished, steps_now, seconds, self.train_loss)

    @contextmanager
    def _untimed(self) -> Iterator[None]:
        """Context for long work that is not training time."""
        self.heartbeat.beat("save", self.progress.step)
        started = time.perf_counter()
        yield
        self._leave_out(time.perf_counter() - started)

    def _leave_out(self, seconds: float) -> None:
        """What has just taken so long is not training time, and its waits (fsdp gathers weights in validation, too) are
        not training's."""
        self.meter.leave_out(seconds)
        self.engine.communication_s()

    def _step(self) -> bool:
        """Do one optimizer step on the next global batch. Returns False, with nothing done, if any rank must stop."""
        progress = self.progress
        started = time.perf_counter()
        with span("data wait"):
            batches = next(self.loader)
        waited = time.perf_counter() - started
        count, tokens, digest, stop, is_long = self._agree(batches)
        if stop:
            return False
        self.saves.refuse_poison()

        self.next_sample = batches.last + 1
        plan = StepPlan(
            progress.step + 1,
            learning_rate(self.config.optimizer, progress.step, self.built.derived.max_iters),
            count,
            self.run_dir.saver.before_update,
            self._shall_drop(progress.step + 1) if is_long else None,
        )
        sums = self.engine.forward_backward(batches.micro_batches, self.task, plan)
        if sums is None:
            return False
        result = self._finish_step(plan)
        if result.skipped:
            self._on_skipped_step(result.grad_norm)
        else:
            self.skipped_in_a_row = 0

        progress.step += 1
        progress.samples_consumed = batches.last + 1
        progress.tokens += tokens
        self.meter.add_step(batches.last, tokens, digest, waited, comm_wait=self.engine.communication_s())
        self.unlogged = Unlogged(sums.loss, sums.metrics, max(count, 1), plan.lr, result.grad_norm, sums.layers)
        if self.reslog is not None and not result.skipped:
            for name, fields in self.engine.records().items():
                self.reslog.write(name, step=progress.step, **fields)
        if is_due(progress.step, self.config.parallel.replica_check_interval):
            self._compare_replicas()
        if is_due(progress.step, self.config.run.log_interval):
            self._log_step()
        self.step_seconds = time.perf_counter() - started
        return True

    def _finish_step(self, plan: StepPlan) -> StepResult:
        """Reduce the remaining gradients and step, once all micro-batches are done."""
        return self.engine.step(plan)

    def _agree(self, batches: Step) -> tuple[int, int, int, bool, bool]:
        """Exchange everything that all ranks must know before a step, in one collective.

        Also shares whether a save is due, and the outcome of the save in flight.

        Returns:
            terms of the loss in the whole global batch, for the backward pass; its tokens; the digest of its samples;
            whether any rank must stop; whether the step may be a long one.
        """
        # Ranks that share their rows must count them once.
        rows = batches.micro_batches if self.built.mesh.counts else []
        digest = sum(batch_digest(batch) for batch in rows)
        count = sum(self.task.count(batch) for batch in rows)
        tokens = sum(num_tokens(batch) for batch in rows)
        agreed = torch.tensor(
            [count, tokens, digest & 0xFFFFFFFF, digest >> 32, self.stopping.asked(), self.step_seconds >= LONG_S,
             *self.saves.signs()]
        )  # fmt: skip
        with span("agree"):
            count, tokens, low, high, stop, is_long, *signs = self.context.all_sum(agreed).tolist()
        self.saves.take_signs(signs)
        return count, tokens, (high << 32) + low, bool(stop), bool(is_long)

    def _shall_drop(self, step: int) -> Callable[[int, int], bool]:
        """A function to call between micro-batches of a long step: logs progress, and returns whether any rank must
        stop. Gradients of a dropped step's micro-batches are never read."""
        teller = Teller(f"step {step}")

        def shall_drop(done: int, total: int) -> bool:
            teller.tell(done, total)
            return self.stopping.agreed()

        return shall_drop

    def _on_skipped_step(self, grad_norm: float) -> None:
        """Count a skipped step, and end the run after too many. All ranks agree, as the norm is of summed gradients."""
        self.skipped_in_a_row += 1
        fp16 = self.built.scaler.enabled
        logger.warning(
            "step %d skipped: the gradient norm is %s%s", self.progress.step + 1, grad_norm,
            f"; loss scale lowered to {self.built.scaler.scale:g}" if fp16 else "",
        )  # fmt: skip
        if self.config.parallel.check_for_nan_in_grad and not fp16:
            names = self.engine.nonfinite_parameters() or ["none on this rank"]
            raise FloatingPointError(f"non-finite gradients at step {self.progress.step + 1} in: {', '.join(names)}")
        if self.skipped_in_a_row >= self.config.optimizer.max_skipped_steps:
            raise FloatingPointError(f"gradients were not finite for {self.skipped_in_a_row} steps in a row")

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the validation set, bit for bit the same on any number of ranks: the set is always cut into
        the same batches, and their exact sums are added in one order. None if any rank must stop."""
        context, flags, mesh = self.context, self.config.data, self.built.mesh
        started = time.perf_counter()
        self.engine.settle()
        count, batches = validation_batches(
            self.built.data.valid, flags.valid_batch_size, flags.valid_iters, mesh.data_rank, mesh.data_size,
            equally_many=self.engine.forward_is_collective,
        )  # fmt: skip
        self.model.eval()
        names = self.task.metric_names
        table = torch.zeros(count, 2 + len(names), dtype=torch.float64)
        rounds = Rounds(self.stopping, context, "validating", -(-count // mesh.data_size))
        for _ in range(rounds.total):
            self.heartbeat.beat("validate", self.progress.step)
            # The last round may have no batch for this rank, or a spare one.
            for index, batch in islice(batches, 1):
                loss_sum, terms, sums = self.engine.evaluate(batch, self.task)
                if index >= count:
                    continue
                row = [loss_sum.item(), float(terms), *(sums[name].item() for name in names)]
                table[index] = torch.tensor(row, dtype=torch.float64)
            if rounds.stop_after_round():
                self.engine.end_forward()
                self.model.train()
                return None
        self.engine.end_forward()
        self.model.train()
        loss_sum, terms, *sums = (math.fsum(column) for column in context.all_sum(table).T.tolist())
        figures = self.task.figures(loss_sum, terms, dict(zip(names, sums)))
        seconds = time.perf_counter() - started
        if not self.config.run.valid_only:
            self._leave_out(seconds)
        report.report_validation(self.reslog, self.progress.step, self.task, figures, terms, seconds)
        if context.is_main or self.engine.forward_is_collective:
            self._write_samples()
        return figures["loss"]

    def _write_samples(self) -> None:
        """Write samples of the model's text, for people to read: the first rank does, others only help."""
        started = time.perf_counter()
        for sample in self.samples.write():
            if self.context.is_main:
                report.report_sample(self.reslog, self.progress.step, sample)
        if not self.config.run.valid_only:
            self._leave_out(time.perf_counter() - started)

    def _evaluate(self, is_saved: bool = False) -> bool:
        """Evaluate by tasks, if that is due and the present step is saved. Returns False if any rank must stop."""
        if not self.evaluations.are_due(self.progress.step >= self.built.derived.max_iters):
            return True
        self.saves.settle()
        return self.evaluations.run(is_saved or self.saves.saved_step == self.progress.step)

    def _log_step(self) -> None:
        """Log the last step, and the meter's readings since the last record. Called before each save, too, whatever the
        log interval: if the run is killed later, its records cover every sample that its checkpoint has consumed."""
        if self.unlogged is None:
            return
        last, self.unlogged = self.unlogged, None
        sums = self.context.all_sum(torch.stack([last.loss_sum, *last.metrics.values()]).cpu()).tolist()
        figures = self.task.figures(sums[0], last.count, dict(zip(last.metrics, sums[1:])))
        self.train_loss = figures["loss"]
        if self.config.run.sync_for_true_time and self.context.device.type == "cuda":
            torch.cuda.synchronize()
        experts = None
        if last.layers is not None:
            layers = self.context.all_sum(last.layers.to("cpu", copy=True))
            experts = router_figures(layers, last.count, self.model.config)
        report.report_step(
            self.reslog, self.progress, self.built.derived.max_iters, last, figures, self.meter.read(), self.flops,
            experts,
        )  # fmt: skip

    def close(self) -> None:
        self.loader.close()
        self.engine.close()
        if self.reslog is not None:
            self.reslog.close()
        self.release()

    def release(self) -> None:
        """Let a save in flight finish, and give up the run directory."""
        self.resources.close()
