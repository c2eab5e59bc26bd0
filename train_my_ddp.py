"""Train a model, on one process or many.

    python train_my_ddp.py --data_dir=D --out_dir=R [--help]
    torchrun --standalone --nproc_per_node=2 train_my_ddp.py configs/demo-cpu.yaml --data_dir=D --out_dir=R [--resume]
    train_my_ddp.py --task_type=sft --init_from=R --data_dir=CONVERSATIONS --out_dir=R2   (then dpo, with preferences)

Exit codes, also left in R/exit/rank-N.json because torchrun hides them: 0 finished; 2 the command or the data is wrong;
75 stopped on request (SIGTERM, Ctrl-C, a file R/stop) after saving; anything else is a crash.
"""

import logging
import math
import os
import secrets
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import torch

from configurator import (
    CONFIG_NAME,
    Config,
    changes_since,
    flatten,
    parse_config,
    parse_log_ranks,
    parse_profile_steps,
    resolve,
    resolve_model,
    to_yaml,
)
from data_preprocess.pretokenize_sft_data import Options, check_options, summary, tokenize_online
from dataset.format import MANIFEST_NAME
from dataset.loader import Batch, TrainLoader, batch_digest, num_tokens, validation_batches
from dataset.opening import open_dataset
from dataset.sequences import read_manifest
from model import Llama, flops, hf
from model.attention import document_starts
from model.ops import CHOICES, build_ops, choose_ops
from optimizer import (
    LossScaler,
    MixedPrecisionOptimizer,
    MuonConfig,
    StepResult,
    choose_kernel,
    learning_rate_at,
    resolve_dtype,
)
from optimizer.adamw import AdamWConfig
from optimizer.param_groups import is_hidden_matrix
from parallel import (
    DistContext,
    DistributedDataParallel,
    NaiveDDP,
    PowerSGD,
    PowerSGDConfig,
    Zero1,
    destroy_context,
    init_context,
    measure_bandwidth,
    sum_hook,
)
from parallel.buffer import Bucket
from parallel.context import (
    enable_determinism,
    exit_record_dir,
    launch_token,
    launched_node,
    launched_rank,
    launched_world_size,
)
from parallel.spans import span
from tasks.dpo import DPOLoss, DPOTask
from tasks.language_model import LanguageModelTask
from tasks.reference import ReferenceCache, compute_reference, weights_fingerprint
from tokenizer import load_tokenizer
from utils import checkpoint as ckpt
from utils import exits
from utils.fetching import CheckpointFiles
from utils.files import atomic_write
from utils.flat_state import holds_flat_state, load_flat_state, read_tensors
from utils.heartbeat import Heartbeat, write_stacks_on_signal
from utils.logging import add_log_file, clock, log_file_of, log_repeated_warnings, log_traceback, setup_console
from utils.meter import StepMeter
from utils.profile_steps import StepProfile
from utils.reslog import VERSION, ResLog, count_launches
from utils.run_summary import Ending, summary_lines
from utils.saving import CheckpointSaver, CheckpointWriter, SaveOutcome
from utils.sinks import Sinks, check_sinks, open_sinks
from utils.stores import find_place

logger = logging.getLogger("train")

@dataclass
class Progress:
    """Where the run stands: what a checkpoint stores besides tensors."""

    step: int = 0
    """Completed optimizer steps."""
    samples_consumed: int = 0
    tokens: int = 0
    """Input tokens read so far."""


@dataclass(frozen=True)
class Unlogged:
    """The last step's figures, until they are logged."""

    loss_sum: torch.Tensor
    """This rank's part of the loss, a float64 scalar on the device."""
    metrics: dict[str, torch.Tensor]
    """This rank's part of the task's other sums."""
    count: int
    """What the losses of the whole global batch are divided by: supervised tokens, or pairs."""
    learning_rate: float
    grad_norm: float


class StopRequest:
    """Handler of SIGTERM, Ctrl-C and a closed terminal: remembers that this rank was asked to stop."""

    def __init__(self):
        self.requested = False

    def __call__(self, signum: int, _frame: object) -> None:
        if self.requested and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


