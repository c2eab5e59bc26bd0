"""Flags of hooks, ZeRO-1 and overlaps: the original's names, and a reason for each combination that cannot work."""

from pathlib import Path

import pytest

import train_my_ddp
from configurator import flatten, parse_config, without_effect
from runs.exits import read_exit_records
from tests.runs import out_dir

POWERSGD, ZERO1, STEP = "--use_powerSGD_hook", "--use_distributed_optimizer", "--overlap_optim_step"
FSDP, HSDP = "--data_parallel=fsdp", "--data_parallel=hsdp"
TENSOR, PIPE = "--tensor_model_parallel_size=2", "--pipeline_model_parallel_size=2"
CONTEXT, RING = "--context_parallel_size=2", "--context_parallel_method=ring"


def parse(*argv: str) -> dict:
    return flatten(parse_config(["--data_dir=d", *argv])[0])


REFUSED = [
    ([CONTEXT, "--max_seq_len=37"], "--max_seq_len=36 is the nearest possible"),
    ([CONTEXT, "--max_seq_len=1"], "--max_seq_len=4 is the nearest possible"),
    ([CONTEXT, RING], "for rows of one document: give --no-document_mask"),
    ([CONTEXT, RING, "--task_type=sft", "--init_from=m"], "for rows of one conversation: give --no-packing"),
    ([CONTEXT, RING, "--no-document_mask", "--attention_kernel=plain"], "leave out --attention_kernel=plain"),
    ([CONTEXT, "--compile"], "--compile does not go with --context_parallel_size"),
    ([STEP], "cannot clip: add --grad_clip=0"),
    ([STEP, "--grad_clip=0.5"], "cannot clip"),
    ([STEP, "--grad_clip=0", "--dtype=float16"], "cannot skip a step, which float16's loss scaler needs"),
    (["--overlap_param_gather"], "needs --use_distributed_optimizer: otherwise nothing is gathered"),
    (["--overlap_param_gather", POWERSGD], "needs --use_distributed_optimizer"),
    (["--overlap_zero_grad_buffer"], "needs --overlap_optim_step"),
    (["--overlap_zero_grad_buffer", "--grad_clip=0", ZERO1], "needs --overlap_optim_step"),
    (["--ddp_impl=naive", ZERO1], "--use_distributed_optimizer needs buckets: leave out --ddp_impl=naive"),
    (["--ddp_impl=naive", POWERSGD], "--use_powerSGD_hook needs buckets"),
    (["--ddp_impl=naive", "--use_bf16_compress_hook"], "--use_bf16_compress_hook needs buckets"),
    (["--ddp_impl=naive", "--use_fp16_compress_hook"], "--use_fp16_compress_hook needs buckets"),
    (["--ddp_impl=naive", STEP, "--grad_clip=0"], "--overlap_optim_step needs buckets"),
    (["--use_bf16_compress_hook", "--use_fp16_compress_hook"], "only one of the two compress hooks"),
    (["--use_bf16_compress_hook", "--use_fp16_compress_hook", POWERSGD], "only one of the two compress hooks"),
    (["--grad_buffer_is_powerSGD_error"], "needs --use_powerSGD_hook with --use_error_feedback"),
    (["--grad_buffer_is_powerSGD_error", POWERSGD, "--no-use_error_feedback"], "with --use_error_feedback"),
    (["--grad_buffer_is_powerSGD_error", POWERSGD, "--dtype=float16"], "does not go with --dtype=float16"),
    (["--matrix_approximation_rank=0"], "must be at least 1, got 0"),
    ([POWERSGD, "--matrix_approximation_rank=-4"], "must be at least 1, got -4"),
    ([POWERSGD, "--matrix_approximation_rank=2.5"], "of type int"),
    ([POWERSGD, "--start_powerSGD_iter=-1"], "start_powerSGD_iter must not be negative"),
    ([POWERSGD, "--min_compression_rate=-1"], "min_compression_rate must not be negative"),
    ([POWERSGD, "--orthogonalization_epsilon=-1"], "orthogonalization_epsilon must not be negative"),
    ([POWERSGD, "--powerSGD_log_interval=-1"], "powerSGD_log_interval must not be negative"),
    (["--bucket_size=-1"], "bucket_size must not be negative"),
    (["--optimizer=muon", ZERO1, STEP, "--grad_clip=0"], "needs whole matrices"),
    (["--optimizer=muon", "--muon_iterations=7"], "muon_iterations must lie between 1 and 6, got 7"),
    (["--optimizer=muon", "--muon_momentum=1"], "muon_momentum must be at least 0 and below 1"),
    (["--optimizer=muon", "--muon_lr_ratio=-1"], "muon_lr_ratio must not be negative"),
    (["--optimizer=lion", "--lion_beta1=1"], "lion_beta1 must be at least 0 and below 1"),
    (["--ranks_per_machine=-1"], "ranks_per_machine must not be negative"),
    (["--tensor_model_parallel_size=0"], "tensor_model_parallel_size must be positive"),
    (["--context_parallel_size=-1"], "context_parallel_size must be positive, got -1"),
    ([PIPE, FSDP], "--data_parallel=fsdp gathers a block's weights for each micro-batch, of which a pipeline has many"),
    ([PIPE, "--ddp_impl=naive"], "--ddp_impl=naive sums gradients one after the other"),
    ([PIPE, "--pipeline_micro_batches=-4"], "must be a positive number or \"auto\", got '-4'"),
    ([PIPE, "--pipeline_schedule=zero_bubble", "--pipeline_parts=3,3,3,3", "--compile"], "which --pipeline_schedule="),
    ([PIPE, "--pipeline_schedule=zbv", "--gradient_checkpointing"], "has one for each matrix"),
    ([PIPE, TENSOR, "--pipeline_schedule=zbv"], "--pipeline_schedule=zbv takes the gradients of weights apart"),
    ([PIPE, CONTEXT, "--pipeline_schedule=zero_bubble"], "give --pipeline_schedule=interleaved"),
    (["--expert_model_parallel_size=2", HSDP], "keeps each expert whole, and --data_parallel=hsdp cuts every"),
    ([TENSOR, "--ddp_impl=naive"], "some of these hold different parts of the model: leave it out"),
    (["--expert_model_parallel_size=4", "--ddp_impl=naive"], "--ddp_impl=naive adds up every gradient over all ranks"),
    ([TENSOR, "--optimizer=muon"], "--optimizer=muon makes whole matrices orthogonal"),
    ([TENSOR, "--optimizer=adamw8bit"], "--optimizer=adamw8bit has scales for values in a row"),
    ([TENSOR, "--init_from=m", "--lora_r=4", "--load_in_4bit"], "with --tensor_model_parallel_size=2, since matrices"),
    (["--context_parallel_size=2", "--activation_budget_gb=1"], "with --context_parallel_size=2, give --gradient_che"),
    ([FSDP, ZERO1], "give --no-use_distributed_optimizer or --data_parallel=auto"),
    ([HSDP, POWERSGD], "which sums gradients a block at a time, by no hook: give --no-use_powerSGD_hook or"),
    ([FSDP, "--use_bf16_compress_hook"], "=auto; --no-grad_reduce_in_fp32 sends gradients in --dtype"),
    ([FSDP, "--use_fp16_compress_hook"], "--use_fp16_compress_hook does not go with --data_parallel=fsdp"),
    ([FSDP, STEP, "--grad_clip=0"], "--overlap_optim_step does not go with --data_parallel=fsdp"),
    ([HSDP, "--overlap_param_gather"], "--overlap_param_gather does not go with --data_parallel=hsdp"),
    ([HSDP, "--overlap_zero_grad_buffer"], "--overlap_zero_grad_buffer does not go with --data_parallel=hsdp"),
    ([HSDP, "--ddp_impl=naive"], "needs the whole model on every rank: leave out --data_parallel=hsdp"),
    ([FSDP, "--init_from=m", "--lora_r=4", "--load_in_4bit"], "matrices in 4 bits are whole on every rank"),
    ([FSDP, "--offload_optimizer", "--fsdp_cpu_offload"], "leave out --offload_optimizer"),
    ([FSDP, "--activation_budget_gb=1"], "--activation_budget_gb measures a model that is whole on every rank"),
    ([FSDP, "--optimizer=muon", "--fsdp_cpu_offload"], "give --optimizer=adamw, or leave it out"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "reason"), REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(argv: list[str], reason: str):
    with pytest.raises(ValueError) as caught:
        parse(*argv)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


ACCEPTED = [
    [STEP, "--grad_clip=0", "--dtype=bfloat16"],
    # auto is never float16
    [STEP, "--grad_clip=0", "--dtype=auto"],
    [STEP, "--grad_clip=0", "--overlap_zero_grad_buffer", ZERO1, "--overlap_param_gather"],
    [STEP, "--grad_clip=0", POWERSGD, "--grad_buffer_is_powerSGD_error", "--use_fp16_compress_hook"],
    [ZERO1, "--dtype=float16"],
    [POWERSGD, "--dtype=float16", ZERO1],
    [POWERSGD, "--grad_buffer_is_powerSGD_error", "--dtype=auto"],
    [POWERSGD, "--use_bf16_compress_hook", ZERO1, "--overlap_param_gather"],
    [POWERSGD, "--no-use_error_feedback", "--no-warm_start", "--use_fixed_Q"],
    ["--use_bf16_compress_hook", "--no-use_fp16_compress_hook", "--dtype=float16"],
    ["--ddp_impl=naive", "--no-use_powerSGD_hook", "--use_distributed_optimizer=False", "--grad_clip=0"],
    ["--optimizer=muon", STEP, "--grad_clip=0"],
    ["--optimizer=muon", ZERO1, "--overlap_param_gather"],
    ["--optimizer=lion8bit", ZERO1, STEP, "--grad_clip=0"],
    [FSDP, "--no-reshard_after_forward", "--fsdp_cpu_offload"],
    [FSDP, "--optimizer=muon", "--no-reshard_after_forward"],
    [HSDP, "--ranks_per_machine=4", "--no-grad_reduce_in_fp32", "--optimizer=lion8bit"],
    [FSDP, TENSOR, "--sequence_parallel", "--context_parallel_size=2"],
    ["--expert_model_parallel_size=2", "--context_parallel_size=2", "--optimizer=muon", ZERO1],
    [PIPE, TENSOR, "--pipeline_schedule=gpipe", "--pipeline_parts=measured", "--pipeline_micro_batches=auto"],
    [PIPE, "--pipeline_schedule=interleaved", "--pipeline_parts=5,4,4,5", POWERSGD, ZERO1],
    [PIPE, "--pipeline_schedule=zero_bubble", "--num_layers_per_virtual_pipeline_stage=2"],
    ["--matrix_approximation_rank=1", "--start_powerSGD_iter=0", "--min_compression_rate=0", "--bucket_size=0"],
]


@pytest.mark.parametrize("argv", ACCEPTED)
def test_what_fits_is_accepted(argv: list[str]):
    flat = parse(*argv)
    for flag in argv:
        name, _, value = flag.removeprefix("--").removeprefix("no-").partition("=")
        expected = value or str(not flag.startswith("--no-"))
        assert str(flat[name]) in (expected, f"{expected}.0"), flag


@pytest.mark.parametrize(("argv", "sentences"), [
    ([FSDP, "--bucket_size=5", "--no-overlap_grad_reduce"],
     ["--bucket_size, --no-overlap_grad_reduce have no effect with --data_parallel=fsdp or hsdp, which send a block at "
      "a time"]),
    ([HSDP, "--disable_bucketing"], ["--disable_bucketing has no effect with --data_parallel=fsdp or hsdp, which send a"
                                     " block at a time"]),
    (["--no-reshard_after_forward", "--fsdp_cpu_offload"],
     ["--no-reshard_after_forward, --fsdp_cpu_offload have no effect without --data_parallel=fsdp or hsdp"]),
    ([HSDP, "--no-reshard_after_forward", "--ranks_per_machine=2"], []),
    (["--sequence_parallel", "--pipeline_parts=3,3", "--pipeline_micro_batches=auto"],
     ["--sequence_parallel has no effect without --tensor_model_parallel_size",
      "--pipeline_parts, --pipeline_micro_batches have no effect without --pipeline_model_parallel_size"]),
    ([TENSOR, PIPE, "--sequence_parallel", "--pipeline_schedule=gpipe"], []),
])  # fmt: skip
def test_what_changes_nothing_is_said(argv: list[str], sentences: list[str]):
    assert without_effect(*parse_config(["--data_dir=d", *argv])) == sentences


def test_nothing_is_compressed_or_overlapped_unless_asked():
    """One trajectory: options that change it, or that need clipping off, are off by default."""
    flat = parse()
    for name in ("use_bf16_compress_hook", "use_fp16_compress_hook", "use_powerSGD_hook", "use_distributed_optimizer",
                 "overlap_param_gather", "overlap_optim_step", "overlap_zero_grad_buffer"):  # fmt: skip
        assert flat[name] is False
    assert (flat["overlap_grad_reduce"], flat["grad_reduce_in_fp32"]) == (True, True)


ORIGINAL = [
    ("ddp_backend", "gloo"), ("use_bf16_compress_hook", True), ("use_powerSGD_hook", True),
    ("matrix_approximation_rank", 32), ("warm_start", False), ("use_error_feedback", True),
    ("start_powerSGD_iter", 7), ("min_compression_rate", 3.0), ("orthogonalization_epsilon", 1e-6),
    ("grad_buffer_is_powerSGD_error", True), ("orthogonalize_in_float32", False), ("use_fixed_Q", True),
    ("grad_reduce_in_fp32", False), ("overlap_grad_reduce", False), ("use_distributed_optimizer", True),
    ("check_for_nan_in_grad", True), ("bucket_size", 4321), ("disable_bucketing", True), ("overlap_optim_step", True),
    ("overlap_zero_grad_buffer", True), ("overlap_param_gather", True),
]  # fmt: skip


def test_the_originals_parallel_flags_are_all_known():
    """INVENTORY.md's list, in one command, in the original's spelling."""
    flat = parse("--grad_clip=0", *(f"--{name}={value}" for name, value in ORIGINAL))
    assert {name: flat[name] for name, _ in ORIGINAL} == dict(ORIGINAL)
    # Each of these values differs from the default, so none was merely overlooked.
    default = parse()
    assert {name for name, value in ORIGINAL if default[name] == value} == {"use_error_feedback"}


def test_the_script_exits_with_2_and_the_reason(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setenv("ZERO2ALL_EXIT_DIR", str(tmp_path / "exit"))
    for argv, reason in ([STEP], "cannot clip"), ([POWERSGD, "--ddp_impl=naive"], "needs buckets"):
        assert train_my_ddp.main([*tiny_run, *argv]) == 2
        lines = capsys.readouterr().out.strip().splitlines()
        assert len(lines) == 1 and reason in lines[0]
        record = read_exit_records(tmp_path / "exit")[0]
        assert record["code"] == 2 and reason in record["reason"]
    assert not out_dir(tiny_run).exists()
