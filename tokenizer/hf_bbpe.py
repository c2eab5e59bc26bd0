"""Byte-level BPE on the `tokenizers` library; also any other byte-complete BPE in a Hugging Face folder.

The folder that `save_pretrained` writes is a Hugging Face tokenizer: `AutoTokenizer.from_pretrained(folder)` gives the
same ids for any text without control strings. For text that spells one out, such as "<|im_end|>", AutoTokenizer
follows Hugging Face's convention and returns the control id; this class encodes it as the plain characters it is, so
that no user text can forge a control token. Special tokens enter a sequence by id only.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache, cached_property
from itertools import accumulate, compress, groupby, takewhile
from pathlib import Path

from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as LibraryTokenizer

from tokenizer.base import (
    CHAT_TEMPLATE_NAME,
    END_OF_DOCUMENT,
    GENERAL_CLASS,
    SPECIAL_TOKENS,
    Tokenizer,
    hugging_face_config,
    panics_as_errors,
    parsed,
    readable_by_version_4,
)
from tokenizer.chat_template import JINJA
from tokenizer.long_words import LongWords
from tokenizer.word_cache import WordCache
from utils.files import atomic_write

_THREADS_THAT_BEAT_THE_CACHE = 4
_NAME_BEGINS = "\ufdd0"
_MOST_GAPS = 1024
"""Ids without a token, besides as many as have one."""
_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_NEEDED_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(0xF5) if byte not in (0xC0, 0xC1))
"""UTF-8 has none of the other bytes, and some tokenizers leave them out."""


_FORM_OF_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_SPLIT_BYTE_PIECE = {
    "type": "Split", "pattern": {"Regex": r"\A<(?=0x[0-9A-F]{2}>\z)"}, "behavior": "Isolated", "invert": False
}  # fmt: skip
"""Keeps the text "<0x41>" from being taken for the byte of this name, where a word that is an entry is taken whole."""


def split_pattern(max_digits: int = 3, max_han: int = 0, ascii_only: bool = False) -> str:
    """The regular expression whose matches are merged each by itself, after the scheme of GPT-2 (Radford et al., 2019)
    with the changes for code of later models.

    Words with at most one leading character that is none of a word; digits in groups; punctuation with its line ends;
    line ends with the blanks before them; blanks, of which the last stays with the word that follows.

    Args:
        max_digits: of a group.
        max_han: Chinese characters of a group, apart from other letters; 0 for words of any letters and any length.
        ascii_only: what it comes to in a text of ASCII characters, for engines that know no Unicode properties.
    """
    letter, mark, digit = ("A-Za-z", "", "0-9") if ascii_only else (r"\p{L}", r"\p{M}", r"\p{N}")
    han = ""
    word = rf"[{letter}{mark}]+"
    if max_han and not ascii_only:
        han = rf"\p{{Han}}{{1,{max_han}}}|"
        word = rf"[{letter}{mark}&&[^\p{{Han}}]]+"
    return (
        rf"{han}[^\r\n{letter}{digit}]?{word}|[{digit}]{{1,{max_digits}}}| ?[^\s{letter}{digit}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )


class HFBBPETokenizer(Tokenizer):
    """A `tokenizer.json`. Of the tokenizers trained here the special tokens have the last ids."""

    def __init__(self, definition: str, config: dict | None = None, chat_template: str | None = None):
        """
        Args:
            definition: content of a `tokenizer.json`.
            config: content of its `tokenizer_config.json`; kept, and asked for the end-of-document token.
            chat_template: content of its `chat_template.jinja`; kept.
        Raises:
            ValueError: of a kind that this class cannot stand for.
        """
        self._definition = parsed("tokenizer.json", definition)
        self._config, self._chat_template = config, chat_template
        self.class_name = GENERAL_CLASS if config is None else readable_by_version_4(config).get("tokenizer_class", "")
        self.template_tokens = _named_tokens(config or {})
        self._begin_ids = _begin_ids(self._definition)
        self._spelling = _byte_spelling(self._definition)
        self._used = _as_used(self._definition, config or {})
        added = self._used["added_tokens"]
        self.special_ids = {token["content"]: token["id"] for token in added if token["special"]}
        self.eod_id = self.special_ids[_end_of_document(self.special_ids, config or {})]
        names = {token: f"special {token_id}" for token, token_id in self.special_ids.items()}
        plain = _plain_text_definition(self._used, names)
        self._plain = LibraryTokenizer.from_str(json.dumps(plain))
        self._plain.encode_special_tokens = True
        ids = self._plain.get_vocab()
        _check_ids(ids, plain, self.special_ids)
        own = _own_split_options(plain)
        self._word_cache = WordCache(plain, split_pattern(*own), split_pattern(*own, ascii_only=True)) if own else None
        self.vocab_size = max(ids.values()) + 1
        parts = [self._used.get(k) for k in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")]
        self.fingerprint = hashlib.sha256(json.dumps([parts, self.eod_id], sort_keys=True).encode()).hexdigest()

    @property
    def begin_ids(self) -> list[int]:
        return list(self._begin_ids)

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        """See the base class; the library takes its number of threads from RAYON_NUM_THREADS instead."""
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
        """See the base class.

        Raises:
            ValueError: the folder names none that could be taken.
        """
        return _template_in(self._config or {}) if self._chat_template is None else self._chat_template

    def encode_pieces(
        self, pieces: Sequence[tuple[str, bool]], also: frozenset[str] = frozenset()
    ) -> tuple[list[int], list[int]]:
        """See the base class; ids are those that transformers gives the whole text, unless people wrote special tokens.

        Raises:
            ValueError: what people wrote holds U+FDD0.
        """
        parts = self._parts(pieces, also)
        plain = [token_id is None for _, _, token_id in parts]
        # Between special tokens a tokenizer made here knows nothing of what is around.
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
            # (Of a sign that the tokenizer puts in front of a text, both are 0.)
            while ends[place] < end or ends[place] <= begin:
                place += 1
            counts[parts[place][0]] += 1
        return encoding.ids, counts

    def _of_layouts(self, also: frozenset[str]) -> LibraryTokenizer:
        """As `_plain`, but special tokens are such, and so are those of `also`, under names that nobody writes."""
        if also not in self._layouts:
            ids = self.special_ids | {token: self.added_ids[token] for token in also}
            names = {token: _layout_name(token_id) for token, token_id in ids.items()}
            definition = json.dumps(_plain_text_definition(self._used, names))
            self._layouts[also] = LibraryTokenizer.from_str(definition)
        return self._layouts[also]

    @cached_property
    def _layouts(self) -> dict[frozenset[str], LibraryTokenizer]:
        return {}

    @cached_property
    def added_ids(self) -> dict[str, int]:
        added = self._used["added_tokens"]
        return {one["content"]: one["id"] for one in added if not one["special"] and one["content"].strip()}

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
        """Id -> text of the added tokens that are no special ones. The library would take their characters for the
        spelling of bytes: DeepSeek's "ü" for the byte 0xFC."""
        if self._spelling != "byte level":
            return {}
        return {token["id"]: token["content"] for token in self._used["added_tokens"] if not token["special"]}

    def token_byte_lengths(self) -> list[int]:
        lengths = [0] * self.vocab_size
        for token, token_id in self._definition["model"]["vocab"].items():
            if self._spelling == "byte level":
                # Every byte is spelt as one character.
                lengths[token_id] = len(token)
            else:
                lengths[token_id] = 1 if token in _BYTE_PIECES else len(token.replace("▁", " ").encode("utf-8"))
        for token in self._used["added_tokens"]:
            lengths[token["id"]] = 0 if token["special"] else len(token["content"].encode("utf-8"))
        return lengths

    def save_pretrained(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = hugging_face_config(self.special_ids) if self._config is None else readable_by_version_4(self._config)
        atomic_write(directory / "tokenizer.json", json.dumps(self._definition, ensure_ascii=False).encode())
        atomic_write(directory / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False).encode())
        if self._chat_template is not None:
            atomic_write(directory / CHAT_TEMPLATE_NAME, self._chat_template.encode())