class Trainer:
    """Everything built, in order. A ValueError out of the constructor means that the command or the data is wrong.

    Args:
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
        self.config, self.given, self.context, self.data_dirs = config, given, context, data_dirs
        self.out_dir = Path(config.run.out_dir)
        self.stop, self.progress, self.skipped_in_a_row = stop, Progress(), 0
        self.launched = time.perf_counter()
        self.train_loss: float | None = None
        # Position behind the samples of the step that is being done.
        self.next_sample = 0
        self.lock: BinaryIO | None = None
        self.saver: CheckpointSaver | None = None
        self.unlogged: Unlogged | None = None
        self.reference: str | None = None
        with ExitStack() as on_failure:
            on_failure.callback(self.release)
            self._build()
            on_failure.pop_all()

    def _build(self) -> None:
        config, context = self.config, self.context
        if config.system.num_threads:
            torch.set_num_threads(config.system.num_threads)
        if config.system.deterministic:
            enable_determinism()
        check_sinks(config.run.tensorboard, config.run.wandb_project)
        self.resumed_from = self._open_out_dir()
        self._open_data()
        self.derived = resolve(config, context.world_size, len(self.train_data))
        self._build_model()
        self._build_task()
        self._build_parallel_and_optimizer()
        if self.resumed_from is not None:
            self._load_checkpoint(self.resumed_from)
            at = self.progress
            self.derived = resolve(config, context.world_size, len(self.train_data), at.step, at.samples_consumed)
        self.loader = TrainLoader(
            self.train_data, config.run.seed, config.data.train_batch_size, config.data.gradient_accumulation_steps,
            context.rank, context.world_size, self.progress.samples_consumed, config.data.num_workers,
            pin_memory=context.device.type == "cuda",
        )  # fmt: skip
        # The position that a checkpoint holds is not the run's any more if samples were left out.
        self.saved_step = self.progress.step if self.resumed_from and not self.left_out else -1
        self._start_records()

    def _open_out_dir(self) -> Path | None:
        """Create the run directory, on each file system that the nodes have, and find the checkpoint to resume from."""
        run, context = self.config.run, self.context
        self.place = find_place(self.out_dir, context.rank, context.world_size, context.gather)
        self.ckpt_dir, self.left_out = self.out_dir / "ckpt", None

        def open_store() -> None:
            if self.place.is_first_of_store:
                ckpt.prepare_run(self.out_dir)
                self.lock = ckpt.lock_run(self.out_dir)
                ckpt.delete_leftovers(self.ckpt_dir)
                (self.out_dir / ckpt.STOP_FILE).unlink(missing_ok=True)

        context.gather_from(open_store)
        self._open_log()
        heartbeats = self.out_dir / "heartbeat"
        self.heartbeat = Heartbeat(heartbeats, context.rank, context.world_size, launch_token())
        write_stacks_on_signal(heartbeats, context.rank)
        self.heartbeat.beat("start", 0)
        self.chosen, remarks = ckpt.open_run(self.out_dir, run.resume, run.resume_from, self.place, context.gather)
        for remark in remarks if context.is_main else ():
            logger.warning(remark)
        self.saver = CheckpointSaver(
            self.ckpt_dir, self.place, context.decide_on_main(lambda: secrets.token_hex(4)), context.device,
            ckpt.Retention(run.keep_last, run.keep_best, run.keep_every), run.async_save, context.gather,
        )  # fmt: skip
        self.last_save = time.monotonic()
        if self.chosen is None:
            return None
        self.resume_files = CheckpointFiles(
            self.ckpt_dir, self.chosen, self.place, context.gather,
            partial(context.send_file, between=lambda: self.heartbeat.beat("start", 0)),
        )  # fmt: skip
        return self.resume_files.bring_model()

    def _open_log(self) -> None:
        """Of this node. The first one of those that see this run directory has the plain name."""
        nodes = self.context.gather(launched_node())
        path = log_file_of(self.out_dir, nodes[self.context.rank], nodes[self.place.store[0]])
        chosen = parse_log_ranks(self.config.run.log_ranks)
        add_log_file(path, self.context.rank, info=chosen is None or self.context.rank in chosen)

    def _open_data(self) -> None:
        """Open both sets and the tokenizer, and check that they belong together, on all ranks."""
        data, task = self.config.data, self.config.run.task_type
        how = (data.max_seq_len, data.document_mask, data.packing)
        self.train_data = open_dataset(task, self.data_dirs["train"], "train", *how)
        self.tokenizer = load_tokenizer(data.tokenizer_dir or self.data_dirs["train"] / "tokenizer")
        self.train_data.check(self.tokenizer.fingerprint, data.valid_ratio)
        self.valid_data = None
        if self.train_data.valid_ratio > 0 or data.valid_data_dir:
            self.valid_data = open_dataset(task, self.data_dirs["valid"], "valid", *how)
            self.valid_data.check(self.tokenizer.fingerprint)
        elif self.config.run.valid_only:
            raise ValueError(
                f"{self.data_dirs['train']} has no validation set: it was pretokenized with --valid_ratio 0"
            )
        if task != "pretrain":
            # Small enough to be read once before it is trained on; pretraining data has `dataset.inspect --verify`.
            for dataset in filter(None, (self.train_data, self.valid_data)):
                self._once_a_store(dataset.sequences.check_content)
        elif self.config.data.verify_data:
            for dataset in filter(None, (self.train_data, self.valid_data)):
                self._once_a_store(dataset.check_content)
        sets = [dataset.fingerprint for dataset in (self.train_data, self.valid_data) if dataset is not None]
        self.context.require_same(
            [*sets, self.tokenizer.fingerprint],
            "the ranks see different data or tokenizers: copy the same to all nodes",
        )

    def _once_a_store(self, check: Callable[[], object]) -> None:
        self.context.gather_from(lambda: check() if self.place.is_first_of_store else None)

    def _build_model(self) -> None:
        config, device = self.config, self.context.device
        source = self.resumed_from
        if source is None and config.run.init_from:
            source = ckpt.resolve_checkpoint_dir(Path(config.run.init_from))
        self.weights_from = source
        if source is not None and (source / "tokenizer.json").exists():
            if load_tokenizer(source).fingerprint != self.tokenizer.fingerprint:
                raise ValueError(f"the data was not tokenized with the tokenizer that the weights in {source} know")
        if config.run.valid_only and source is None:
            raise ValueError(f"--valid_only: {self.out_dir} holds no checkpoint to validate")
        if config.run.task_type == "dpo" and source is None:
            raise ValueError(
                f"{self.out_dir} holds no checkpoint to go on from: give a model to begin with --init_from"
            )
        stored = hf.read_config(source) if source is not None else None
        self.model_config = resolve_model(
            config.model, self.given, stored, self.tokenizer.vocab_size, config.data.max_seq_len
        )
        self.dtype = resolve_dtype(config.system.dtype, device)
        decisive = {name: value for name, value in flatten(config).items() if not name.endswith(("_dir", "_file"))}
        self.context.require_same(
            [decisive, str(self.dtype), self.model_config.__dict__],
            "the ranks have different settings or choose different dtypes: start all with the same flags",
        )
        system = config.system
        overrides = {op: getattr(system, f"{op}_kernel") for op in CHOICES}
        self.ops = build_ops(choose_ops(system.kernels, overrides, device, self.dtype))
        self.model = Llama(self.model_config, system.gradient_checkpointing, system.checkpoint_keeps, self.ops)
        if source is None:
            self.model.initialize(config.run.seed)
        elif self.resumed_from is None:
            hf.load_weights(self.model, source)
        self.model.to(device=device, dtype=self.dtype)
        if config.system.compile:
            self.model.attends_by_document = False
            for block in self.model.layers:
                block.compile()
        self.num_parameters = sum(p.numel() for p in self.model.parameters())

    def _build_task(self) -> None:
        """What turns a batch into a loss. Before the weights of a resumed run are there: the reference of DPO is the
        model that the run began with."""
        run, dpo = self.config.run, self.config.dpo
        if run.task_type != "dpo":
            byte_lengths = torch.zeros(self.model_config.vocab_size, dtype=torch.int64)
            byte_lengths[: self.tokenizer.vocab_size] = torch.tensor(self.tokenizer.token_byte_lengths())
            self.task = LanguageModelTask(self.model, run.seed, byte_lengths.to(self.context.device))
            return
        loss = DPOLoss(dpo.dpo_loss_type, dpo.dpo_beta, dpo.dpo_label_smoothing)
        self.task = DPOTask(self.model, run.seed, loss, dpo.reference_free)
        if not dpo.reference_free:
            self._prepare_reference()

    def _prepare_reference(self) -> None:
        """Read the log-probabilities under the reference model, or compute them where they are missing."""
        context, run, data = self.context, self.config.run, self.config.data
        saved = ckpt.read_trainer_state(self.resumed_from).get("reference") if self.resumed_from else None
        self.reference = saved or self._fingerprint_of_first_model()
        has_weights = self.resumed_from is None
        for split, dataset in (("train", self.train_data), ("valid", self.valid_data)):
            if dataset is None or (run.valid_only and split == "train"):
                continue
            cache = ReferenceCache(dataset, split, self.reference, self.out_dir)
            dataset.reference = cache.read_on_main(context.is_main, context.all_sum)
            if dataset.reference is not None:
                continue
            if not has_weights:
                self._load_reference_weights()
                has_weights = True
            dataset.reference = compute_reference(
                self.task, cache, data.valid_batch_size, context.rank, context.world_size, context.all_sum,
                self._to_device, lambda: self.heartbeat.beat("reference", self.progress.step),
                lambda: self.stop.requested,
            )  # fmt: skip

    @cached_property
    def _first_model(self) -> Path:
        """Folder of the model that the run began with; found once, as its files are verified for that."""
        if self.resumed_from is None:
            return self.weights_from
        if not self.config.run.init_from:
            raise ValueError(
                "the log-probabilities of the reference model are missing: give the model with --init_from"
            )
        return ckpt.resolve_checkpoint_dir(Path(self.config.run.init_from))

    def _fingerprint_of_first_model(self) -> str:
        return self.context.decide_on_main(
            lambda: weights_fingerprint(self._first_model, self.model_config, self.dtype)
        )

    def _load_reference_weights(self) -> None:
        """Of a resumed run: the log-probabilities are gone, and the model that it began with is needed again."""
        if self._fingerprint_of_first_model() != self.reference:
            raise ValueError(
                f"the log-probabilities of the reference model are gone, and {self._first_model} is not the model "
                f"that the run began with: give that with --init_from"
            )
        hf.load_weights(self.model, self._first_model)

    def _build_parallel_and_optimizer(self) -> None:
        parallel, optimizer = self.config.parallel, self.config.optimizer
        grad_dtype = torch.float32 if parallel.grad_reduce_in_fp32 else self.dtype
        self.scaler = LossScaler(enabled=self.dtype == torch.float16)
        self.zero1: Zero1 | None = None
        self.powersgd: PowerSGD | None = None
        if parallel.ddp_impl == "naive":
            self.ddp = NaiveDDP(self.model, self.context, grad_dtype)
        else:
            self.ddp = DistributedDataParallel(
                self.model,
                self.context,
                bucket_size=0 if parallel.disable_bucketing else parallel.bucket_size,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                grad_dtype=grad_dtype,
                check_for_nan=parallel.check_for_nan_in_grad,
            )
            self._choose_hook()
            if parallel.use_distributed_optimizer:
                self.zero1 = Zero1(self.ddp, parallel.overlap_param_gather)
            if parallel.overlap_optim_step:
                self.ddp.register_after_reduction(self._step_reduced_bucket)
        kernel = choose_kernel(self.config.system.kernels, self.config.system.adamw_kernel, self.context.device)
        holds_all = self.zero1 is None and self.powersgd is None
        self.optimizer = MixedPrecisionOptimizer(
            (self.zero1 or self.ddp).slices(),
            AdamWConfig(optimizer.beta1, optimizer.beta2, optimizer.adam_eps, optimizer.weight_decay),
            optimizer.grad_clip,
            self.scaler,
            sum_over_ranks=self.context.all_sum if self.zero1 else None,
            source=self.powersgd,
            kernel=kernel,
            muon=MuonConfig(optimizer.muon_momentum, optimizer.muon_lr_ratio, optimizer.muon_iterations)
            if optimizer.optimizer == "muon"
            else None,
            gather_updates=self._gather_updates if self.zero1 else None,
            zero_grad=kernel == "triton" and holds_all and not parallel.overlap_optim_step,
        )

    def _gather_updates(self, bucket: int) -> None:
        """Between the two halves of Muon's step under ZeRO-1."""
        if any(is_hidden_matrix(slot.parameter) for slot in self.ddp.buckets[bucket].slots):
            self.zero1.gather_in_gradients(bucket)

    def _choose_hook(self) -> None:
        """What happens to a bucket of gradients, by the flags."""
        p, ddp = self.config.parallel, self.ddp
        wire_dtype = None
        if p.use_bf16_compress_hook or p.use_fp16_compress_hook:
            wire_dtype = torch.bfloat16 if p.use_bf16_compress_hook else torch.float16
        if p.use_powerSGD_hook:
            config = PowerSGDConfig(
                rank=p.matrix_approximation_rank,
                warm_start=p.warm_start,
                use_error_feedback=p.use_error_feedback,
                start_iter=p.start_powerSGD_iter,
                min_compression_rate=p.min_compression_rate,
                orthogonalization_epsilon=p.orthogonalization_epsilon,
                orthogonalize_in_float32=p.orthogonalize_in_float32,
                use_fixed_Q=p.use_fixed_Q,
                grad_buffer_is_error=p.grad_buffer_is_powerSGD_error,
                exclude=tuple(word.strip() for word in p.powerSGD_exclude.split(",") if word.strip()),
                wire_dtype=wire_dtype,
                seed=self.config.run.seed,
            )
            scale = partial(getattr, self.scaler, "scale")
            self.powersgd = PowerSGD(ddp.buckets, ddp.collectives, config, lazy=True, loss_scale=scale)
            ddp.use_hook(self.powersgd)
            return
        ddp.use_hook(sum_hook(ddp.collectives, wire_dtype, p.use_distributed_optimizer))

    def _step_reduced_bucket(self, bucket: Bucket) -> None:
        """With overlap_optim_step: what follows a bucket's reduction, while the backward pass goes on."""
        with span(f"step bucket {bucket.index}"):
            self.optimizer.step_bucket(bucket.index)
        if self.config.parallel.overlap_zero_grad_buffer:
            self.ddp.hook.zero_grad(bucket)

    def _load_checkpoint(self, path: Path) -> None:
        """Restore optimizer and position; weights come from the float32 main parameters."""
        config, state = self.config, ckpt.read_trainer_state(path)
        changed = [name for name, value in self._stream().items() if state["stream"][name] != value]
        if changed and not (config.data.restart_data or config.run.valid_only):
            raise ValueError(
                f"{' and '.join(changed)} differ from the run's own, so its order of samples cannot go on: "
                f"restore them, or add --restart_data to begin a new pass over the data"
            )
        trained_with = state["optimizer"].get("name", "adamw")
        if trained_with != config.optimizer.optimizer:
            raise ValueError(
                f"the run was trained with --optimizer={trained_with}, whose state {config.optimizer.optimizer} cannot "
                f"go on from: give that, or begin a new run with --init_from={path}"
            )
        self.resume_files.bring_state(lambda folders: holds_flat_state(folders, self.optimizer.named_state()))
        load_flat_state(self.resume_files.directories, self.optimizer.named_state())
        self.optimizer.weights_from_main()
        if self.zero1 is not None:
            self.zero1.gather_all()
        self.optimizer.load_scalar_state(state["optimizer"])
        self._load_hook_state(state["step"])
        samples = 0 if changed else state["samples_consumed"]
        if config.data.resume_at_sample > samples:
            self.left_out = [samples, config.data.resume_at_sample - 1]
            samples = config.data.resume_at_sample
        self.progress = Progress(state["step"], samples, state["tokens"])
        self.context.barrier()
        if self.place.is_first_of_store:
            ckpt.delete_leftovers(self.ckpt_dir)

    def _load_hook_state(self, step: int) -> None:
        """Take up what PowerSGD remembered: the residuals of this rank's number, and the Q that all ranks shared."""
        states = self.resume_files.hook_states()
        if self.powersgd is None:
            if states:
                logger.warning("the residuals of PowerSGD in %s are dropped: it is not used any more", self.chosen.name)
            return
        self.powersgd.iteration = step
        lost = self.resume_files.lost_hook_states()
        if lost and self.context.is_main:
            logger.warning("the residuals of PowerSGD of ranks %s are on no node: they are lost", lost)
        for index, (file, is_mine) in enumerate(states):
            saved = read_tensors(file)
            if index == 0:
                self.powersgd.take_q(saved)
            dropped = self.powersgd.add_residuals(saved) if is_mine else []
            if dropped:
                logger.warning("residuals are dropped, as these are not compressed any more: %s", ", ".join(dropped))

    def _stream(self) -> dict:
        """What the order of the samples depends on."""
        data = self.config.data
        return {"seed": self.config.run.seed, "data": self.train_data.fingerprint, "max_seq_len": data.max_seq_len}

    def _start_records(self) -> None:
        """Say what runs, and leave the configuration and the start record in the run directory."""
        config, context, progress = self.config, self.context, self.progress
        context.barrier()
        peak = flops.device_peak_flops(context.device, self.dtype)
        self.peak_flops = context.all_sum(torch.tensor(peak or math.nan, dtype=torch.float64)).item()
        seq_len = config.data.max_seq_len
        self.flops_strict = flops.flops_per_token_strict(
            self.model_config, *self.train_data.context_and_supervised_share()
        )
        self.flops_seed = flops.flops_per_token_seed(self.model_config, seq_len, self.num_parameters)
        self.reslog = ResLog(self.out_dir / "reslog.jsonl", self._open_sinks()) if context.is_main else None
        for line in self._description():
            logger.info(line)
        if not self.place.is_first_of_store or config.run.valid_only:
            return
        for path in ckpt.abandon_later(self.ckpt_dir, progress.step):
            logger.info("set aside %s: the run goes on from step %d", path.name, progress.step)
        ckpt.prune(self.ckpt_dir, self.saver.retention)
        exits.clear_gone_ranks(self.out_dir / "exit", context.world_size)
        changed = changes_since(config, self.out_dir / CONFIG_NAME) if self.resumed_from else {}
        for name, (before, now) in changed.items():
            logger.info("changed since the last launch: %s %s -> %s", name, before, now)
        dtype = str(self.dtype).removeprefix("torch.")
        derived = (
            self.derived.__dict__
            | {"dtype": dtype, "world_size": context.world_size}
            | {f"{split}_data": str(path) for split, path in self.data_dirs.items()}
            | self.model_config.__dict__
        )
        atomic_write(self.out_dir / CONFIG_NAME, to_yaml(config, derived).encode())
        if self.reslog is None:
            return
        self.reslog.write(
            "start",
            version=VERSION,
            attempt=count_launches(self.out_dir / "reslog.jsonl") + 1,
            step=progress.step,
            max_iters=self.derived.max_iters,
            samples_consumed=progress.samples_consumed,
            parent_ckpt=self.chosen.name if self.chosen else None,
            left_out=self.left_out,
            world_size=context.world_size,
            dtype=dtype,
            **self._stream(),
            global_batch_size=derived["global_batch_size"],
            task=config.run.task_type,
            packing=config.data.packing,
            changed=changed,
        )

    def _open_sinks(self) -> Sinks | None:
        """Other places that the results go to."""
        run = self.config.run
        if run.valid_only:
            return None
        return open_sinks(
            self.out_dir, self.progress.step, run.tensorboard, run.wandb_project, run.wandb_mode, flatten(self.config)
        )

    def _description(self) -> list[str]:
        config, context, derived = self.config, self.context, self.derived
        parallel = f"{context.world_size} processes" if context.world_size > 1 else "one process"
        if config.parallel.ddp_impl == "naive":
            parallel += ", naive all-reduce"
        else:
            overlap = "overlapped with" if config.parallel.overlap_grad_reduce else "after"
            parallel += f", {len(self.ddp.buckets)} gradient buckets reduced {overlap} the backward pass"
            if self.powersgd is not None:
                parallel += f", PowerSGD 1:{self.powersgd.compression_ratio:.1f}"
            if config.parallel.use_bf16_compress_hook or config.parallel.use_fp16_compress_hook:
                parallel += f", {'bfloat16' if config.parallel.use_bf16_compress_hook else 'float16'} on the wire"
            if self.zero1 is not None:
                parallel += ", ZeRO-1"
                parallel += " gathered under the forward pass" if self.zero1.overlap_gather else ""
            if config.parallel.overlap_optim_step:
                parallel += ", buckets stepped as they arrive"
        tokens = derived.global_batch_size * config.data.max_seq_len
        sends_gradients = context.world_size > 1 and not config.run.valid_only
        network = [self._network()] if sends_gradients and config.parallel.ddp_impl != "naive" else []
        return [
            f"model: {self.num_parameters / 1e6:.1f} M parameters, {self.model_config.num_hidden_layers} layers, "
            f"{self.model_config.hidden_size} wide, {self.dtype} on {context.device.type}",
            f"parallel: {parallel}; {torch.get_num_threads()} thread(s) each",
            *network,
            f"peak: {self.peak_flops / 1e9:,.0f} GFLOP/s in all, "
            + ("a matmul timed now" if context.device.type == "cpu" else "by the data sheet")
            + "; MFU is a share of it",
            f"ops: {self.ops} adamw={self.optimizer.kernel}"
            + (", Muon for the matrices of the blocks" if self.optimizer.muon else "")
            + (", plain attention for its dropout" if self.model_config.attention_dropout else "")
            + (" (blocks compiled)" if config.system.compile else ""),
            *self._what_became_of_records(),
            f"data: {self.train_data.description()}",
            f"batch: {derived.global_batch_size} samples"
            + (f" ({tokens:,} tokens)" if config.run.task_type == "pretrain" else "")
            + f" a step, {derived.max_iters} steps, "
            f"{derived.max_iters * derived.global_batch_size / len(self.train_data):.2f} epochs",
            f"starts at step {self.progress.step}, sample {self.progress.samples_consumed}"
            + (f", weights from {self.weights_from}" if self.weights_from else ""),
        ]

    def _what_became_of_records(self) -> list[str]:
        """Of SFT and DPO: how many were taken, shortened, dropped and skipped, whenever that was."""
        if self.config.run.task_type == "pretrain":
            return []
        directories = dict.fromkeys(self.data_dirs.values())
        return [f"records of {directory}: {summary(read_manifest(directory))}" for directory in directories]

    def _network(self) -> str:
        """What a step sends, and how long that takes at the speed measured now; warns where no overlap can hide it."""
        rate = 0.0

        def measure() -> None:
            nonlocal rate
            rate = measure_bandwidth(self.ddp.collectives, self.context.device)

        self.ddp.comm_stream.submit(measure).wait()
        rate = min(self.context.gather(rate))
        gradients = self.ddp.bytes_sent()
        text = (
            f"network: {rate / 1e6:,.0f} MB/s each way, measured now; a step sends {gradients / 1e6:,.1f} MB of "
            f"gradients ({gradients / rate:.2f} s)"
        )
        if self.zero1 is not None:
            parameters = self.zero1.bytes_sent()
            text += f" and {parameters / 1e6:,.1f} MB of parameters ({parameters / rate:.2f} s)"
            tokens = self.derived.global_batch_size * self.config.data.max_seq_len
            compute = tokens * self.flops_strict / (0.5 * self.peak_flops)
            if parameters / rate > compute and self.context.is_main:
                logger.warning(
                    "ZeRO-1 gathers parameters for %.2f s a step, longer than the compute (%.2f s at half the peak), "
                    "and no compression shortens that: leave out --use_distributed_optimizer if the memory allows, or "
                    "make steps larger", parameters / rate, compute,
                )  # fmt: skip
        return text + " from each rank"

    def train(self) -> int:
        """Run to the last step, or until a stop is requested; returns the exit code."""
        run, data, progress = self.config.run, self.config.data, self.progress
        if progress.step >= self.derived.max_iters:
            logger.info("nothing left to do: the run is at step %d of %d", progress.step, self.derived.max_iters)
        self.model.train()
        self.meter, self.first_step = StepMeter(progress.samples_consumed), progress.step
        self.profile = self._profile()
        # Of before the first step, such as for the weights of a resumed run.
        self.ddp.waits.take()
        if self.left_out:
            logger.info("left out the samples at positions %d to %d, as asked", *self.left_out)
            self._save(valid_loss=None)
        elif progress.step < self.derived.max_iters:
            self.saver.reserve(self._add_share)
        phase = "compile" if self.config.system.compile else "step"
        while progress.step < self.derived.max_iters:
            self.heartbeat.beat(phase, progress.step)
            phase = "step"
            if not self.profile.step(progress.step + 1, self._step):
                self._log_step()
                self._settle_save()
                if self.saved_step != progress.step:
                    self._save(valid_loss=None, must=True)
                if self.place.is_first_of_store:
                    (self.out_dir / ckpt.STOP_FILE).unlink(missing_ok=True)
                self._end("stopped on request")
                return exits.STOPPED
            finished = progress.step == self.derived.max_iters
            valid_loss = None
            if self.valid_data is not None and (finished or _is_due(progress.step, data.valid_interval)):
                with self.ddp.waits.uncounted():
                    valid_loss = self.validate()
            if finished or valid_loss is not None or self.save_due or _is_due(progress.step, run.save_interval):
                self._log_step()
                self._save(valid_loss, must=finished)
        self._settle_save(must=True)
        self._end("finished")
        return exits.OK

    def _end(self, reason: str) -> None:
        """All is saved: write what was traced, record the end, and say where everything is."""
        self.profile.finish()
        self.heartbeat.beat("end", self.progress.step)
        if self.reslog is None:
            log_repeated_warnings(logger.warning)
            return
        self.reslog.write("end", step=self.progress.step, reason=reason)
        run, progress = self.config.run, self.progress
        ending = Ending(
            self.out_dir, reason == "finished", progress.step, self.derived.max_iters, progress.step - self.first_step,
            time.perf_counter() - self.launched, progress.tokens, self.train_loss, run.task_type != "pretrain",
            self._resume_command(), self.saver.retention,
        )  # fmt: skip
        for line in summary_lines(ending):
            logger.info(line)
        log_repeated_warnings(logger.info)

    def _resume_command(self) -> str:
        context, flags = self.context, f"--resume --out_dir={shlex.quote(str(self.out_dir))}"
        if context.world_size == 1:
            return f"python train_my_ddp.py {flags}"
        if context.local_world_size == context.world_size:
            return f"torchrun --standalone --nproc_per_node={context.world_size} train_my_ddp.py {flags}"
        return "the same command on every node, with --resume"

    def _profile(self) -> StepProfile:
        context = self.context
        about = {
            "run": self.out_dir.name,
            "rank": context.rank,
            "world_size": context.world_size,
            "device": torch.cuda.get_device_name() if context.device.type == "cuda" else "cpu",
        }
        steps = parse_profile_steps(self.config.run.profile_steps)
        profile = StepProfile(steps, self.out_dir / "profile", context.device, about, self._aside)
        profile.begin(self.progress.step)
        return profile

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Around what takes long and is not training time."""
        self.heartbeat.beat("save", self.progress.step)
        started = time.perf_counter()
        yield
        self.meter.leave_out(time.perf_counter() - started)

    def _step(self) -> bool:
        """One optimizer step on the next global batch. False, and nothing done, if any rank was asked to stop."""
        context, progress = self.context, self.progress
        waited = time.perf_counter()
        with span("data wait"):
            batches = next(self.loader)
        waited = time.perf_counter() - waited

        # Known before the backward pass, and needed by it: how many terms the loss of the whole global batch has.
        digest = sum(batch_digest(batch) for batch in batches.micro_batches)
        count = sum(self.task.count(batch) for batch in batches.micro_batches)
        tokens = sum(num_tokens(batch) for batch in batches.micro_batches)
        agreed = torch.tensor(
            [count, tokens, digest & 0xFFFFFFFF, digest >> 32, self._stop_asked(), self._save_asked(),
             *self.saver.signs()]
        )  # fmt: skip
        with span("agree"):
            count, tokens, digest_low, digest_high, stop, save, failed, done = context.all_sum(agreed).tolist()
        if failed or done == context.world_size:
            self._report_save(self.saver.conclude())
        if stop:
            return False

        self.save_due, self.next_sample = bool(save), batches.last + 1
        if self.powersgd is not None or self.config.parallel.overlap_optim_step:
            self.saver.before_update()
        learning_rate = self.learning_rate()
        if self.config.parallel.overlap_optim_step:
            self.optimizer.begin_overlapped_step(learning_rate)
        if self.powersgd is not None:
            self.powersgd.measure = _is_due(progress.step + 1, self.config.parallel.powerSGD_log_interval)
        if self.task.uses_prepass:
            with span("prepass"):
                sums = sum(self.task.prepass(self._to_device(batch)) for batch in batches.micro_batches)
                self.task.take_prepass(context.all_sum(sums.cpu()).to(context.device))
        loss_scale = self.scaler.scale / max(count, 1)
        loss_total = torch.zeros((), dtype=torch.float64, device=context.device)
        metrics = {name: torch.zeros_like(loss_total) for name in self.task.metric_names}
        for index, batch in enumerate(batches.micro_batches):
            is_last = index == len(batches.micro_batches) - 1
            with nullcontext() if is_last else self.ddp.no_sync():
                with span("forward"):
                    loss_sum, _, sums = self.task(self._to_device(batch))
                with span("backward"):
                    (loss_sum * loss_scale).backward()
            loss_total += loss_sum.detach()
            for name, value in sums.items():
                metrics[name] += value
        self.ddp.finish_grad_sync()
        self.saver.before_update()
        with span("optimizer"):
            result = self._finish_step(learning_rate)
        if result.skipped:
            self._on_skipped_step(result.grad_norm)
        else:
            self.skipped_in_a_row = 0
        is_zero = self.optimizer.zero_grad and not result.skipped
        if not (is_zero or self.config.parallel.overlap_zero_grad_buffer):
            with span("zero gradients"):
                self.ddp.zero_grad()

        progress.step += 1
        progress.samples_consumed = batches.last + 1
        progress.tokens += tokens
        comm_wait = self.ddp.waits.take()
        self.meter.add_step(batches.last, tokens, (digest_high << 32) + digest_low, waited, comm_wait)
        self.unlogged = Unlogged(loss_total, metrics, max(count, 1), learning_rate, result.grad_norm)
        if self.powersgd is not None and self.powersgd.measure and not result.skipped:
            self._log_compression()
        if _is_due(progress.step, self.config.run.log_interval):
            self._log_step()
        return True

    def _stop_asked(self) -> bool:
        """By a signal to this rank, or a file in the run directory."""
        return self.stop.requested or (self.place.is_first_of_store and (self.out_dir / ckpt.STOP_FILE).exists())

    def _save_asked(self) -> bool:
        """By the first rank's clock."""
        minutes = self.config.run.save_interval_minutes
        return self.context.is_main and minutes > 0 and time.monotonic() - self.last_save >= 60 * minutes

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

    def learning_rate(self) -> float:
        o = self.config.optimizer
        schedule = o.lr_schedule if o.decay_lr else "constant"
        return learning_rate_at(
            self.progress.step, self.derived.max_iters, o.learning_rate, schedule, o.warmup_ratio, o.min_lr_ratio,
            o.wsd_decay_ratio,
        )  # fmt: skip

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

    def _to_device(self, batch: Batch) -> Batch:
        if self.model.wants_document_starts and "document_ids" in batch:
            # Here, where nothing has to wait for how many there are.
            batch = batch | {"document_starts": document_starts(batch["document_ids"])}
        return {name: tensor.to(self.context.device, non_blocking=True) for name, tensor in batch.items()}

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss over the validation set, bit for bit the same on any number of ranks: the set is always cut into
        the same batches, and their exact sums are added in one order."""
        context, data = self.context, self.config.data
        started = time.perf_counter()
        count, batches = validation_batches(
            self.valid_data, data.valid_batch_size, data.valid_iters, context.rank, context.world_size
        )
        self.model.eval()
        names = self.task.metric_names
        table = torch.zeros(count, 2 + len(names), dtype=torch.float64)
        for index, batch in batches:
            self.heartbeat.beat("validate", self.progress.step)
            loss_sum, terms, sums = self.task(self._to_device(batch))
            row = [loss_sum.item(), float(terms), *(sums[name].item() for name in names)]
            table[index] = torch.tensor(row, dtype=torch.float64)
        self.model.train()
        loss_sum, terms, *sums = (math.fsum(column) for column in context.all_sum(table).T.tolist())
        figures = self.task.figures(loss_sum, terms, dict(zip(names, sums)))
        seconds = time.perf_counter() - started
        if not self.config.run.valid_only:
            self.meter.leave_out(seconds)
        logger.info(
            "valid at step %d | %s | %d %s | %.1f s",
            self.progress.step, _shown(figures), self.task.units(terms), self.task.count_name, seconds,
        )  # fmt: skip
        if self.reslog is not None:
            self.reslog.write(
                "valid", step=self.progress.step, **figures, dt=round(seconds, 3),
                **{self.task.count_name: self.task.units(terms)},
            )  # fmt: skip
        return figures["loss"]

    def _log_step(self) -> None:
        """Log the last step, and what was read since the last record. Also before a save, whatever the log interval, so
        that the records of a run that is killed later cover every sample that its checkpoint has consumed."""
        if self.unlogged is None:
            return
        last, self.unlogged = self.unlogged, None
        sums = self.context.all_sum(torch.stack([last.loss_sum, *last.metrics.values()]).cpu()).tolist()
        figures = self.task.figures(sums[0], last.count, dict(zip(last.metrics, sums[1:])))
        if self.config.run.sync_for_true_time and self.context.device.type == "cuda":
            torch.cuda.synchronize()
        progress, reading, self.train_loss = self.progress, self.meter.read(), figures["loss"]
        tokens_per_sec = reading.pop("tokens") / reading["dt"]
        mfu = tokens_per_sec * self.flops_strict / self.peak_flops
        mfu_seed = tokens_per_sec * self.flops_seed / self.peak_flops
        if self.reslog is None:
            return
        self.reslog.write(
            "train", step=progress.step, **figures, lr=last.learning_rate, grad_norm=last.grad_norm,
            tokens=progress.tokens, tokens_per_sec=tokens_per_sec, mfu=mfu, mfu_seed=mfu_seed, **reading,
        )  # fmt: skip
        seconds_left = reading["dt"] * (self.derived.max_iters - progress.step)
        starved = reading["data_wait"] / reading["dt"]
        logger.info(
            "step %d/%d | %s | norm %.3f | lr %.2e | %s tokens/s | MFU %.1f%% | %s%s left",
            progress.step, self.derived.max_iters, _shown(figures), last.grad_norm, last.learning_rate,
            f"{tokens_per_sec:,.0f}", 100 * mfu, f"data wait {100 * starved:.0f}% | " if starved > 0.05 else "",
            clock(seconds_left),
        )  # fmt: skip

    def _log_compression(self) -> None:
        """How much of the gradients PowerSGD left for later in this step."""
        errors = self.powersgd.relative_error
        if self.reslog is not None and errors:
            self.reslog.write(
                "compression", step=self.progress.step, ratio=self.powersgd.compression_ratio,
                mean_relative_error=sum(errors.values()) / len(errors), relative_error=errors,
            )  # fmt: skip

    def _save(self, valid_loss: float | None, must: bool = False) -> None:
        """Save the present state in the background; all ranks take part, each with its share of the optimizer state.

        Args:
            must: wait for it, and fail with it; see _settle_save.
        """
        self.heartbeat.beat("save", self.progress.step)
        self._settle_save()
        started = time.perf_counter()
        if self.zero1 is not None:
            with self.ddp.waits.uncounted():
                self.zero1.wait()
        writer = self.saver.begin(self.progress.step)
        self._add_share(writer)
        self.saver.start(writer, valid_loss)
        self.meter.leave_out(time.perf_counter() - started)
        self.last_save = time.monotonic()
        if must or not self.saver.background:
            self._settle_save(must)

    def _settle_save(self, must: bool = False) -> None:
        """Wait until the save in flight, if there is one, is whole on all ranks or has failed.

        Raises:
            OSError: with `must`: it failed (a full disk). Raised on all ranks, and what was there stays.
        """
        started = time.perf_counter()
        if self.saver.in_flight:
            self.heartbeat.beat("save", self.progress.step)
        outcome = self.saver.settle()
        self.meter.leave_out(time.perf_counter() - started)
        if outcome is not None:
            self._report_save(outcome)
            if must and outcome.problem is not None:
                raise OSError(f"the checkpoint of step {outcome.step} could not be written: {outcome.problem}")

    def _report_save(self, outcome: SaveOutcome) -> None:
        """All ranks agree on what became of a save. A full disk does not end the run: earlier checkpoints are whole."""
        if outcome.problem is None:
            self.saved_step = outcome.step
        if not self.context.is_main:
            return
        if outcome.problem is not None:
            logger.warning(
                "the checkpoint of step %d could not be written, the run goes on: %s", outcome.step, outcome.problem
            )
            self.reslog.write("save_failed", step=outcome.step, problem=outcome.problem)
            return
        self.reslog.write(
            "save", step=outcome.step, path=outcome.name, dt=round(outcome.seconds, 3),
            held_up=round(outcome.held_up, 4),
        )  # fmt: skip
        logger.info(
            "saved %s in %.2f s (training waited %.3f s)",
            self.ckpt_dir / outcome.name, outcome.seconds, outcome.held_up,
        )  # fmt: skip

    def _add_share(self, writer: CheckpointWriter) -> None:
        """What this rank writes of a checkpoint."""
        writer.add_flat_state(self.optimizer.named_state(), sharded=self.zero1 is not None)
        if self.powersgd is not None:
            writer.add_hook_state(self.powersgd.state_tensors())
        if self.place.is_first_of_store:
            writer.add_tensors("model.safetensors", hf.named_weights(self.model), {"format": "pt"})
            writer.add_json("config.json", hf.to_hf_config(self.model_config, self.dtype, self.tokenizer.eod_id))
            writer.add_folder(self.tokenizer.save_pretrained)
            writer.add_json(ckpt.TRAINER_STATE, self._trainer_state())

    def _trainer_state(self) -> dict:
        return {
            "step": self.progress.step,
            "samples_consumed": self.progress.samples_consumed,
            "tokens": self.progress.tokens,
            "stream": self._stream(),
            "optimizer": self.optimizer.scalar_state(),
            "world_size": self.context.world_size,
            "reference": self.reference,
        }

    def close(self) -> None:
        self.loader.close()
        if isinstance(self.ddp, DistributedDataParallel):
            self.ddp.close()
        if self.reslog is not None:
            self.reslog.close()
        self.release()

    def release(self) -> None:
        """Let a save in flight finish, and another process have the run directory."""
        if self.saver is not None:
            self.saver.close()
        if self.lock is not None:
            self.lock.close()


def prepare_data(config: Config, given: frozenset[str]) -> dict[str, Path]:
    """Set -> directory of its tokens. Raw records of SFT and DPO are tokenized first: before any process group exists,
    so that no rank waits in a collective meanwhile.

    Raises:
        ValueError: nothing to tokenize, or flags that contradict what was tokenized before.
    """
    data, run = config.data, config.run
    dirs = {"train": Path(data.train_data_dir or data.data_dir), "valid": Path(data.valid_data_dir or data.data_dir)}
    if run.task_type == "pretrain":
        return dirs
    options = Options(
        run.task_type, data.max_seq_len, data.sft_loss, data.max_prompt_len, data.prompt_truncation_mode,
        data.user_name, data.assistant_name,
    )  # fmt: skip
    chosen = {}
    for split, directory in dirs.items():
        if (directory / MANIFEST_NAME).exists():
            chosen[split] = directory
        elif split == "valid" and not data.valid_data_dir:
            chosen[split] = chosen["train"]
        else:
            # A directory for validation alone is taken whole.
            ratio = 1.0 if split == "valid" else data.valid_ratio or 0.0
            chosen[split] = tokenize_online(directory, _tokenizer_dir(config), options, ratio)
        check_options(chosen[split], options, given)
    return chosen


def _tokenizer_dir(config: Config) -> Path:
    """The tokenizer of the model that is trained."""
    data, run = config.data, config.run
    if data.tokenizer_dir:
        return Path(data.tokenizer_dir)
    if run.resume and ckpt.list_checkpoints(Path(run.out_dir) / "ckpt"):
        return ckpt.resolve_checkpoint_dir(Path(run.out_dir))
    if run.init_from:
        return ckpt.resolve_checkpoint_dir(Path(run.init_from))
    raise ValueError("raw records need a tokenizer: give --init_from with a model, or --tokenizer_dir")


def _shown(figures: dict[str, float]) -> str:
    """Of a task's figures, those that fit a line."""
    formats = {
        "loss": "loss {:.4f}",
        "bits_per_byte": "bits per byte {:.4f}",
        "rewards/margins": "margin {:.3f}",
        "rewards/accuracies": "accuracy {:.2f}",
    }
    return " | ".join(text.format(figures[name]) for name, text in formats.items() if name in figures)


