"""Byte-level BPE on the `tokenizers` library.

The folder that `save_pretrained` writes is a Hugging Face tokenizer: `AutoTokenizer.from_pretrained(folder)` gives the
same ids for any text without control strings. For text that spells one out, such as "<|im_end|>", AutoTokenizer
follows Hugging Face's convention and returns the control id; this class encodes it as the plain characters it is, so
that no user text can forge a control token. Special tokens enter a sequence by id only.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from utils.files import atomic_write

END_OF_DOCUMENT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_DOCUMENT, "<|pad|>", "<|im_start|>", "<|im_end|>")

# Words with at most one leading non-letter; up to three digits; punctuation with its line ends; line ends with the
# blank before them; blanks, of which the last stays with the word that follows. After the scheme of GPT-2
# (Radford et al., 2019) with the changes for code of later models.
_SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class HFBBPETokenizer:
    """A trained tokenizer. `vocab_size` counts the special tokens, which have the last ids."""

    def __init__(self, definition: str):
        """`definition` is the content of a `tokenizer.json`."""
        self._definition = json.loads(definition)
        if not _is_byte_level_bpe(self._definition):
            raise ValueError("only byte-level BPE without other added tokens can be used")
        self.special_ids: dict[str, int] = {token["content"]: token["id"] for token in self._definition["added_tokens"]}
        if END_OF_DOCUMENT not in self.special_ids:
            raise ValueError(f"it has no {END_OF_DOCUMENT} token")
        # Without its added tokens, the library treats the control strings as ordinary text.
        self._plain = Tokenizer.from_str(json.dumps({**self._definition, "added_tokens": []}))
        self._special_texts = {token_id: text for text, token_id in self.special_ids.items()}
        self.vocab_size = max([*self.special_ids.values(), self._plain.get_vocab_size() - 1]) + 1
        parts = [self._definition.get(k) for k in ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")]
        self.fingerprint = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def eod_id(self) -> int:
        return self.special_ids[END_OF_DOCUMENT]

    def encode(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Text of the ids; bytes that are no UTF-8 yet become U+FFFD."""
        parts, plain = [], []
        for token_id in ids:
            if token_id in self._special_texts:
                parts.append(self._plain.decode(plain))
                plain = []
                if not skip_special_tokens:
                    parts.append(self._special_texts[token_id])
            else:
                plain.append(token_id)
        return "".join([*parts, self._plain.decode(plain)])

    def token_byte_lengths(self) -> list[int]:
        """How many bytes of text each id stands for; 0 for special tokens. For losses per byte of text."""
        lengths = [0] * self.vocab_size
        for token, token_id in self._plain.get_vocab().items():
            if token_id not in self._special_texts:
                # Byte-level BPE spells every byte as one character.
                lengths[token_id] = len(token)
        return lengths

    def save_pretrained(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_OF_DOCUMENT,
            "bos_token": END_OF_DOCUMENT,
            "pad_token": "<|pad|>" if "<|pad|>" in self.special_ids else END_OF_DOCUMENT,
            "additional_special_tokens": [t for t in self.special_ids if t not in (END_OF_DOCUMENT, "<|pad|>")],
            "clean_up_tokenization_spaces": False,
        }
        atomic_write(directory / "tokenizer.json", json.dumps(self._definition, ensure_ascii=False).encode())
        atomic_write(directory / "tokenizer_config.json", json.dumps(config, indent=1).encode())


def _is_byte_level_bpe(definition: object) -> bool:
    """Whether a `tokenizer.json` is of the kind that this class can stand for."""
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        return False
    model, added = definition["model"], definition.get("added_tokens")
    return (
        model.get("type") == "BPE"
        and "merges" in model
        and '"ByteLevel"' in json.dumps(definition.get("pre_tokenizer"))
        and isinstance(added, list)
        and all(token.get("special") for token in added)
    )


def load_tokenizer(directory: str | Path) -> HFBBPETokenizer:
    """Load a tokenizer folder.

    Raises:
        ValueError: no tokenizer there, or not one of a kind that can be used.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{directory} holds no tokenizer.json: train one with "
            f"`python -m tokenizer.train_tokenizer --data_dir D --output_dir {directory}`"
        )
    try:
        return HFBBPETokenizer(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be used ({error}): train one with `python -m tokenizer.train_tokenizer`"
        ) from None


def train_hf_bbpe(texts: Iterable[str], vocab_size: int, show_progress: bool = True) -> HFBBPETokenizer:
    """Train byte-level BPE (Sennrich et al., 2016, on bytes) with `vocab_size` entries, special tokens included.

    Raises:
        ValueError: the vocabulary is too small, or the text too little to fill it.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(
            f"--vocab_size must be at least {smallest} (256 bytes and {len(SPECIAL_TOKENS)} special tokens)"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(texts, trainer)
    entries = tokenizer.get_vocab_size() + len(SPECIAL_TOKENS)
    if entries < vocab_size:
        largest = entries // 64 * 64
        hint = f", at most {largest}" if largest >= smallest else ""
        raise ValueError(f"the corpus yields only {entries} entries: use more text or a smaller --vocab_size{hint}")
    # Added after training, so that they take the last ids and are no part of the merges.
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return HFBBPETokenizer(tokenizer.to_str())
