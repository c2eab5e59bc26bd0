"""Folders older than `tokenizer.json`: transformers' own converters make one from their files, in memory.

There are two kinds: `tokenizer.model`, a SentencePiece model (Llama 2, Yi, InternLM, Baichuan), and `vocab.json` with
`merges.txt`, byte-level BPE (GPT-2, Qwen). A SentencePiece model itself says how it treats text. It is converted by
that, whatever class the folder names: for a text that begins with a blank, transformers 5's LlamaTokenizer gives other
ids than SentencePiece, llama.cpp and transformers 4. Byte-level BPE does not say how it splits text into words, so the
folder must name a class that knows.
"""

import importlib.util
import json
import tempfile
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from tokenizer.base import MODEL_INPUT_NAMES
from tokenizer.known_classes import completed, known_class, settings_of
from tokenizer.sp_foreign import DECIDED_BY, MODEL, has_equal_scores

SENTENCE_PIECE, BYTE_LEVEL = MODEL, ("vocab.json", "merges.txt")
_OTHERS = (
    "tekken.json", "tiktoken.model", "*.tiktoken", "tokenizer.model.v*", "spiece.model", "sentencepiece.bpe.model",
    "ice_text.model", "vocab.txt", *BYTE_LEVEL,
)  # fmt: skip
"""Patterns of the files of other tokenizers."""
_OF_OTHER_FILES = ("auto_map", "vocab_file", "merges_file", "tokenizer_file", "sp_model_kwargs")
"""Keys of a `tokenizer_config.json` for files that a folder with a `tokenizer.json` does not need."""
_HERE = {"local_files_only": True, "trust_remote_code": False}
_PROBES = ("Of 1234 words, é and 漢字 \U0001f9ea\n\n  if (x_1 != 'Y'):\tend", "x", " the  end ", "\nнет 天地\r\n")


class NotConverted(ValueError):
    """Sentence on a folder that transformers cannot convert here, with advice."""


def files_to_convert(directory: Path) -> list[str]:
    """Names of the files from which a tokenizer can be made; empty if there are none."""
    if (directory / SENTENCE_PIECE).exists():
        return [SENTENCE_PIECE]
    return list(BYTE_LEVEL) if all((directory / name).exists() for name in BYTE_LEVEL) else []


def other_file(directory: Path) -> str | None:
    """Name of a file that belongs to another kind of tokenizer; None if there is none."""
    found = sorted(path.name for pattern in _OTHERS for path in directory.glob(pattern))
    return found[0] if found else None


def advice(directory: Path) -> str:
    """Advice on converting a folder elsewhere."""
    return (
        f'convert it with `AutoTokenizer.from_pretrained("{directory}").save_pretrained("D")` of transformers, in an '
        f"environment in which that works, and give D"
    )


def convert(directory: Path, config: dict) -> tuple[str, dict]:
    """`tokenizer.json` and `tokenizer_config.json` of a folder that has files_to_convert.

    Args:
        config: content of its tokenizer_config.json.
    Raises:
        NotConverted: transformers cannot convert it, or would give other ids; one sentence.
        OSError: a file cannot be read now.
    """
    try:
        return _converted(directory, config)
    except MemoryError:
        raise
    except Exception as error:
        # transformers raises any exception; OSError if it finds no tokenizer, but only the disk's OSError has a number.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        what = " and ".join(files_to_convert(directory))
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise NotConverted(
            f"{directory} holds {what} but no tokenizer.json, and cannot be converted here ({why}): {advice(directory)}"
        ) from error