def _is_due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0


def main(argv: list[str]) -> int:
    """Run, and leave an exit record whatever happens; returns the exit code.

    Raises:
        Exception, KeyboardInterrupt: a crash, after its record was written.
    """
    rank = launched_rank()
    setup_console(rank)
    exit_dir, trainer = exit_record_dir(), None

    def leave(code: int, reason: str, **more: object) -> int:
        if exit_dir is not None:
            step = trainer.progress.step if trainer else None
            try:
                exits.write_exit_record(
                    exit_dir, rank, code, reason, step, world_size=launched_world_size(), launch=launch_token(), **more
                )
            except OSError as error:
                # The reason was just logged, and there is nowhere to write it.
                logger.debug("no exit record: %s", error)
        return code

    try:
        try:
            config, given = parse_config(argv)
            exit_dir = exit_dir or Path(config.run.out_dir) / "exit"
            exits.clear_exit_record(exit_dir, rank)
            # Before a request to stop waits for a step: what is tokenized so far is kept anyway.
            data_dirs = prepare_data(config, given)
            stop = StopRequest()
            if not config.run.valid_only:
                for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                    signal.signal(signum, stop)
            context = init_context(config.system.device, config.parallel.ddp_backend, config.parallel.dist_timeout)
            trainer = Trainer(config, given, context, stop, data_dirs)
        except exits.StopRequested:
            logger.info("stopped on request before the first step")
            return leave(exits.STOPPED, "stopped on request")
        except ValueError as error:
            logger.error("train_my_ddp: %s", error)
            log_traceback()
            # The groups are left as they are: to leave NCCL's in order, all ranks would have to come along.
            return leave(exits.WRONG_INPUT, str(error))
        if config.run.valid_only:
            trainer.validate()
            code = exits.OK
        else:
            code = trainer.train()
        trainer.close()
        destroy_context(context)
        return leave(code, "finished" if code == exits.OK else "stopped on request")
    except (Exception, KeyboardInterrupt) as error:
        logger.error("crashed:\n%s", traceback.format_exc())
        # With the position to go on from behind what made the loss non-finite, for the monitor.
        non_finite = isinstance(error, FloatingPointError) and trainer is not None
        more = {"non_finite_until": trainer.next_sample} if non_finite else {}
        leave(exits.CRASH, f"{type(error).__name__}: {error}", traceback=traceback.format_exc()[-8000:], **more)
        if trainer is not None:
            trainer.release()
        raise


if __name__ == "__main__":
    try:
        exit_code = main(sys.argv[1:])
    except (Exception, KeyboardInterrupt):
        exit_code = exits.CRASH
    if exit_code in (exits.CRASH, exits.WRONG_INPUT):
        # All is logged. Leave at once: a thread that waits for another rank would hold the process back.
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