def _byte_spelling(definition: object) -> str:
    """How a `tokenizer.json` spells bytes: "byte level", or "byte pieces" for what it does not know.

    Raises:
        ValueError: it is no BPE, or some texts have no ids under it.
    """
    model = definition.get("model") if isinstance(definition, dict) else None
    # The oldest files, such as GPT-2's own, don't name the type.
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or "merges" not in model:
        raise ValueError("only BPE can be used")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise ValueError("it marks the parts of words, so texts would not come back")
    if not isinstance(definition.get("added_tokens"), list):
        raise ValueError("it has no list of added tokens")
    vocab = set(model["vocab"])
    steps = json.dumps([definition.get("normalizer"), definition.get("pre_tokenizer")])
    if '"ByteLevel"' in steps and _needed_byte_characters() <= vocab:
        return "byte level"
    if model.get("byte_fallback") and _NEEDED_BYTE_PIECES <= vocab:
        return "byte pieces"
    raise ValueError("it is neither byte-level nor falls back to bytes, so some texts would be lost")


@cache
def _needed_byte_characters() -> frozenset[str]:
    """How byte-level BPE spells the bytes that a text can have, see _NEEDED_BYTE_PIECES."""
    # Every first byte of UTF-8, and every later one.
    codes = [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x40)]
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("".join(map(chr, codes)))
    return frozenset(spelt[0][0])


