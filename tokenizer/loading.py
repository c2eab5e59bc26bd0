"""Opening a tokenizer folder, whatever its kind and whatever it holds."""

from pathlib import Path
from typing import NoReturn

from tokenizer.base import CHAT_TEMPLATE_NAME, LARGEST_VOCAB_SIZE, Tokenizer, panics_as_errors, parsed
from tokenizer.conversion import NotConverted, advice, convert, entries, files_to_convert, other_file
from tokenizer.hf_bbpe import HFBBPETokenizer
from tokenizer.known_classes import is_named, known_class, settings_of
from tokenizer.sp_bbpe import KIND as SP_BBPE
from tokenizer.sp_bbpe import SPBBPETokenizer
from tokenizer.sp_foreign import DECIDED_BY, MODEL, ForeignSPTokenizer
from utils.paths import absent

TRAIN_COMMAND = "python -m tokenizer.train_tokenizer"
_LARGEST_FILE = 1 << 28
"""Bytes of the largest file that is read; the tokenizer with the largest vocabulary in use has a tenth of that."""
_POINTER = b"version https://git-lfs.github.com/spec/"
"""Beginning of the small file that a clone without Git LFS has in place of a large one."""
_PROBE = "Of 1234 words, é and 漢字 \U0001f9ea\n\n  if (x_1 != 'Y'):\tend"
"""Text that comes back from every tokenizer that loses nothing. Normal forms of Unicode leave it unchanged."""


def has_tokenizer(directory: str | Path) -> bool:
    """Whether a folder holds a tokenizer, usable or not."""
    directory = Path(directory)
    return (directory / "tokenizer.json").exists() or bool(files_to_convert(directory) or other_file(directory))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Load a tokenizer that was trained here, or any Hugging Face folder with a byte-complete BPE.

    A folder without `tokenizer.json` is converted, see conversion.py; that takes seconds.

    Raises:
        ValueError: there is no tokenizer, or it cannot be used; one sentence, whatever the files hold.
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
        # On a damaged file, the libraries raise any exception. An error of the disk does not concern the content.
        if isinstance(error, OSError) and not isinstance(error, _NO_FILE):
            raise
        raise ValueError(
            f"the tokenizer in {directory} cannot be used ({_sentence(error)}): mend the folder, or train one with "
            f"`{TRAIN_COMMAND}`"
        ) from error


def _refuse_without(directory: Path) -> NoReturn:
    """Refuse a folder that holds neither a tokenizer.json nor the files to make one from.

    Raises:
        ValueError: always.
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
    elif is_named(directory, config or {}):
        config = _with_known_settings(directory, definition, config or {})
    template = _read(directory / CHAT_TEMPLATE_NAME)
    if config is not None and config.get(DECIDED_BY) == MODEL:
        return ForeignSPTokenizer(definition, config, template, _content(directory / MODEL))
    return HFBBPETokenizer(definition, config, template)


def _with_known_settings(directory: Path, definition: str, config: dict) -> dict:
    """The configuration with what the code of a class adds that is known here."""
    vocab = entries(parsed("tokenizer.json", definition))
    known = known_class(directory, config, vocab)
    return config if known is None else config | settings_of(known, directory, vocab, config)


def _with_special_tokens_map(directory: Path, config: dict | None) -> dict | None:
    """The configuration together with the special tokens that older folders keep in a separate file, as transformers
    reads it."""
    text = _read(directory / "special_tokens_map.json")
    if text is None or "added_tokens_decoder" in (config or {}):
        return config
    named = parsed("special_tokens_map.json", text)
    if not isinstance(named, dict):
        raise ValueError("special_tokens_map.json names no tokens")
    return (config or {}) | {name: _as_in_config(value) for name, value in named.items()}


def _as_in_config(value: object) -> object:
    """A token of a special_tokens_map.json in the spelling of a tokenizer_config.json, where transformers refuses an
    object without its type."""
    if isinstance(value, list):
        return [_as_in_config(one) for one in value]
    return {"__type": "AddedToken"} | value if isinstance(value, dict) and "content" in value else value


def _content(path: Path) -> bytes:
    """Content of a file, unless it is too large."""
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path.name} is larger than {_LARGEST_FILE >> 20} MiB")
    content = path.read_bytes()
    if content.startswith(_POINTER):
        raise ValueError(f"{path.name} is a pointer of Git LFS, run `git lfs pull` in its folder")
    return content


def _read(path: Path) -> str | None:
    """Text of a file; None if there is no such file."""
    if not path.exists():
        return None
    try:
        return _content(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _check_use(tokenizer: Tokenizer) -> None:
    """Try a tokenizer out.

    Raises:
        ValueError: a text does not come back, or the ids are too large.
    """
    if tokenizer.vocab_size > LARGEST_VOCAB_SIZE:
        raise ValueError(f"its largest id is {tokenizer.vocab_size - 1}, and {LARGEST_VOCAB_SIZE} entries are the most")
    back = tokenizer.decode(tokenizer.encode(_PROBE))
    # Some tokenizers put a blank in front.
    if back.removeprefix(" ") != _PROBE:
        raise ValueError(f"it does not give back what was written: {_PROBE!r} becomes {back[:100]!r}")


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    if isinstance(error, OSError):
        return f"{Path(error.filename or '').name}: {error.strerror}"
    if isinstance(error, LookupError | TypeError | AttributeError):
        return f"tokenizer.json is not laid out as one, {type(error).__name__}: {text}"
    return text or type(error).__name__
