"""Options of the data. Plain data: importing this loads no torch."""

from dataclasses import dataclass
from typing import Literal

from utils.ranges import require_at_most, require_between, require_not_negative, require_positive


@dataclass(frozen=True)
class DataConfig:
    """Data."""

    data_dir: str = ""
    """Pretokenized directory with train and valid shards; for sft and dpo also one with raw records."""
    train_data_dir: str = ""
    """Overrides data_dir for training."""
    valid_data_dir: str = ""
    """Overrides data_dir for validation."""
    tokenizer_dir: str = ""
    """Tokenizer of the data; default: the one beside the shards."""
    max_seq_len: int = 1024
    """Tokens in a sample; left out: what the data was prepared for, or no more than the weights were trained with."""
    train_batch_size: int = 8
    """Samples in a micro-batch; SFT and DPO: where neither this nor the next is given, both fit the data."""
    gradient_accumulation_steps: int = 8
    """Micro-batches in a step over all ranks together; a multiple of the number of ranks."""
    valid_interval: int = 0
    """Steps between validations; 0 validates at the end only."""
    valid_batch_size: int = 8
    """Samples in a validation batch."""
    valid_iters: int = 0
    """Validation batches over all ranks together; 0 takes the whole set."""
    sample_texts: int = 2
    """Texts that the model writes after each validation, for the log; 0: none."""
    sample_tokens: int = 48
    """Tokens of each, at most."""
    sample_prompt: str = ""
    """What they begin with; default: beginnings from the validation set."""
    valid_ratio: float | None = None
    """Share held out of raw records (default: none); else only checked, as it is fixed when data is pretokenized."""
    document_mask: bool = True
    """Attention and positions restart at each document of a sample."""
    num_workers: int = 1
    """Threads that read ahead; 0 reads when a batch is needed."""
    use_dataset_with_index: bool = True
    """Kept for old commands: pretraining always reads through the index."""
    packing: bool = True
    """SFT: several sequences share a row, each by itself; off: a row is one sequence, padded as the batch needs."""
    sft_loss: Literal["all", "last", "split"] = "all"
    """SFT: learn all answers of a conversation, the last one, or each in a sample of its own."""
    user_name: str = ""
    """What raw records call the user, beside the usual names."""
    assistant_name: str = ""
    """What raw records call the assistant, beside the usual names."""
    max_prompt_len: int = 0
    """DPO: longest prompt in tokens; 0 takes what the longer answer leaves, at least half of max_seq_len."""
    prompt_truncation_mode: Literal["keep_end", "keep_start"] = "keep_end"
    """DPO: which part of a prompt that is too long stays."""
    restart_data: bool = False
    """On --resume: accept other data, seed or max_seq_len, and start its stream anew."""
    resume_at_sample: int = 0
    """On --resume: leave out the samples before this position of the stream, which made the loss non-finite."""
    verify_data: bool = False
    """Compare the tokens with their checksums before the first step (SFT and DPO: always done)."""

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
        # Far more than anybody wants: a slip of the hand, which would end in a crash.
        require_at_most(self, 1 << 24, *sizes)
        require_at_most(self, 1 << 30, "max_seq_len")
        require_at_most(self, 4096, "num_workers")
        if self.valid_ratio is not None:
            require_between(self, 0, 1, "valid_ratio")
        if not self.use_dataset_with_index:
            raise ValueError(
                "--use_dataset_with_index=False has no use here: pretraining always reads through the index"
            )