def _converted(directory: Path, config: dict) -> tuple[str, dict]:
    """Result of convert; any exception may escape."""
    processor = _processor(directory / SENTENCE_PIECE) if (directory / SENTENCE_PIECE).exists() else None
    if processor is None:
        made = _of_byte_level(directory)
        known = known_class(directory, config, made.get_vocab())
    else:
        vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
        known = known_class(directory, config, vocab)
        made = _of_sentence_piece(directory, config, processor) if known is None else _of_bare_model(processor)
    kept = {key: value for key, value in config.items() if key not in _OF_OTHER_FILES}
    named = {key: str(token) for key, token in made.special_tokens_map.items() if key.endswith("_token")}
    # With this class, transformers 4 and 5 take the tokenizer.json as it is.
    own = {"tokenizer_class": "PreTrainedTokenizerFast", **named}
    unless_said = {"clean_up_tokenization_spaces": False, "model_input_names": MODEL_INPUT_NAMES}
    definition, settings = json.loads(made.backend_tokenizer.to_str()), {**unless_said, **kept, **own}
    decides = False
    if processor is not None and (known is not None or not _contradicts(config, processor)):
        # Control tokens that are pieces have no place there: the model finds them in any text.
        decides = has_equal_scores(processor, definition) and not (known and known.controls)
        if not decides:
            _compare(made, processor)
    if known is not None:
        if processor is not None:
            definition, settings = completed(known, directory, definition, settings)
        settings |= settings_of(known, directory, entries(definition), settings)
    if decides:
        settings[DECIDED_BY] = SENTENCE_PIECE
    return json.dumps(definition, ensure_ascii=False), settings


def entries(definition: dict) -> dict[str, int]:
    """Entries of a tokenizer.json -> their ids, added tokens included."""
    return definition["model"]["vocab"] | {token["content"]: token["id"] for token in definition["added_tokens"]}


def _of_sentence_piece(directory: Path, config: dict, processor: SentencePieceProcessor):
    """transformers' tokenizer of a folder with a `tokenizer.model`."""
    # Imported here: it takes seconds, and few folders need it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if _contradicts(config, processor):
        # The folder's class knows how to do that.
        return AutoTokenizer.from_pretrained(str(directory), **_HERE)
    # As Llama 2's own tokenizer.json, whatever its configuration says: otherwise a text would lose the blank at its
    # beginning.
    return PreTrainedTokenizerFast.from_pretrained(str(directory), legacy=True, **_HERE)


def _contradicts(config: dict, processor: SentencePieceProcessor) -> bool:
    """Whether a folder says otherwise than its model whether a text gets a blank in front."""
    begins_with_blank = processor.encode("x", out_type=str)[0].startswith("▁")
    return config.get("add_prefix_space") not in (None, begins_with_blank)


def _of_bare_model(processor: SentencePieceProcessor):
    """transformers' tokenizer of a SentencePiece model by itself, whatever else its folder holds."""
    from transformers import PreTrainedTokenizerFast

    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / SENTENCE_PIECE).write_bytes(processor.serialized_model_proto())
        return PreTrainedTokenizerFast.from_pretrained(alone, **_HERE)


def _compare(made, processor: SentencePieceProcessor) -> None:
    """Compare transformers' tokenizer with the model that it was made of.

    Raises:
        ValueError: it gives other ids.
    """
    for text in _PROBES:
        if made.encode(text, add_special_tokens=False) != processor.encode(text):
            raise ValueError(f"transformers makes a tokenizer of it that gives {text!r} other ids than SentencePiece")


def _of_byte_level(directory: Path):
    """transformers' tokenizer of a `vocab.json` and `merges.txt`."""
    from transformers import AutoTokenizer

    try:
        made = AutoTokenizer.from_pretrained(str(directory), **_HERE)
    except ValueError as error:
        if "instantiate the backend" not in str(error):
            raise
        raise ValueError(
            "tokenizer_config.json names no tokenizer_class that says how they split a text, such as GPT2Tokenizer or "
            "Qwen2Tokenizer"
        ) from None
    vocab = json.loads((directory / BYTE_LEVEL[0]).read_text("utf-8"))
    if not vocab or not isinstance(vocab, dict) or not vocab.keys() <= made.get_vocab().keys():
        raise ValueError("the class that its tokenizer_config.json names does not read its vocab.json")
    return made


def _processor(path: Path) -> SentencePieceProcessor:
    """SentencePiece model of a file.

    Raises:
        ValueError: the file is not such a model, or cannot be read here.
    """
    try:
        processor = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise ValueError("it is not a SentencePiece model, or it is damaged") from None
    if importlib.util.find_spec("google") is None or importlib.util.find_spec("google.protobuf") is None:
        raise ValueError("reading it takes a package that is not installed: `pip install protobuf`")
    return processor
