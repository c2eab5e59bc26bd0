"""Definition of a Hugging Face tokenizer (`tokenizer.json`, `tokenizer_config.json`): its special tokens, whether it
can be used, and the definition that the library gets, in which control strings are ordinary text."""

import json
import re
from collections.abc import Collection, Mapping
from functools import cache
from itertools import compress, takewhile

from tokenizers import Tokenizer as LibraryTokenizer
from tokenizers import pre_tokenizers

from tokenizer.base import END_OF_DOCUMENT, panics_as_errors

_MOST_GAPS = 1024
"""Ids without a token that are allowed in addition to the number of ids with one."""
BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(256))
_NEEDED_BYTE_PIECES = frozenset(f"<0x{byte:02X}>" for byte in range(0xF5) if byte not in (0xC0, 0xC1))
"""Pieces of the bytes that occur in UTF-8. Some tokenizers leave out the others."""
_FORM_OF_SPECIAL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
ADDED_TOKEN = {"special": False} | _FORM_OF_SPECIAL
"""Form of an ordinary added token. It is looked for in the text as it was written, not as normalized: Llama 2's
normalizer puts a blank in front of each text, hence also of each such token, which would not be found within a text."""
_SPLIT_BYTE_PIECE = {
    "type": "Split", "pattern": {"Regex": r"\A<(?=0x[0-9A-F]{2}>\z)"}, "behavior": "Isolated", "invert": False
}  # fmt: skip
"""Step that keeps the text "<0x41>" from becoming the byte of this name, where whole words are looked up first."""
CONTROL_PIECES = "control_pieces"
"""Key of ours in a tokenizer_config.json: control tokens that SentencePiece finds within a text, as pieces that its
user defined. A text goes on behind them, whereas one begins behind a special token, often with a blank in front."""


def byte_spelling(definition: object) -> str:
    """Way in which a `tokenizer.json` spells bytes: "byte level", or "byte pieces" for unknown characters only.

    Raises:
        ValueError: it is not BPE, or some texts have no ids.
    """
    model = definition.get("model") if isinstance(definition, dict) else None
    # The oldest files, such as GPT-2's own, do not name the type.
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
    """Characters by which byte-level BPE spells the bytes that occur in UTF-8."""
    # Code points with every first byte of UTF-8, and every later one.
    codes = [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0xE000, 0x110000, 0x40)]
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("".join(map(chr, codes)))
    return frozenset(spelt[0][0])


def as_used(definition: dict, config: dict) -> dict:
    """A `tokenizer.json` as transformers uses it: a token that the configuration names for a purpose, such as the end
    of a sequence, is special, even if it was added as text or is only an entry."""
    tokens, vocab = named_tokens(config), definition["model"]["vocab"]
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
        if eos not in BYTE_PIECES and eos not in _needed_byte_characters():
            added.append({"content": eos, "id": vocab[eos], "special": True} | _FORM_OF_SPECIAL)
    return {**definition, "added_tokens": added}


def begin_ids(definition: object) -> list[int]:
    """Ids that the post-processor of a `tokenizer.json` puts in front of a text.

    `add_bos_token` of the configuration does not count: transformers 5 ignores it where there is a `tokenizer.json`.

    Raises:
        ValueError: the post-processor is invalid.
    """
    step = definition.get("post_processor") if isinstance(definition, dict) else None
    if step is None:
        return []
    # It names its ids itself, so that a vocabulary of one word is enough to see what it does.
    model = {"type": "WordLevel", "vocab": {"text": 0}, "unk_token": "text"}
    with panics_as_errors():
        encoding = LibraryTokenizer.from_str(
            json.dumps({"version": "1.0", "added_tokens": [], "post_processor": step, "model": model})
        ).encode("text")
    return list(compress(encoding.ids, takewhile(bool, encoding.special_tokens_mask)))


def end_of_document(special_ids: dict[str, int], config: dict) -> str:
    """Special token that ends a document: <|endoftext|>, or the configuration's end of a sequence. For a model that was
    taught to answer here, the latter became the end of an answer, and `end_of_document` names the former. It also names
    the one of a class that uses <|endoftext|> for something else (known_classes.py)."""
    eos = config.get("eos_token")
    eos = eos.get("content") if isinstance(eos, dict) else eos
    for token in (config.get("end_of_document"), END_OF_DOCUMENT, eos):
        if isinstance(token, str) and token in special_ids:
            return token
    raise ValueError(f"it has no {END_OF_DOCUMENT} token, and its tokenizer_config.json names no eos_token")