def _as_used(definition: dict, config: dict) -> dict:
    """A `tokenizer.json` as transformers uses it: what the configuration names for a purpose, such as the end of a
    sequence, is a special token, even if it was added as text, or is an entry only."""
    tokens, vocab = _named_tokens(config), definition["model"]["vocab"]
    others = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(key)
        more = list(more.values()) if isinstance(more, dict) else more
        others += more if isinstance(more, list) else []
    texts = (token.get("content") if isinstance(token, dict) else token for token in others)
    named = {*tokens.values(), *(text for text in texts if isinstance(text, str))}
    added = definition["added_tokens"]
    added = [{**token, "special": token["special"] or token["content"] in named} for token in added]
    eos = tokens.get("eos_token")
    if eos in vocab and not any(token["content"] == eos for token in added):
        if eos not in _BYTE_PIECES and eos not in _needed_byte_characters():
            added.append({"content": eos, "id": vocab[eos], "special": True} | _FORM_OF_SPECIAL)
    return {**definition, "added_tokens": added}


def _begin_ids(definition: object) -> list[int]:
    """What the post-processor of a `tokenizer.json` puts in front of a text.

    `add_bos_token` of the configuration is not asked: transformers 5 passes over it where there is a `tokenizer.json`.

    Raises:
        ValueError: the post-processor is none.
    """
    step = definition.get("post_processor") if isinstance(definition, dict) else None
    if step is None:
        return []
    # It names its ids itself, so one word is vocabulary enough to see what it does.
    model = {"type": "WordLevel", "vocab": {"text": 0}, "unk_token": "text"}
    with panics_as_errors():
        encoding = LibraryTokenizer.from_str(
            json.dumps({"version": "1.0", "added_tokens": [], "post_processor": step, "model": model})
        ).encode("text")
    return list(compress(encoding.ids, takewhile(bool, encoding.special_tokens_mask)))


def _end_of_document(special_ids: dict[str, int], config: dict) -> str:
    """The special token that ends a document: <|endoftext|>, or what the configuration calls the end of a sequence.
    Of a model that was taught to answer here, that became the end of an answer, and the other has a name of its own."""
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    for token in (END_OF_DOCUMENT, config.get("end_of_document"), eos):
        if isinstance(token, str) and token in special_ids:
            return token
    raise ValueError(f"it has no {END_OF_DOCUMENT} token, and its tokenizer_config.json names no eos_token")


def _layout_name(token_id: int) -> str:
    """What a special token is called in a text that a chat template laid out, so that none is meant by accident."""
    return f"{_NAME_BEGINS}{token_id}\ufdd1"


def _template_in(config: dict) -> str | None:
    """The chat template of a tokenizer_config.json: a text, or the default one of a list.

    Raises:
        ValueError: it is neither.
    """
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        if "default" not in named:
            raise ValueError("its tokenizer_config.json names several chat templates, and none of them is the default")
        template = named["default"]
    if template is not None and not isinstance(template, str):
        raise ValueError("the chat_template of its tokenizer_config.json is no text")
    return template


def _named_tokens(config: dict) -> dict[str, str]:
    """ "bos_token", "eos_token" ... of a tokenizer_config.json -> the token's text."""
    named = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            named[name] = text
    return named


