"""BPE on the `sentencepiece` library (Kudo and Richardson, 2018), falling back to bytes for rare characters.

Text comes back as it was written: it is not normalised, no blank is added in front, and blanks are kept. SentencePiece
writes a blank as "▁" (U+2581), so that a "▁" in the text could be mistaken for a blank: here it is encoded as its three
bytes. For text without it, this class, the raw library and `AutoTokenizer.from_pretrained(folder)` give the same ids.
The folder holds `tokenizer.model` for the library, and the same pieces and merges as a `tokenizer.json` for
AutoTokenizer. As in hf_bbpe.py, control strings in text become control ids only in AutoTokenizer.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import decoders, models, normalizers

from tokenizer.base import CHAT_TEMPLATE_NAME, END_OF_DOCUMENT, SPECIAL_TOKENS, Tokenizer, hugging_face_config
from tokenizer.hf_bbpe import HFBBPETokenizer
from tokenizer.usual_layouts import JINJA
from utils.files import atomic_write

KIND = "sp_bbpe"
_BLANK, _UNKNOWN_SIGN = "▁", "▅"
_UNKNOWN = "<unk>"
_LINE_BYTES = 4000
_FIXED_ENTRIES = 1 + len(SPECIAL_TOKENS) + 256


class SPBBPETokenizer(Tokenizer):
    """A SentencePiece model that was trained here. The special tokens come first, then the 256 bytes."""

    chat_template = JINJA

    def __init__(self, model: bytes):
        """
        Args:
            model: content of a `tokenizer.model`.
        Raises:
            ValueError: it is damaged, or was not trained here.
        """
        self._model = model
        try:
            self._processor = SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise ValueError(f"tokenizer.model is damaged: {_last_line(error)}") from None
        self.vocab_size = self._processor.vocab_size()
        self.special_ids = {
            self._processor.id_to_piece(i): i for i in range(self.vocab_size) if self._processor.is_control(i)
        }
        if END_OF_DOCUMENT not in self.special_ids:
            raise ValueError(f"it has no {END_OF_DOCUMENT} token")
        if sum(map(self._processor.is_byte, range(self.vocab_size))) != 256:
            raise ValueError("it does not fall back to bytes, so some texts would be lost")
        self.eod_id = self.special_ids[END_OF_DOCUMENT]
        self._blank_bytes = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _BLANK.encode("utf-8")]
        self.fingerprint = hashlib.sha256(model).hexdigest()

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        texts = list(texts)
        batch = self._processor.encode(texts, num_threads=num_threads or -1)
        for index, text in enumerate(texts):
            if _BLANK in text:
                batch[index] = self._encode_with_blank_signs(text)
        return batch

    def _encode_with_blank_signs(self, text: str) -> list[int]:
        first, *others = self._processor.encode(text.split(_BLANK))
        return first + [token_id for ids in others for token_id in self._blank_bytes + ids]

    def _decode_plain(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def token_byte_lengths(self) -> list[int]:
        lengths = []
        for token_id in range(self.vocab_size):
            if self._processor.is_control(token_id) or self._processor.is_unknown(token_id):
                lengths.append(0)
            elif self._processor.is_byte(token_id):
                lengths.append(1)
            else:
                lengths.append(len(self._processor.id_to_piece(token_id).replace(_BLANK, " ").encode("utf-8")))
        return lengths

    def with_tokens(self, tokens: Sequence[str]) -> HFBBPETokenizer:
        """The same entries, as a tokenizer.json, and the new ones: SentencePiece's library cannot add any. (A "▁" in a
        text becomes a blank there.)"""
        own = HFBBPETokenizer(self._as_hugging_face().to_str(), self._config(), JINJA)
        return own.with_tokens(tokens)

    def _config(self) -> dict:
        return hugging_face_config(self.special_ids) | {"unk_token": _UNKNOWN}

    def save_pretrained(self, directory: str | Path) -> None:
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = self._config() | {"kind": KIND}
        atomic_write(directory / "tokenizer.model", self._model)
        atomic_write(directory / "tokenizer.json", self._as_hugging_face().to_str().encode())
        atomic_write(directory / CHAT_TEMPLATE_NAME, JINJA.encode())
        # Last, because it says what the folder is.
        atomic_write(directory / "tokenizer_config.json", json.dumps(config, indent=1).encode())

    def _as_hugging_face(self) -> LibraryTokenizer:
        """Tokenizer of the `tokenizers` library with the same BPE.

        SentencePiece has no list of merges: it joins the neighbours whose piece has the best score. So each way to
        split a piece into two others is a merge, in the order of the pieces' scores. """
        p = self._processor
        vocab = {p.id_to_piece(i): i for i in range(self.vocab_size)}
        # Byte pieces stand alone and are not parts of others.
        scores = {
            piece: p.get_score(i)
            for piece, i in vocab.items()
            if not (p.is_byte(i) or p.is_control(i) or p.is_unknown(i))
        }
        merges = []
        for piece in sorted(scores, key=lambda piece: -scores[piece]):
            halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
            known = [(left, right) for left, right in halves if left in scores and right in scores]
            merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        tokenizer = LibraryTokenizer(models.BPE(vocab, merges, unk_token=_UNKNOWN, byte_fallback=True, fuse_unk=False))
        tokenizer.normalizer = normalizers.Replace(" ", _BLANK)
        tokenizer.decoder = decoders.Sequence([decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.add_special_tokens([_UNKNOWN, *self.special_ids])
        return tokenizer


def train_sp_bbpe(texts: Iterable[str], vocab_size: int, show_progress: bool = True) -> SPBBPETokenizer:
    """Train SentencePiece's BPE with `vocab_size` entries, special tokens and bytes included.

    Each digit is a piece of its own. Characters that make up the rarest 0.05% of the text are spelt in bytes.

    Raises:
        ValueError: the vocabulary is too small, or the text is too little to fill it.
    """
    if vocab_size <= _FIXED_ENTRIES:
        raise ValueError(f"--vocab_size must be more than {_FIXED_ENTRIES} (256 bytes and the special tokens)")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_lines(texts), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, normalization_rule_name="identity", add_dummy_prefix=False,
            remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, max_sentence_length=8 * _LINE_BYTES,
            character_coverage=0.9995, control_symbols=list(SPECIAL_TOKENS), unk_id=0, unk_piece=_UNKNOWN, bos_id=-1,
            eos_id=-1, pad_id=-1, train_extremely_large_corpus=True, minloglevel=0 if show_progress else 2,
        )  # fmt: skip
    except RuntimeError as error:
        # Either the vocabulary has no room for the text's characters, or the text cannot fill the vocabulary.
        advice = "a larger --vocab_size" if "required_chars" in str(error) else "more text or a smaller --vocab_size"
        raise ValueError(
            f"SentencePiece cannot train {vocab_size} entries on this text ({_last_line(error)}): use {advice}"
        ) from None
    return SPBBPETokenizer(model.getvalue())


def _last_line(error: RuntimeError) -> str:
    return str(error).strip().splitlines()[-1]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Texts in pieces of about _LINE_BYTES, cut after a line end or at a blank, without NUL and the trainer's sign for
    unknown characters. The trainer leaves out pieces that hold one of these, or that are too long."""
    for text in texts:
        text = text.replace("\0", "").replace(_UNKNOWN_SIGN, "")
        start = 0
        while start < len(text):
            end = start + _LINE_BYTES
            if end < len(text):
                cut = max(text.rfind("\n", start, end) + 1, text.rfind(" ", start, end))
                end = cut if cut > start else end
            yield text[start:end]
            start = end
