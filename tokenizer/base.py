"""Interface of every tokenizer."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

END_OF_DOCUMENT, PAD = "<|endoftext|>", "<|pad|>"
MESSAGE_START, MESSAGE_SEPARATOR, MESSAGE_END = "<|im_start|>", "<|im_sep|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, PAD, MESSAGE_START, MESSAGE_SEPARATOR, MESSAGE_END)
"""Special tokens of the tokenizers trained here."""
MODEL_INPUT_NAMES = ["input_ids", "attention_mask"]
"""Names of the values that transformers' tokenizers shall return."""
GENERAL_CLASS = "PreTrainedTokenizerFast"
"""Class of transformers for tokenizers that need nothing besides their tokenizer.json."""
CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""File in which transformers looks for the chat template of a tokenizer folder."""
LARGEST_VOCAB_SIZE = 1 << 24
"""Limit far beyond what a model can use. The libraries' trainers do not refuse: they end the process for want of
memory."""

_REMEMBERED = 1_000_000
"""Characters of text whose ids are remembered."""


class Tokenizer(ABC):
    """Converter of text to ids and back. Special tokens enter a sequence by id only: text that spells one stays
    text."""

    special_ids: dict[str, int]
    """Special token -> id."""
    vocab_size: int
    """Number of entries, special tokens included: one more than the largest id."""
    eod_id: int
    """Id of the token that ends a document."""
    fingerprint: str
    """Hex sha256 of everything that decides the ids of a text."""
    class_name: str = GENERAL_CLASS
    """Name of its class in transformers."""
    chat_template: str | None = None
    """Program in Jinja, from the folder, that lays out a conversation; see chat_template.py."""
    _recent: tuple[dict[str, list[int]], int] = ({}, _REMEMBERED + 1)
    """Recently encoded texts -> their ids, and the number of their characters."""
    template_tokens: dict[str, str] = {}
    """Names that such a program may use: "bos_token", "eos_token" ... -> the token's text."""

    @property
    def pad_id(self) -> int:
        """Id that fills short rows; the end of a document where there is no token for padding."""
        return self.special_ids.get(PAD, self.eod_id)

    @property
    def begin_ids(self) -> list[int]:
        """Ids that Hugging Face's tokenizer of the same folder puts in front of a text, such as a model's BOS. There
        are none for the tokenizers trained here."""
        return []

    @property
    def run_ids(self) -> frozenset[int]:
        """Ids whose text depends on their whole run: bytes that become text together, or U+FFFD each if one of the run
        is wrong."""
        return frozenset()

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.encode_batch([text], num_threads=1)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        """Ids of several texts.

        Args:
            num_threads: threads to use; 0 for as many as there are cores.
        """

    def encode_pieces(
        self, pieces: Sequence[tuple[str, bool]], also: frozenset[str] = frozenset()
    ) -> tuple[list[int], list[int]]:
        """Ids of a text that a chat template laid out.

        Args:
            pieces: parts of the text, in order, as (text, whether the special tokens that it spells are meant as such).
                Parts that people wrote stay text.
            also: added tokens that count as special.
        Returns:
            The ids, and the number of them that end in each piece.
        """
        parts = self._parts(pieces, also)
        texts = iter(self._remembered([text for _, text, token_id in parts if token_id is None]))
        ids: list[int] = []
        counts = [0] * len(pieces)
        for number, _, token_id in parts:
            new = next(texts) if token_id is None else [token_id]
            ids += new
            counts[number] += len(new)
        return ids, counts

    def _remembered(self, texts: list[str]) -> list[list[int]]:
        """Ids of texts, as from encode_batch, remembered: every conversation repeats the roles, and every sample of a
        conversation its texts."""
        known, size = self._recent
        if size > _REMEMBERED:
            known, size = {}, 0
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, self.encode_batch(new, num_threads=1)))
        self._recent = known, size + sum(map(len, new))
        return [known[text] for text in texts]

    def _parts(self, pieces: Sequence[tuple[str, bool]], also: frozenset[str]) -> list[tuple[int, str, int | None]]:
        """Pieces cut at their special tokens, as (number of the piece, text, id if it is a special token)."""
        found: list[tuple[int, str, int | None]] = []
        ids = self.special_ids | {token: self.added_ids[token] for token in also} if also else self.special_ids
        pattern = self._pattern_of(also)
        for number, (text, has_tokens) in enumerate(pieces):
            for part in pattern.split(text) if has_tokens else [text]:
                if part:
                    found.append((number, part, ids.get(part) if has_tokens else None))
        return found

    def _pattern_of(self, also: frozenset[str]) -> re.Pattern[str]:
        """Pattern that matches special tokens and those of `also`."""
        if also not in self._patterns:
            self._patterns[also] = any_of([*self.special_ids, *also])
        return self._patterns[also]

    @cached_property
    def _patterns(self) -> dict[frozenset[str], re.Pattern[str]]:
        return {}

    @property
    def added_ids(self) -> dict[str, int]:
        """Added token -> id, for those that are neither special nor blank. Text may spell them out."""
        return {}

    @cached_property
    def _special_texts(self) -> dict[int, str]:
        return {token_id: text for text, token_id in self.special_ids.items()}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of some ids; invalid UTF-8 becomes U+FFFD."""
        parts: list[str] = []
        plain: list[int] = []
        special_texts = self._special_texts
        for token_id in ids:
            if token_id in special_texts:
                parts.append(self._decode_plain(plain))
                plain = []
                if not skip_special_tokens:
                    parts.append(special_texts[token_id])
            else:
                plain.append(token_id)
        return "".join([*parts, self._decode_plain(plain)])

    @abstractmethod
    def _decode_plain(self, ids: list[int]) -> str:
        """Text of some ids, none of which is special."""

    @abstractmethod
    def token_byte_lengths(self) -> list[int]:
        """Number of bytes of text that each id stands for, 0 for special tokens; for losses per byte of text."""

    @abstractmethod
    def with_tokens(self, tokens: Sequence[str]) -> "Tokenizer":
        """This tokenizer with ordinary added tokens, which have the next ids; see add_tokens.py for the checks."""

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that `load_tokenizer` and `transformers.AutoTokenizer.from_pretrained` read."""


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Pattern that matches any of some texts, in a group; the longest one where several match."""
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Context that turns a panic of a Rust library into an ordinary error. Some definitions and some texts cause one,
    and it comes as a BaseException, which nobody catches.

    Raises:
        ValueError: the library panicked.
    """
    try:
        yield
    except BaseException as error:
        # The class cannot be imported.
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"the tokenizers library panics: {error}") from None