def template_in(config: dict) -> str | None:
    """Chat template in a tokenizer_config.json: a text, or the default of a list.

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
        raise ValueError("the chat_template of its tokenizer_config.json is not text")
    return template


def control_pieces(definition: dict, config: Mapping) -> dict[str, int]:
    """Control tokens that are pieces of the vocabulary -> their ids, see CONTROL_PIECES.

    Raises:
        ValueError: the configuration names something else.
    """
    pieces, vocab = config.get(CONTROL_PIECES, []), definition["model"]["vocab"]
    if not isinstance(pieces, list) or not all(isinstance(piece, str) and piece in vocab for piece in pieces):
        raise ValueError(f"the {CONTROL_PIECES} of its tokenizer_config.json are not entries of its vocabulary")
    return {piece: vocab[piece] for piece in pieces}


def named_tokens(config: Mapping) -> dict[str, str]:
    """Named tokens of a tokenizer_config.json: "bos_token", "eos_token" ... -> the token's text."""
    named = {}
    for name, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(text, str):
            named[name] = text
    return named


def plain_text_definition(definition: dict, names: dict[str, str]) -> dict:
    """A `tokenizer.json` in which control strings are ordinary text, once `encode_special_tokens` is set.

    Args:
        names: special token -> its new name. The tokens stay, so that all others keep their ids, but under names that
        no
            text can become: every kind of BPE that is accepted here spells a blank in the text in another way.
    """
    model = definition["model"]
    if len(set(names.values())) < len(names):
        raise ValueError("two of its special tokens have the same id")
    if taken := model["vocab"].keys() & set(names.values()):
        raise ValueError(f'"{min(taken)}" is a token that no text can become')
    unknown = model.get("unk_token")
    return {
        **definition,
        "pre_tokenizer": _with_names(splits_of(definition), names),
        "added_tokens": [
            {**token, "content": names.get(token["content"], token["content"])} for token in definition["added_tokens"]
        ],
        # Settings for batches and chats would cut texts, pad them, or put tokens around them.
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


def splits_of(definition: dict) -> dict | None:
    """Steps of a `tokenizer.json` that split a text, with one that keeps the text "<0x41>" from becoming a byte."""
    model, splits = definition["model"], definition.get("pre_tokenizer")
    if not (model.get("ignore_merges") and model.get("byte_fallback")):
        return splits
    steps = splits["pretokenizers"] if splits and splits["type"] == "Sequence" else [splits] if splits else []
    return {"type": "Sequence", "pretokenizers": [*steps, *([] if _SPLIT_BYTE_PIECE in steps else [_SPLIT_BYTE_PIECE])]}


def _with_names(step: object, names: Mapping[str, str]) -> object:
    """A step that splits texts, with the new names of the tokens that it isolates."""
    if isinstance(step, list):
        return [_with_names(one, names) for one in step]
    if not isinstance(step, dict):
        return step
    if step.get("type") != "Split" or not isinstance(step["pattern"].get("Regex"), str):
        return {key: _with_names(value, names) for key, value in step.items()}
    pattern = step["pattern"]["Regex"]
    for token, name in names.items():
        if re.escape(token) in pattern:
            alternative = rf"(?:(?<=\|)|\A){re.escape(re.escape(token))}(?=\||\Z)"
            pattern = re.sub(alternative, lambda _, name=name: re.escape(name), pattern)
    return {**step, "pattern": {"Regex": pattern}}


def _without_merges_of(tokens: Collection[str], merges: object) -> object:
    """Merges that neither make nor take one of the tokens. Converters of SentencePiece models list such merges, too."""
    if not isinstance(merges, list):
        return merges

    def is_kept(merge: object) -> bool:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
            return True
        return not any(token in tokens for token in (*parts, "".join(parts)))

    return [merge for merge in merges if is_kept(merge)]


def check_ids(ids: dict[str, int], definition: dict, special_ids: dict[str, int]) -> None:
    """Check that the library uses the ids of the file.

    Args:
        ids: token -> id, in the library.
        definition: definition that the library got, see plain_text_definition.
        special_ids: special token -> id, in the user's file.
    Raises:
        ValueError: a token has another id than in the file, where that was taken; two tokens share an id; or more ids
            are unused than used.
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
