"""Open a tokenizer folder, whatever its kind, and whatever somebody put into it."""

from pathlib import Path
from typing import NoReturn

from tokenizer.base import CHAT_TEMPLATE_NAME, LARGEST_VOCAB_SIZE, Tokenizer, panics_as_errors, parsed
from tokenizer.conversion import NotConverted, advice, convert, files_to_convert, other_file
from tokenizer.hf_bbpe import HFBBPETokenizer
from tokenizer.sp_bbpe import KIND as SP_BBPE
from tokenizer.sp_bbpe import SPBBPETokenizer
from utils.paths import absent

TRAIN_COMMAND = "python -m tokenizer.train_tokenizer"
_LARGEST_FILE = 1 << 28
"""Bytes; the tokenizer of the largest vocabulary in use is a tenth of it."""
_POINTER = b"version https://git-lfs.github.com/spec/"
"""What a clone that was made without Git LFS has in the place of a large file begins with it."""
_PROBE = "Of 1234 words, é and 漢字 \U0001f9ea\n\n  if (x_1 != 'Y'):\tend"
"""Comes back from every tokenizer that loses nothing; normalised forms of Unicode leave it as it is."""


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a folder holds a tokenizer, of a kind that can be used or not."""
    directory = Path(directory)
    return (directory / "tokenizer.json").exists() or bool(files_to_convert(directory) or other_file(directory))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load a tokenizer that was trained here, or any Hugging Face folder with a byte-complete BPE.

    A folder without `tokenizer.json` is converted, see conversion.py; that takes seconds.

    Raises:
        ValueError: no tokenizer there, or not one of a kind that can be used; one sentence, whatever the files hold.
        OSError: a file cannot be read now (a failing disk).
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").exists() and not files_to_convert(directory):
        _refuse_without(directory)
    try:
        with panics_as_errors():
            tokenizer = _open(directory)
            _check_use(tokenizer)
            return tokenizer
    except (MemoryError, NotConverted):
        raise
    except Exception as error:
        # The libraries raise whatever they like on a damaged file. What the disk says is not about the file.
        if isinstance(error, OSError) and not isinstance(error, _NO_FILE):
            raise
        raise ValueError(
            f"the tokenizer in {directory} cannot be used ({_sentence(error)}): mend the folder, or train one with "
            f"`{TRAIN_COMMAND}`"
        ) from error


def _refuse_without(directory: Path) -> NoReturn:
    """
    Raises:
        ValueError: always; a folder without tokenizer.json, and without what could be made one.
    """
    if not directory.exists():
        raise ValueError(absent(directory, f"train a tokenizer with `{TRAIN_COMMAND} --data_dir D --output_dir T`"))
    if (other := other_file(directory)) is not None:
        raise ValueError(f"{directory} holds {other} but no tokenizer.json: {advice(directory)}")
    raise ValueError(
        f"{directory} holds no tokenizer.json: train one with `{TRAIN_COMMAND} --data_dir D --output_dir T`, or give "
        f"the folder of a model's own"
    )


_NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def _open(directory: Path) -> Tokenizer:
    config = None
    if (text := _read(directory / "tokenizer_config.json")) is not None:
        config = parsed("tokenizer_config.json", text)
        if not isinstance(config, dict):
            raise ValueError("tokenizer_config.json holds no settings")
        if config.get("kind") == SP_BBPE:
            return SPBBPETokenizer(_content(directory / "tokenizer.model"))
    config = _with_special_tokens_map(directory, config)
    definition = _read(directory / "tokenizer.json")
    if definition is None:
        for name in files_to_convert(directory):
            _content(directory / name)
        definition, config = convert(directory, config or {})
    return HFBBPETokenizer(definition, config, _read(directory / CHAT_TEMPLATE_NAME))


def _with_special_tokens_map(directory: Path, config: dict | None) -> dict | None:
    """The configuration with what older folders say in a file of its own; transformers takes it so, too."""
    text = _read(directory / "special_tokens_map.json")
    if text is None or "added_tokens_decoder" in (config or {}):
        return config
    named = parsed("special_tokens_map.json", text)
    if not isinstance(named, dict):
        raise ValueError("special_tokens_map.json names no tokens")
    return (config or {}) | {name: _as_in_config(value) for name, value in named.items()}


def _as_in_config(value: object) -> object:
    """A token of a special_tokens_map.json as a tokenizer_config.json spells it: there, transformers refuses one that
    does not say what it is."""
    if isinstance(value, list):
        return [_as_in_config(one) for one in value]
    return {"__type": "AddedToken"} | value if isinstance(value, dict) and "content" in value else value


def _content(path: Path) -> bytes:
    """Of a file that is not beyond measure."""
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path.name} is larger than {_LARGEST_FILE >> 20} MiB")
    content = path.read_bytes()
    if content.startswith(_POINTER):
        raise ValueError(f"{path.name} is a pointer of Git LFS, run `git lfs pull` in its folder")
    return content


def _read(path: Path) -> str | None:
    """Text of a file; None if there is none."""
    if not path.exists():
        return None
    try:
        return _content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _check_use(tokenizer: Tokenizer) -> None:
    """Try it out.

    Raises:
        ValueError: a text does not come back, or its ids are beyond measure.
    """
    if tokenizer.vocab_size > LARGEST_VOCAB_SIZE:
        raise ValueError(f"its largest id is {tokenizer.vocab_size - 1}, and {LARGEST_VOCAB_SIZE} entries are the most")
    back = tokenizer.decode(tokenizer.encode(_PROBE))
    # Some put a blank in front.
    if back.removeprefix(" ") != _PROBE:
        raise ValueError(f"it does not give back what was written: {_PROBE!r} becomes {back[:100]!r}")


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OSError):
        return f"{Path(error.filename or '').name}: {error.strerror}"
    if isinstance(error, LookupError | TypeError | AttributeError):
        return f"tokenizer.json is not laid out as one, {type(error).__name__}: {text}"
    return text or type(error).__name__