def parsed(name: str, text: str) -> object:
    """Value of a JSON file.

    Args:
        name: name of the file in messages.
    Raises:
        ValueError: it is not JSON, or could not be written again.
    """
    try:
        value = json.loads(text)
        # JSON can spell half a surrogate pair, which no file can hold, so that a checkpoint could not be saved.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds text that is not valid Unicode") from None
    except RecursionError:
        raise ValueError(f"{name} is too deeply nested") from None
    except ValueError as error:
        raise ValueError(f"{name} is not valid JSON: {error}") from None
    return value


def hugging_face_config(special_tokens: Collection[str]) -> dict:
    """`tokenizer_config.json` of a tokenizer with these special tokens.

    It says that neither a token nor a blank stands in front of a text, since llama.cpp adds both for a SentencePiece
    model otherwise. It names the inputs of the model, since transformers 4 would add `token_type_ids`, which `generate`
    refuses for a llama.
    """
    pad = {"pad_token": PAD} if PAD in special_tokens else {}
    return {
        "tokenizer_class": GENERAL_CLASS,
        "eos_token": END_OF_DOCUMENT,
        **pad,
        "add_bos_token": False,
        "add_prefix_space": False,
        "model_input_names": MODEL_INPUT_NAMES,
        "additional_special_tokens": [t for t in special_tokens if t not in (END_OF_DOCUMENT, PAD)],
        "clean_up_tokenization_spaces": False,
    }


def readable_by_version_4(config: dict) -> dict:
    """A `tokenizer_config.json` of transformers 5, in words of the same meaning that version 4 knows, too."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = GENERAL_CLASS
        config.setdefault("model_input_names", MODEL_INPUT_NAMES)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
