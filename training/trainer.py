"""The loop of a run. Trainer.train is the loop and Trainer._step a step of it; what is built before, and what is
reported, is in the other files of this folder."""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from checkpoint.saving import SaveOutcome
from configurator import Config
from dataset.loader import Batch, Step, batch_digest, num_tokens, validation_batches
from optimizer.mixed_precision import StepResult
from parallel import DistContext, DistributedDataParallel
from parallel.replicas import require_same_weights
from parallel.spans import span
from runs import exits
from training import report
from training.build import build
from training.build_model import to_device
from training.build_optimizer import learning_rate
from training.meter import StepMeter
from training.progress import Unlogged
from training.records import start_records
from training.samples import Samples
from training.saving import add_share
from training.stopping import LONG_S, Rounds, Stopping, StopRequest, Teller

logger = logging.getLogger("train")


class Trainer:
    """Everything built, in order. A ValueError out of the constructor means that the command or the data is wrong.

    Args:
        given: names of the flags that were given.
        data_dirs: set -> its pretokenized directory.
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
        self.last_save = time.monotonic()
        self.skipped_in_a_row, self.save_due, self.save_waits = 0, False, False
        self.poisoned: str | None = None
        self.compared_at = -1
        self.train_loss: float | None = None
        self.unlogged: Unlogged | None = None
        # Position behind the samples of the step that is being done.
        self.next_sample = 0
        # Of the last step: nobody knows of the first how long it will be.
        self.step_seconds = math.inf
        with ExitStack() as resources:
            built = self.built = build(config, given, context, data_dirs, lambda: stop.requested, resources)
            self.reslog, self.flops = start_records(built)
            # Data and DPO's reference are read or made: what follows is training.
            self.launched = time.perf_counter()
            # Released at the end; here, if anything failed.
            self.resources = resources.pop_all()
        # With what was left to the data.
        self.config = built.config
        self.data, self.derived, self.loader, self.progress = built.data, built.derived, built.loader, built.progress
        self.run_dir, self.out_dir = built.run_dir, built.run_dir.path
        self.stopping, self.samples = Stopping(stop, built.run_dir, context), Samples(built)
        self.heartbeat, self.saver = built.run_dir.heartbeat, built.run_dir.saver
        self.model, self.task, self.scaler, self.optimizer = built.model, built.task, built.scaler, built.optimizer
        self.ddp, self.powersgd, self.zero1 = built.parallel.ddp, built.parallel.powersgd, built.parallel.zero1
        # The position that a checkpoint holds is not the run's any more if samples were left out.
        self.saved_step = self.progress.step if self.run_dir.resumed_from and not built.left_out else -1
        self.last_good = self.run_dir.chosen.name if self.run_dir.chosen else None

    def train(self) -> int:
        """Run to the last step, or until a stop is requested; returns the exit code."""
        progress, max_iters = self.progress, self.derived.max_iters
        valid_interval, save_interval = self.config.data.valid_interval, self.config.run.save_interval
        if progress.step >= max_iters and not progress.validation_due:
            logger.info(
                "nothing left to do: the run is at step %d of %d; to go on, raise --%s",
                progress.step, max_iters, "max_iters" if self.config.run.max_iters else "epoch",
            )  # fmt: skip
        self.model.train()
        self.meter, self.first_step = StepMeter(progress.samples_consumed), progress.step
        self.profile = report.open_profile(self.built, self._aside)
        # Of before the first step, such as for the weights of a resumed run.
        self.ddp.waits.take()
        if self.built.left_out:
            logger.info("left out the samples at positions %d to %d, as asked", *self.built.left_out)
            self._save(valid_loss=None)
        elif progress.step < max_iters or progress.validation_due:
            self.saver.reserve(partial(add_share, self.built))
        phase = "compile" if self.config.system.compile else "step"
        progress.validation_due &= self.data.valid is not None
        while progress.step < max_iters or progress.validation_due:
            # It is due from the start where a run was stopped in it.
            if not progress.validation_due:
                self.heartbeat.beat(phase, progress.step)
                phase = "step"
                if not self.profile.step(progress.step + 1, self._step):
                    return self._stop()
            finished = progress.step >= max_iters
            progress.validation_due |= self.data.valid is not None and (
                finished or _is_due(progress.step, valid_interval)
            )
            valid_loss = None
            if progress.validation_due:
                with self.ddp.waits.uncounted():
                    valid_loss = self.validate()
                if valid_loss is None:
                    return self._stop()
                progress.validation_due = False
            # In a streak, the weights may be what is wrong: a save waits for the first good step.
            self.save_waits |= valid_loss is not None or self.save_due or _is_due(progress.step, save_interval)
            if finished or (self.save_waits and not self.in_streak):
                self._log_step()
                self._save(valid_loss, must=finished)
        self._settle_save(must=True)
        self._end(finished=True)
        return exits.OK

    @property
    def in_streak(self) -> bool:
        """Whether steps are being skipped. In float16, one is how the loss scale is found."""
        return self.skipped_in_a_row > (1 if self.scaler.enabled else 0)

    def _stop(self) -> int:
        """All ranks are here, as one was asked to stop: save, and leave."""
        self._log_step()
        try:
            self._settle_save()
            if self.in_streak:
                self._keep_last_good(f"gradients were not finite in the last steps ({self.skipped_in_a_row} skipped)")
            elif self.saved_step != self.progress.step:
                self._save(valid_loss=None, must=True)
        except FloatingPointError as error:
            self._keep_last_good(str(error))
        self._end(finished=False)
        return exits.STOPPED

    def _keep_last_good(self, why: str) -> None:
        last = f"{self.last_good} stays the newest checkpoint" if self.last_good else "there is no checkpoint yet"
        logger.warning("step %d is not saved: %s; %s", self.progress.step, why, last)

    def _end(self, finished: bool) -> None:
        """All is saved: write what was traced, record the end, and say where everything is."""
        self.profile.finish()
        # Nobody starts a run again that has ended, if only to clean up.
        self.saver.wait_for_prune()
        self.heartbeat.end(self.progress.step, exits.OK if finished else exits.STOPPED)
        if not finished:
            # Before any rank has said how it ends, a death means another launch, which must hear the request.
            self.context.barrier()
        if self.run_dir.place.is_first_of_store:
            with suppress(OSError):
                self.run_dir.stop_file.unlink(missing_ok=True)
        steps_now, seconds = self.progress.step - self.first_step, time.perf_counter() - self.launched
        report.report_end(self.reslog, self.built, finished, steps_now, seconds, self.train_loss)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Around what takes long and is not training time."""
        self.heartbeat.beat("save", self.progress.step)
        started = time.perf_counter()
        yield
        self.meter.leave_out(time.perf_counter() - started)

    def _step(self) -> bool:
        """One optimizer step on the next global batch. False, and nothing done, if any rank was asked to stop."""
        progress, parallel = self.progress, self.config.parallel
        started = time.perf_counter()
        with span("data wait"):
            batches = next(self.loader)
        waited = time.perf_counter() - started
        count, tokens, digest, stop, is_long = self._agree(batches)
        if stop:
            return False
        self._refuse_poison()

        self.next_sample = batches.last + 1
        lr = learning_rate(self.config, progress.step, self.derived.max_iters)
        self._prepare_hooks()
        sums = self._forward_backward(batches.micro_batches, count, lr, is_long)
        if sums is None:
            return False
        loss_sum, metrics = sums
        self.ddp.finish_grad_sync()
        self.saver.before_update()
        with span("optimizer"):
            result = self._finish_step(lr)
        if result.skipped:
            self._on_skipped_step(result.grad_norm)
        else:
            self.skipped_in_a_row = 0
        is_zero = self.optimizer.zero_grad and not result.skipped
        if not (is_zero or parallel.overlap_zero_grad_buffer):
            with span("zero gradients"):
                self.ddp.zero_grad()

        progress.step += 1
        progress.samples_consumed = batches.last + 1
        progress.tokens += tokens
        self.meter.add_step(batches.last, tokens, digest, waited, comm_wait=self.ddp.waits.take())
        self.unlogged = Unlogged(loss_sum, metrics, max(count, 1), lr, result.grad_norm)
        if self.powersgd is not None and self.powersgd.measure and not result.skipped:
            report.report_compression(self.reslog, progress.step, self.powersgd)
        if _is_due(progress.step, parallel.replica_check_interval):
            self._compare_replicas()
        if _is_due(progress.step, self.config.run.log_interval):
            self._log_step()
        self.step_seconds = time.perf_counter() - started
        return True

    def _agree(self, batches: Step) -> tuple[int, int, int, bool, bool]:
        """What all ranks must know before a step: how many terms the loss of the whole global batch has, which the
        backward pass needs; its tokens; the digest of its samples; whether any rank was asked to stop; whether the step
        may be a long one. Also whether a save is due, and what became of the one in flight: all in one collective."""
        digest = sum(batch_digest(batch) for batch in batches.micro_batches)
        count = sum(self.task.count(batch) for batch in batches.micro_batches)
        tokens = sum(num_tokens(batch) for batch in batches.micro_batches)
        agreed = torch.tensor(
            [count, tokens, digest & 0xFFFFFFFF, digest >> 32, self.stopping.asked(), self.step_seconds >= LONG_S,
             self._save_asked(), *self.saver.signs()]
        )  # fmt: skip
        with span("agree"):
            count, tokens, low, high, stop, is_long, save, failed, done = self.context.all_sum(agreed).tolist()
        if failed or done == self.context.world_size:
            self._report_save(self.saver.conclude())
        self.save_due = bool(save)
        return count, tokens, (high << 32) + low, bool(stop), bool(is_long)

    def _save_asked(self) -> bool:
        """By the first rank's clock."""
        minutes = self.config.run.save_interval_minutes
        return self.context.is_main and minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes

    def _prepare_hooks(self) -> None:
        """For what happens to a bucket of gradients while the backward pass goes on."""
        parallel = self.config.parallel
        if self.powersgd is not None or parallel.overlap_optim_step:
            self.saver.before_update()
        if self.powersgd is not None:
            self.powersgd.measure = _is_due(self.progress.step + 1, self.config.powersgd.powerSGD_log_interval)

    def _forward_backward(
        self, micro_batches: list[Batch], count: int, learning_rate: float, is_long: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]] | None:
        """This rank's micro-batches; gradients are reduced with the last one, and with --overlap_optim_step stepped
        with.

        Args:
            is_long: look between micro-batches whether to stop.
        Returns:
            sums of losses and of metrics; None if any rank was asked to stop: then nobody will ever read what the
            micro-batches so far have added to the gradients.
        """
        context, parallel, teller = self.context, self.config.parallel, Teller(f"step {self.progress.step + 1}")
        # There, the first micro-batch's gradient is added to what must be saved.
        is_long &= not self.config.powersgd.grad_buffer_is_powerSGD_error
        if self.task.uses_prepass:
            with span("prepass"):
                sums = sum(self.task.prepass(self._to_device(batch)) for batch in micro_batches)
                self.task.take_prepass(context.all_sum(sums.cpu()).to(context.device))
        loss_scale = self.scaler.scale / max(count, 1)
        # A fused loss rounds its gradient before it is scaled; float16 alone would lose something by that.
        self.task.grad_scale = loss_scale if self.scaler.enabled else 1.0
        loss_total = torch.zeros((), dtype=torch.float64, device=context.device)
        metrics = {name: torch.zeros_like(loss_total) for name in self.task.metric_names}
        for index, batch in enumerate(micro_batches):
            if is_long and index:
                teller.tell(index, len(micro_batches))
                if self.stopping.agreed():
                    return None
            is_last = index == len(micro_batches) - 1
            if is_last and parallel.overlap_optim_step:
                self.optimizer.begin_overlapped_step(learning_rate)
            with nullcontext() if is_last else self.ddp.no_sync():
                with span("forward"):
                    loss_sum, _, sums = self.task(self._to_device(batch))
                with span("backward"):
                    (loss_sum * loss_scale).backward()
            loss_total += loss_sum.detach()
            for name, value in sums.items():
                metrics[name] += value
        return loss_total, metrics

    def _to_device(self, batch: Batch) -> Batch:
        return to_device(batch, self.model, self.context.device)

    def _finish_step(self, learning_rate: float) -> StepResult:
        """Gradients are summed (with overlap_optim_step: and stepped with): the rest of the step."""
        if self.config.parallel.overlap_optim_step:
            result = self.optimizer.end_overlapped_step()
            if self.zero1 is not None:
                self.zero1.start_gathers()
        else:
            result = self.optimizer.step(learning_rate, self.zero1.gather if self.zero1 else None)
        if self.zero1 is not None and not self.zero1.overlap_gather:
            self.zero1.wait()
        return result

    def _compare_replicas(self) -> None:
        """
        Raises:
            ReplicaDrift: the ranks' weights differ; on all ranks.
        """
        if self.zero1 is not None:
            with self.ddp.waits.uncounted():
                self.zero1.wait()
        with span("compare replicas"):
            require_same_weights(self.context, self.model.parameters(), self.progress.step)
        self.compared_at = self.progress.step

    def _on_skipped_step(self, grad_norm: float) -> None:
        """All ranks are here together: the norm is of the summed gradients."""
        self.skipped_in_a_row += 1
        fp16 = self.scaler.enabled
        logger.warning(
            "step %d skipped: the gradient norm is %s%s", self.progress.step + 1, grad_norm,
            f"; loss scale lowered to {self.scaler.scale:g}" if fp16 else "",
        )  # fmt: skip
        if self.config.parallel.check_for_nan_in_grad and not fp16:
            names = self.ddp.nonfinite_parameters or ["none on this rank"]
            raise FloatingPointError(f"non-finite gradients at step {self.progress.step + 1} in: {', '.join(names)}")
        if self.skipped_in_a_row >= self.config.optimizer.max_skipped_steps:
            raise FloatingPointError(f"gradients were not finite for {self.skipped_in_a_row} steps in a row")

    @torch.no_grad()
    def validate(self) -> float | None:
        """Mean loss over the validation set, bit for bit the same on any number of ranks: the set is always cut into
        the same batches, and their exact sums are added in one order. None if any rank was asked to stop."""
        context, flags = self.context, self.config.data
        started = time.perf_counter()
        count, batches = validation_batches(
            self.data.valid, flags.valid_batch_size, flags.valid_iters, context.rank, context.world_size
        )
        self.model.eval()
        names = self.task.metric_names
        table = torch.zeros(count, 2 + len(names), dtype=torch.float64)
        rounds = Rounds(self.stopping, context, "validating", -(-count // context.world_size))
        for _ in range(rounds.total):
            self.heartbeat.beat("validate", self.progress.step)
            # In the last round there may be none for this rank.
            for index, batch in islice(batches, 1):
                loss_sum, terms, sums = self.task(self._to_device(batch))
                row = [loss_sum.item(), float(terms), *(sums[name].item() for name in names)]
                table[index] = torch.tensor(row, dtype=torch.float64)
            if rounds.stop_after_round():
                self.model.train()
                return None
        self.model.train()
        loss_sum, terms, *sums = (math.fsum(column) for column in context.all_sum(table).T.tolist())
        figures = self.task.figures(loss_sum, terms, dict(zip(names, sums)))
        seconds = time.perf_counter() - started
        if not self.config.run.valid_only:
            self.meter.leave_out(seconds)
        report.report_validation(self.reslog, self.progress.step, self.task, figures, terms, seconds)
        if context.is_main:
            self._write_samples()
        return figures["loss"]

    def _write_samples(self) -> None:
        """What the model writes by now, for people to read."""
        started = time.perf_counter()
        for sample in self.samples.write():
            report.report_sample(self.reslog, self.progress.step, sample)
        if not self.config.run.valid_only:
            self.meter.leave_out(time.perf_counter() - started)

    def _log_step(self) -> None:
        """Log the last step, and what was read since the last record. Also before a save, whatever the log interval, so
        that the records of a run that is killed later cover every sample that its checkpoint has consumed."""
        if self.unlogged is None:
            return
        last, self.unlogged = self.unlogged, None
        sums = self.context.all_sum(torch.stack([last.loss_sum, *last.metrics.values()]).cpu()).tolist()
        figures = self.task.figures(sums[0], last.count, dict(zip(last.metrics, sums[1:])))
        self.train_loss = figures["loss"]
        if self.config.run.sync_for_true_time and self.context.device.type == "cuda":
            torch.cuda.synchronize()
        report.report_step(
            self.reslog, self.progress, self.derived.max_iters, last, figures, self.meter.read(), self.flops
        )

    def _save(self, valid_loss: float | None, must: bool = False) -> None:
        """Save the present state in the background; all ranks take part, each with its share of the optimizer state.

        Args:
            must: wait for it, and fail with it; see _settle_save.
        """
        self.heartbeat.beat("save", self.progress.step)
        self._settle_save()
        self.save_waits = False
        started = time.perf_counter()
        if self.zero1 is not None:
            with self.ddp.waits.uncounted():
                self.zero1.wait()
        if self.config.parallel.replica_check_interval and self.compared_at != self.progress.step:
            self._compare_replicas()
        writer = self.saver.begin(self.progress.step)
        add_share(self.built, writer)
        # The last step of a run may lie in a streak: then it pushes nothing out.
        self.saver.start(writer, valid_loss, prune=not self.in_streak)
        self.meter.leave_out(time.perf_counter() - started)
        self.last_save = time.monotonic()
        if must or not self.saver.background:
            self._settle_save(must)

    def _settle_save(self, must: bool = False) -> None:
        """Wait until the save in flight, if there is one, is whole on all ranks or has failed.

        Raises:
            OSError: with `must`: it failed (a full disk). Raised on all ranks, and what was there stays.
            FloatingPointError: the weights are not finite. Raised on all ranks, and what was there stays.
        """
        started = time.perf_counter()
        if self.saver.in_flight:
            self.heartbeat.beat("save", self.progress.step)
        outcome = self.saver.settle()
        self.meter.leave_out(time.perf_counter() - started)
        if outcome is not None:
            self._report_save(outcome)
            self._refuse_poison()
            if must and outcome.problem is not None:
                raise OSError(f"the checkpoint of step {outcome.step} could not be written: {outcome.problem}")

    def _report_save(self, outcome: SaveOutcome) -> None:
        """All ranks agree on what became of a save."""
        if outcome.problem is None:
            self.saved_step, self.last_good = outcome.step, outcome.name
        elif outcome.poisoned:
            self.poisoned = f"the weights of step {outcome.step} are of no use: {outcome.problem}"
        report.report_save(self.reslog, self.run_dir.ckpt_dir, outcome)

    def _refuse_poison(self) -> None:
        """
        Raises:
            FloatingPointError: a save has found weights that are not finite; on all ranks.
        """
        if self.poisoned is not None:
            raise FloatingPointError(self.poisoned)

    def close(self) -> None:
        self.loader.close()
        if isinstance(self.ddp, DistributedDataParallel):
            self.ddp.close()
        if self.reslog is not None:
            self.reslog.close()
        self.release()

    def release(self) -> None:
        """Let a save in flight finish, and another process have the run directory."""
        self.resources.close()


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