def _plain_text_definition(definition: dict, names: dict[str, str]) -> dict:
    """A `tokenizer.json` to which control strings are ordinary text, once `encode_special_tokens` is set.

    Args:
        names: special token -> what it is called instead. They stay, so that all others keep their ids, but under names
            that no text can become: a blank in the text is spelt otherwise in every kind of BPE that is let in here.
    """
    model = definition["model"]
    if len(set(names.values())) < len(names):
        raise ValueError("two of its special tokens have the same id")
    if taken := model["vocab"].keys() & set(names.values()):
        raise ValueError(f'"{min(taken)}" is a token that no text can become')
    unknown, splits = model.get("unk_token"), definition.get("pre_tokenizer")
    if model.get("ignore_merges") and model.get("byte_fallback"):
        splits = {"type": "Sequence", "pretokenizers": [*([splits] if splits else []), _SPLIT_BYTE_PIECE]}
    return {
        **definition,
        "pre_tokenizer": splits,
        "added_tokens": [
            {**token, "content": names.get(token["content"], token["content"])} for token in definition["added_tokens"]
        ],
        # Settings for batches and chats would cut texts, fill them up, or put tokens round them.
        "truncation": None,
        "padding": None,
        "post_processor": None,
        "model": {
            **model,
            "vocab": {names.get(token, token): token_id for token, token_id in model["vocab"].items()},
            "merges": _without_merges_of(names, model["merges"]),
            "unk_token": names.get(unknown, unknown),
            "dropout": None,
        },
    }


def _without_merges_of(tokens: Collection[str], merges: object) -> object:
    """The merges that neither make nor take one of the tokens: converters of SentencePiece models list such, too."""
    if not isinstance(merges, list):
        return merges

    def is_kept(merge: object) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            return True
        return not any(token in tokens for token in (*parts, "".join(parts)))

    return [merge for merge in merges if is_kept(merge)]


def _check_ids(ids: dict[str, int], definition: dict, special_ids: dict[str, int]) -> None:
    """
    Args:
        ids: token -> id, as the library has it.
        definition: what it was made from, see _plain_text_definition.
        special_ids: as the user's file has it.
    Raises:
        ValueError: a token has another id than the file says, since it was taken, or two tokens have the same one; or
            the ids leave more places empty than are taken.
    """
    added = definition["added_tokens"]
    stated = [*definition["model"]["vocab"].items(), *((token["content"], token["id"]) for token in added)]
    names = {f"special {token_id}": token for token, token_id in special_ids.items()}

    def name(token: str) -> str:
        return names.get(token, token)[:50]

    for token, token_id in stated:
        if ids.get(token) != token_id:
            raise ValueError(f'its token "{name(token)}" cannot have the id {token_id}: another has it, or it has two')
    token_of = {token_id: token for token, token_id in ids.items()}
    for token, token_id in ids.items():
        if token_of[token_id] != token:
            raise ValueError(f'its tokens "{name(token)}" and "{name(token_of[token_id])}" have the same id {token_id}')
    if max(token_of) >= 2 * len(token_of) + _MOST_GAPS:
        raise ValueError(f"its ids go up to {max(token_of)}, but it has {len(token_of)} tokens")


def _own_split_options(definition: dict) -> tuple[int, int] | None:
    """max_digits and max_han of a tokenizer that `train_hf_bbpe` made; None for others."""
    steps = (definition["pre_tokenizer"] or {}).get("pretokenizers") or [{}]
    pattern = steps[0].get("pattern", {}).get("Regex", "")
    max_digits = re.search(r"\[\\p{N}\]{1,(\d)}", pattern)
    max_han = re.search(r"\\p{Han}{1,(\d+)}", pattern)
    if max_digits is None:
        return None
    own = int(max_digits[1]), int(max_han[1]) if max_han else 0
    ordinary_tokens = [token for token in definition["added_tokens"] if not token["special"]]
    made_here = json.loads(_untrained(split_pattern(*own)).to_str())
    same = all(made_here[part] == definition[part] for part in ("pre_tokenizer", "normalizer"))
    return own if same and not ordinary_tokens else None


def _untrained(pattern: str) -> LibraryTokenizer:
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


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
        long_words: takes the number of words that were cut for the training.
    Raises:
        ValueError: the vocabulary is too small, or the text too little to fill it.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"--vocab_size must be at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    pattern = split_pattern(max_digits, max_han)
    tokenizer = _untrained(pattern)
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
    # Added after training, so that they take the last ids and are no part of the merges.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return HFBBPETokenizer(tokenizer.to_str(), hugging_face_config(SPECIAL_TOKENS), JINJA)
