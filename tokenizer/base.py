"""What every tokenizer offers."""

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
"""Of the tokenizers trained here."""
MODEL_INPUT_NAMES = ["input_ids", "attention_mask"]
"""What transformers' tokenizers are to return."""
GENERAL_CLASS = "PreTrainedTokenizerFast"
"""Of transformers, for tokenizers that are as their tokenizer.json says."""
CHAT_TEMPLATE_NAME = "chat_template.jinja"
"""Where transformers looks for the template of a tokenizer folder."""
LARGEST_VOCAB_SIZE = 1 << 24
"""Far beyond what a model can use; the libraries' trainers end the process for want of memory instead of refusing."""


_REMEMBERED = 1_000_000
"""Characters of text whose ids are kept at hand."""


class Tokenizer(ABC):
    """Text to ids and back. Special tokens enter a sequence by id only: text that spells one out stays text."""

    special_ids: dict[str, int]
    """Special token -> id."""
    vocab_size: int
    """Entries, special tokens included: one more than the largest id."""
    eod_id: int
    """Id of the token that ends a document."""
    fingerprint: str
    """Hex sha256 of all that decides which ids a text gets."""
    class_name: str = GENERAL_CLASS
    """What transformers calls it."""
    chat_template: str | None = None
    """The folder's own program that lays out a conversation, in Jinja; see chat_template.py."""
    _recent: tuple[dict[str, list[int]], int] = ({}, _REMEMBERED + 1)
    """Texts that were encoded lately -> their ids, and how many characters that is."""
    template_tokens: dict[str, str] = {}
    """What such a program may write by name: "bos_token", "eos_token" ... -> the token's text."""

    @property
    def pad_id(self) -> int:
        """Fills short rows; the end of a document where there is no token of its own."""
        return self.special_ids.get(PAD, self.eod_id)

    @property
    def begin_ids(self) -> list[int]:
        """Ids that Hugging Face's tokenizer of the same folder puts in front of a text, such as a model's BOS; the
        tokenizers trained here put none."""
        return []

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without special tokens."""
        return self.encode_batch([text], num_threads=1)[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        """Ids of several texts. `num_threads`: 0 for as many as there are cores."""

    def encode_pieces(
        self, pieces: Sequence[tuple[str, bool]], also: frozenset[str] = frozenset()
    ) -> tuple[list[int], list[int]]:
        """Ids of a text that a chat template laid out.

        Args:
            pieces: its parts in their order: (text, whether special tokens that it spells out are meant as such). The
                others are what people wrote, which stays text.
            also: added tokens that count as special ones.
        Returns:
            The ids, and how many of them end in each piece.
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
        """As encode_batch. Roles come again in every conversation, and texts in every sample of one."""
        known, size = self._recent
        if size > _REMEMBERED:
            known, size = {}, 0
        new = [text for text in dict.fromkeys(texts) if text not in known]
        known.update(zip(new, self.encode_batch(new, num_threads=1)))
        self._recent = known, size + sum(map(len, new))
        return [known[text] for text in texts]

    def _parts(self, pieces: Sequence[tuple[str, bool]], also: frozenset[str]) -> list[tuple[int, str, int | None]]:
        """Pieces cut at the special tokens that are meant: (number of the piece, text, id of a special token)."""
        found: list[tuple[int, str, int | None]] = []
        ids = self.special_ids | {token: self.added_ids[token] for token in also} if also else self.special_ids
        pattern = self._pattern_of(also)
        for number, (text, has_tokens) in enumerate(pieces):
            for part in pattern.split(text) if has_tokens else [text]:
                if part:
                    found.append((number, part, ids.get(part) if has_tokens else None))
        return found

    def _pattern_of(self, also: frozenset[str]) -> re.Pattern[str]:
        """Matches special tokens, and those of `also`."""
        if also not in self._patterns:
            self._patterns[also] = any_of([*self.special_ids, *also])
        return self._patterns[also]

    @cached_property
    def _patterns(self) -> dict[frozenset[str], re.Pattern[str]]:
        return {}

    @property
    def added_ids(self) -> dict[str, int]:
        """Added tokens that are no special ones, nor blanks, and that text may spell out -> id."""
        return {}

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        special_texts = {token_id: text for text, token_id in self.special_ids.items()}
        parts: list[str] = []
        plain: list[int] = []
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
        """Text of ids that are no special tokens."""

    @abstractmethod
    def token_byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for special tokens. For losses per byte of text."""

    @abstractmethod
    def save_pretrained(self, directory: str | Path) -> None:
        """Write a folder that `load_tokenizer` and `transformers.AutoTokenizer.from_pretrained` read."""


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches each of some texts, in a group; the longest where several begin at the same place."""
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Make an error of a panic in a library that is written in Rust: it comes as a BaseException, which nobody catches,
    for some definitions and for some texts.

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
    """The value of a JSON file.

    Args:
        name: of the file, for the sentence.
    Raises:
        ValueError: it is none, or could not be written again.
    """
    try:
        value = json.loads(text)
        # JSON can spell half a surrogate pair, which no file can hold: a checkpoint could not be saved.
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

    Nothing stands in front of a text, neither a token nor a blank: that is said for llama.cpp, which adds both to the
    texts of a SentencePiece model otherwise. And transformers 4 would add `token_type_ids` to what a tokenizer of this
    class returns, which `generate` refuses for a llama.
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
    """A `tokenizer_config.json` of transformers 5 in words that mean the same, and that version 4 knows, too."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = GENERAL_CLASS
        config.setdefault("model_input_names", MODEL_INPUT_NAMES)
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
