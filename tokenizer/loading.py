"""Open a tokenizer folder, whatever its kind."""

from pathlib import Path

from tokenizer.base import Tokenizer
from tokenizer.hf_bbpe import load_hf_bbpe
from tokenizer.sp_bbpe import is_sp_bbpe, load_sp_bbpe

TRAIN_COMMAND = "python -m tokenizer.train_tokenizer"


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load a tokenizer that was trained here, or any Hugging Face folder with a byte-complete BPE.

    Raises:
        ValueError: no tokenizer there, or not one of a kind that can be used.
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").exists():
        raise ValueError(
            f"{directory} holds no tokenizer.json: train one with "
            f"`{TRAIN_COMMAND} --data_dir D --output_dir {directory}`"
        )
    try:
        return load_sp_bbpe(directory) if is_sp_bbpe(directory) else load_hf_bbpe(directory)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"the tokenizer in {directory} cannot be used ({error}): train one with `{TRAIN_COMMAND}`"
        ) from None
