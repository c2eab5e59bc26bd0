"""Options of the data. Plain data: importing this does not load torch."""

from dataclasses import dataclass
from typing import Literal

from utils.options import OnlyWith, require_at_most, require_between, require_not_negative, require_positive


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    data_dir: str = ""
    """Directory with pretokenized train and valid shards, or for sft and dpo with raw records."""
    train_data_dir: str = ""
    """Training data, instead of data_dir's."""
    valid_data_dir: str = ""
    """Validation data, instead of data_dir's."""
    tokenizer_dir: str = ""
    """Tokenizer of the data; by default the one beside the shards."""
    max_seq_len: int = 1024
    """Tokens in a sample. By default as prepared in the data; for raw records, at most the weights' own length."""
    train_batch_size: int = 8
    """Samples in a micro-batch. SFT and DPO: if neither this nor the next is given, both are chosen to fit the data."""
    gradient_accumulation_steps: int = 8
    """Micro-batches in a step, over all ranks together; a multiple of the number of ranks."""
    valid_interval: int = 0
    """Steps between validations; 0: validate only at the end."""
    valid_batch_size: int = 8
    """Samples in a validation batch."""
    valid_iters: int = 0
    """Validation batches, over all ranks together; 0: the whole set."""
    sample_texts: int = 2
    """Number of texts that the model writes into the log after each validation; 0: none."""
    sample_tokens: int = 48
    """Most tokens of each such text."""
    sample_prompt: str = ""
    """Beginning of these texts; by default, beginnings from the validation set."""
    valid_ratio: float | None = None
    """Share of raw records to hold out (default: none). For pretokenized data, which fixed it, only checked."""
    document_mask: bool = True
    """Attention and positions restart at each document of a sample."""
    num_workers: int = 1
    """Threads that read ahead; 0: read when a batch is needed."""
    use_dataset_with_index: bool = True
    """Kept for old commands: pretraining always reads through the index."""
    packing: bool = True
    """SFT: several sequences share a row, unseen by each other. Off: one sequence a row, padded to the longest."""
    sft_loss: Literal["all", "last", "split"] = "all"
    """SFT: learn all answers of a conversation, only the last, or each in a sample of its own."""
    user_name: str = ""
    """Name of the user's role in raw records, in addition to the usual ones."""
    assistant_name: str = ""
    """Name of the assistant's role in raw records, in addition to the usual ones."""
    max_prompt_len: int = 0
    """DPO: most tokens of a prompt; 0: as many as the longer answer leaves, at least half of max_seq_len."""
    prompt_truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """DPO: the part of a too long prompt that is kept."""
    restart_data: bool = False
    """With --resume: accept other data, seed or max_seq_len, and begin the stream of samples anew."""
    resume_at_sample: int = 0
    """With --resume: skip the samples before this position of the stream, which made the loss non-finite."""
    verify_data: bool = False
    """Compare the tokens with their checksums before the first step. (SFT and DPO always do.)"""

    def check(self) -> None:
        """
        Raises:
            ValueError: a value that no data can be read with.
        """
        sizes = ("train_batch_size", "gradient_accumulation_steps", "valid_batch_size")
        require_positive(self, "max_seq_len", *sizes, "sample_tokens")
        require_not_negative(
            self, "valid_interval", "valid_iters", "num_workers", "max_prompt_len", "resume_at_sample", "sample_texts"
        )
        # Far more than anybody wants: a typing error, which would otherwise end in a crash.
        require_at_most(self, 1 << 24, *sizes)
        require_at_most(self, 1 << 30, "max_seq_len")
        require_at_most(self, 4096, "num_workers")
        if self.valid_ratio is not None:
            require_between(self, 0, 1, "valid_ratio")
        if not self.use_dataset_with_index:
            raise ValueError(
                "--use_dataset_with_index=False has no use here: pretraining always reads through the index"
            )


ONLY_WITH = (
    OnlyWith(
        ("data_dir",), lambda f: not (f["train_data_dir"] and f["valid_data_dir"]),
        "beside --train_data_dir and --valid_data_dir",
    ),
    OnlyWith(("sample_tokens", "sample_prompt"), lambda f: f["sample_texts"] > 0, "with --sample_texts=0"),
)  # fmt: skip
