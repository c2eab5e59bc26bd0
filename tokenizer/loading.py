"""Open a tokenizer folder, whatever its kind."""

import json
from pathlib import Path

from tokenizer.base import Tokenizer
from tokenizer.hf_bbpe import load_hf_bbpe
from tokenizer.sp_bbpe import KIND as SP_BBPE
from tokenizer.sp_bbpe import load_sp_bbpe

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
        config = _read_config(directory)
        if config is not None and config.get("kind") == SP_BBPE:
            return load_sp_bbpe(directory)
        return load_hf_bbpe(directory, config)
    except Exception as error:
        # The libraries raise whatever they like on a damaged file.
        raise ValueError(
            f"the tokenizer in {directory} cannot be used ({error}): train one with `{TRAIN_COMMAND}`"
        ) from error


def _read_config(directory: Path) -> dict | None:
    path = directory / "tokenizer_config.json"
    if not path.exists():
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path.name} holds no settings")
    return config
