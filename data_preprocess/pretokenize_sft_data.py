"""Tokenize conversations for SFT, or preferences for DPO, into shards of sequences (format: dataset/sequences.py).

    python -m data_preprocess.pretokenize_sft_data --data_dir D --tokenizer_dir T --output_dir O --max_seq_len 1024
    python -m data_preprocess.pretokenize_sft_data --task dpo ...

The layouts of records are described in conversations/; mask_compiler.py says which tokens are learnt, and how long
samples are shortened. Records go to the train or the valid set by the hash of the messages before the first answer, so
that the same question is never in both. A killed run goes on where it stopped (jobs.py).

    pretokenize_sft_data.py -> jobs.py -> sequence_job.py -> readers/ -> record_compiler.py -> conversations/
    -> mask_compiler.py -> tokenizer/chat_template.py -> dataset/sequences.py

Training on raw records (`train_my_ddp.py --task_type=sft --data_dir=D`) does the same work by itself, see
raw_records.py.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import os

from data_preprocess.jobs import process_corpus, run_command
from data_preprocess.readers import add_file_arguments, chosen_files, well_known_endings
from data_preprocess.record_compiler import add_compiling_arguments, compiler_options_from
from data_preprocess.sequence_job import SequenceJob, record_corpus
from data_preprocess.shards import print_skipped
from utils.arguments import Parser
from utils.paths import a_path
from utils.terminal import run_main


def summary(manifest: dict) -> str:
    """Line about the records and the samples that they became."""
    shards = manifest["shards"]
    return (
        f"{manifest['documents']:,} records -> {manifest['samples']:,} samples, {manifest['tokens']:,} tokens, "
        f"{manifest['supervised_tokens'] / max(manifest['tokens'], 1):.0%} of them supervised, in "
        f"{len(shards['train'])} train and {len(shards['valid'])} valid shards; {manifest['shortened']} samples "
        f"shortened, {manifest['dropped']} dropped for want of an answer, {manifest['bad_records']} records skipped"
    )


def print_summary(manifest: dict, seconds: float) -> None:
    print_skipped(manifest)
    print(f"{summary(manifest)}; {seconds:.1f} s")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m data_preprocess.pretokenize_sft_data", description="Tokenize conversations or preferences."
    )
    endings = ", ".join(well_known_endings(of_records=True))
    parser.add_argument("--data_dir", type=a_path, required=True, help=f"directory with records: {endings}")
    parser.add_argument("--tokenizer_dir", type=a_path, required=True, help="directory of the tokenizer")
    parser.add_argument("--output_dir", type=a_path, required=True, help="where the shards go")
    add_compiling_arguments(parser)
    add_file_arguments(parser)
    parser.add_argument("--valid_ratio", type=float, default=0.0, help="share of records held out (default: 0; 1: all)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--shard_mb", type=float, default=64.0, help="MB of text in a shard (default: 64)")
    parser.add_argument("--max_bad_records", type=int, default=100, help="stop if more are unreadable (default: 100)")
    args = parser.parse_args(argv)

    def work() -> dict:
        options = compiler_options_from(args)
        options.check()
        if args.num_workers < 1:
            raise ValueError(f"--num_workers must be positive, got {args.num_workers}")
        if not 0 < args.shard_mb * 1e6 < 2**31:
            raise ValueError(f"--shard_mb must be positive and below 2147, got {args.shard_mb}")
        job = SequenceJob(
            record_corpus(args.data_dir, **chosen_files(args)), args.output_dir, args.tokenizer_dir, args.valid_ratio,
            int(args.shard_mb * 1e6), args.max_bad_records, options,
        )  # fmt: skip
        return process_corpus(job, args.num_workers)

    return run_command("pretokenize_sft_data", work, print_summary)


if __name__ == "__main__":
    run_main(main, goes_on=True)
