"""Byte-level BPE on the `tokenizers` library, and any other byte-complete BPE in a Hugging Face folder.

`save_pretrained` writes a Hugging Face tokenizer: `AutoTokenizer.from_pretrained(folder)` gives the same ids for any
text without control strings. For text that spells one, such as "<|im_end|>", AutoTokenizer follows Hugging Face's
convention and returns the control id. This class encodes it as plain characters, so that no user text can forge a
control token. Special tokens enter a sequence by id only.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import pre_tokenizers, trainers

from tokenizer.base import (
    CHAT_TEMPLATE_NAME,
    GENERAL_CLASS,
    SPECIAL_TOKENS,
    Tokenizer,
    hugging_face_config,
    panics_as_errors,
    parsed,
    readable_by_version_4,
)
from tokenizer.hf_definition import (
    ADDED_TOKEN,
    BYTE_PIECES,
    as_used,
    begin_ids,
    byte_spelling,
    check_ids,
    control_pieces,
    end_of_document,
    named_tokens,
    plain_text_definition,
    template_in,
)
from tokenizer.long_words import LongWords
from tokenizer.split_pattern import own_split_options, split_pattern, untrained
from tokenizer.usual_layouts import JINJA
from tokenizer.word_cache import WordCache
from utils.files import atomic_write

_THREADS_THAT_BEAT_THE_CACHE = 4
_NAME_BEGINS = "\ufdd0"


class HFBBPETokenizer(Tokenizer):
    """Tokenizer of a `tokenizer.json`. In those trained here, the special tokens have the last ids."""

    def __init__(self, definition: str, config: dict | None = None, chat_template: str | None = None):
        """
        Args:
            definition: content of a `tokenizer.json`.
            config: content of its `tokenizer_config.json`, which names the end-of-document token; kept.
            chat_template: content of its `chat_template.jinja`; kept.
        Raises:
            ValueError: this class cannot represent a tokenizer of this kind.
        """
        self._definition = parsed("tokenizer.json", definition)
        self._config, self._chat_template = config, chat_template
        self.class_name = GENERAL_CLASS if config is None else readable_by_version_4(config).get("tokenizer_class", "")
        self.template_tokens = named_tokens(config or {})
        self._begin_ids = begin_ids(self._definition)
        self._spelling = byte_spelling(self._definition)
        self._used = as_used(self._definition, config or {})
        added = self._used["added_tokens"]
        pieces = control_pieces(self._definition, config or {})
        self.special_ids = {token["content"]: token["id"] for token in added if token["special"]} | pieces
        self.eod_id = self.special_ids[end_of_document(self.special_ids, config or {})]
        names = {token: f"special {token_id}" for token, token_id in self.special_ids.items()}
        plain = plain_text_definition(self._used, names)
        self._plain = LibraryTokenizer.from_str(json.dumps(plain))
        self._plain.encode_special_tokens = True
        ids = self._plain.get_vocab()
        check_ids(ids, plain, self.special_ids)
        own = own_split_options(plain)
        self._word_cache = WordCache(plain, split_pattern(*own), split_pattern(*own, ascii_only=True)) if own else None
        self.vocab_size = max(ids.values()) + 1
        parts = [self._used.get(k) for k in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")]
        facts = [parts, self.eod_id, *([pieces] if pieces else [])]
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def begin_ids(self) -> list[int]:
        return list(self._begin_ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        """Ids of several texts. The library takes its number of threads from RAYON_NUM_THREADS instead."""
        texts = list(texts)
        with panics_as_errors():
            if self._word_cache is None or not 1 <= num_threads < _THREADS_THAT_BEAT_THE_CACHE:
                return self._library_batch(texts)
            known = [self._word_cache.knows(text) for text in texts]
            cached = iter(self._word_cache.encode_batch([text for text, is_known in zip(texts, known) if is_known]))
            others = iter(self._library_batch([text for text, is_known in zip(texts, known) if not is_known]))
            return [next(cached if is_known else others) for is_known in known]

    @property
    def chat_template(self) -> str | None:
        """Program that lays out a conversation, see the base class.

        Raises:
            ValueError: the folder's chat template cannot be used.
        """
        return template_in(self._config or {}) if self._chat_template is None else self._chat_template

    def encode_pieces(
        self, pieces: Sequence[tuple[str, bool]], also: frozenset[str] = frozenset()
    ) -> tuple[list[int], list[int]]:
        """Ids of a laid-out text, see the base class. Unless people wrote special tokens, they are those that
        transformers gives the whole text.

        Raises:
            ValueError: a text that people wrote holds U+FDD0.
        """
        parts = self._parts(pieces, also)
        plain = [token_id is None for _, _, token_id in parts]
        # In a tokenizer made here, the ids between special tokens do not depend on the text around.
        if self._word_cache is not None and not any(plain[i] and plain[i - 1] for i in range(1, len(plain))):
            return super().encode_pieces(pieces, also)
        if any(_NAME_BEGINS in text for _, text, token_id in parts if token_id is None):
            raise ValueError("it holds U+FDD0, which Unicode keeps for programs")
        texts = [text if token_id is None else _layout_name(token_id) for _, text, token_id in parts]
        with panics_as_errors():
            encoding = self._of_layouts(also).encode("".join(texts), add_special_tokens=False)
        meant = set(self.special_ids.values()) | {self.added_ids[token] for token in also}
        if sum(token_id in meant for token_id in encoding.ids) != plain.count(False):
            raise ValueError("the tokenizer does not find its own special tokens within a text")
        ends, counts, place = list(accumulate(map(len, texts))), [0] * len(pieces), 0
        for begin, end in encoding.offsets:
            # (For a sign that the tokenizer puts in front of a text, both are 0.)
            while ends[place] < end or ends[place] <= begin:
                place += 1
            counts[parts[place][0]] += 1
        return encoding.ids, counts

    def _of_layouts(self, also: frozenset[str]) -> LibraryTokenizer:
        """Library tokenizer in which special tokens and those of `also` count as special, under names that nobody
        writes."""
        if also not in self._layouts:
            ids = self.special_ids | {token: self.added_ids[token] for token in also}
            names = {token: _layout_name(token_id) for token, token_id in ids.items()}
            definition = json.dumps(plain_text_definition(self._used, names))
            self._layouts[also] = LibraryTokenizer.from_str(definition)
        return self._layouts[also]

    @cached_property
    def _layouts(self) -> dict[frozenset[str], LibraryTokenizer]:
        return {}

    @cached_property
    def added_ids(self) -> dict[str, int]:
        added = self._used["added_tokens"]
        return {one["content"]: one["id"] for one in added if not one["special"] and one["content"].strip()}

    @cached_property
    def run_ids(self) -> frozenset[int]:
        if self._spelling == "byte level":
            return frozenset()
        vocab = self._definition["model"]["vocab"]
        return frozenset(vocab[piece] for piece in BYTE_PIECES if piece in vocab)

    def _library_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode_plain(self, ids: list[int]) -> str:
        parts: list[str] = []
        with panics_as_errors():
            for added, group in groupby(ids, self._added_texts.get):
                if added is None:
                    parts.append(self._plain.decode(list(group), skip_special_tokens=False))
                else:
                    parts += [added] * len(list(group))
        return "".join(parts)

    @cached_property
    def _added_texts(self) -> dict[int, str]:
        """Id -> text, for added tokens that are not special. The library would take their characters for the spelling
        of bytes: DeepSeek's "ü" for the byte 0xFC."""
        if self._spelling != "byte level":
            return {}
        return {token["id"]: token["content"] for token in self._used["added_tokens"] if not token["special"]}

    def token_byte_lengths(self) -> list[int]:
        lengths = [0] * self.vocab_size
        for token, token_id in self._definition["model"]["vocab"].items():
            if self._spelling == "byte level":
                # Each byte is spelt as one character.
                lengths[token_id] = len(token)
            else:
                lengths[token_id] = 1 if token in BYTE_PIECES else len(token.replace("▁", " ").encode("utf-8"))
        for token in self._used["added_tokens"]:
            lengths[token["id"]] = len(token["content"].encode("utf-8"))
        for token_id in self.special_ids.values():
            lengths[token_id] = 0
        return lengths

    def with_tokens(self, tokens: Sequence[str]) -> "HFBBPETokenizer":
        return HFBBPETokenizer(*self._parts_with(tokens), self._chat_template)

    def _parts_with(self, tokens: Sequence[str]) -> tuple[str, dict]:
        """Content of tokenizer.json and tokenizer_config.json with ordinary tokens added."""
        added = [ADDED_TOKEN | {"id": self.vocab_size + n, "content": token} for n, token in enumerate(tokens)]
        definition = self._definition | {"added_tokens": [*self._definition["added_tokens"], *added]}
        config = hugging_face_config(self.special_ids) if self._config is None else self._config
        listed = config.get("added_tokens_decoder")
        if isinstance(listed, dict):
            new = {str(one["id"]): {key: one[key] for key in one if key != "id"} for one in added}
            config = config | {"added_tokens_decoder": listed | new}
        return json.dumps(definition), config

    def save_pretrained(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = hugging_face_config(self.special_ids) if self._config is None else readable_by_version_4(self._config)
        atomic_write(directory / "tokenizer.json", json.dumps(self._definition, ensure_ascii=False).encode())
        atomic_write(directory / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False).encode())
        if self._chat_template is not None:
            atomic_write(directory / CHAT_TEMPLATE_NAME, self._chat_template.encode())


def _layout_name(token_id: int) -> str:
    """Name of a special token in a laid-out text, which nobody writes by accident."""
    return f"{_NAME_BEGINS}{token_id}\ufdd1"


def train_hf_bbpe(
    texts: Iterable[str],
    vocab_size: int,
    show_progress: bool = True,
    max_digits: int = 3,
    max_han: int = 0,
    long_words: LongWords | None = None,
) -> HFBBPETokenizer:
    """Train byte-level BPE (Sennrich et al., 2016, on bytes) with `vocab_size` entries, special tokens included.

    Args:
        max_digits, max_han: see `split_pattern`.
        long_words: counts the words that are cut for the training.
    Raises:
        ValueError: the vocabulary is too small, or the text is too little to fill it.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"--vocab_size must be at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    pattern = split_pattern(max_digits, max_han)
    tokenizer = untrained(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator((long_words or LongWords()).cut(texts, pattern), trainer)
    entries = tokenizer.get_vocab_size() + len(SPECIAL_TOKENS)
    if entries < vocab_size:
        raise ValueError(
            f"the corpus yields only {entries} entries: use more text or a smaller --vocab_size, at most {entries}"
        )
    # Added after training, so that they take the last ids and stay out of the merges.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return HFBBPETokenizer(tokenizer.to_str(), hugging_face_config(SPECIAL_TOKENS), JINJA)
