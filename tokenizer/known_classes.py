"""Tokenizers whose control tokens and layout of conversations stand in Python code beside the model, as data.

The code of a folder is never run. For the classes listed here, this file states what their code says: which tokens it
adds to a SentencePiece vocabulary and under which ids, what it puts in front of a text, which token ends one, and how
it lays a conversation out. So a folder as it was published gives the ids that its own class gives.

The facts are from the code and the documents that the projects publish: THUDM's tokenization_chatglm.py and PROMPT.md,
Baichuan's tokenization_baichuan.py and generation_utils.py, InternLM's tokenization_internlm.py and `build_inputs` in
its modeling_internlm.py, Yuan 2.0's megatron/tokenizer/tokenizer.py and FastChat's layout of it, AquilaChat2's
predict.py.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from tokenizer import known_layouts as layouts
from tokenizer.base import CHAT_TEMPLATE_NAME, parsed
from tokenizer.hf_definition import CONTROL_PIECES, named_tokens, splits_of

_CHATGLM_ADDS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
_CHATGLM3_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
_YUAN_ADDS = (
    "<sep>", "<pad>", "<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>", "<commit_before>",
    "<commit_msg>", "<commit_after>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>",
    "<empty_output>",
)  # fmt: skip
_BAICHUAN_IDS = (195, 196)
"""Ids of the tokens in front of a question and of an answer, if no generation_config.json names them: Baichuan 1 calls
them <reserved_102> and <reserved_103>, Baichuan 2 <reserved_106> and <reserved_107>."""
_CONTROL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
"""Form of a control token in a `tokenizer.json`."""


class KnownClass(NamedTuple):
    """A tokenizer class, and what its code says."""

    classes: tuple[str, ...] = ()
    """Its names in tokenizer_config.json."""
    model_types: tuple[str, ...] = ()
    """Models in config.json that use it, whatever class is named."""
    needs: tuple[str, ...] = ()
    """Entries by which its vocabulary is known."""
    alone: bool = False
    """Whether a vocabulary with all of `needs` is this one even if neither class nor model is named."""
    adds: tuple[str, ...] = ()
    """Control tokens that its code adds. One that is an entry of the vocabulary keeps its id; the others take the ids
    after the vocabulary, in this order."""
    controls: tuple[str, ...] = ()
    """Pieces of the vocabulary that are control tokens. They are found within a text: no blank is put behind them."""
    begins: tuple[str, ...] | None = None
    """Tokens in front of a text; None for the `bos_token` if the configuration or `adds_bos` says so."""
    adds_bos: bool = False
    """Whether the `bos_token` stands in front of a text where the configuration does not say it."""
    settings: tuple[tuple[str, str], ...] = ()
    """Settings of a tokenizer_config.json that its users give, whatever is written there."""
    layout: str = ""
    """Chat template: its layout of conversations."""
    code_without: tuple[str, str] | None = None
    """(File of code beside it, text that this version of the file does not hold), to tell versions of one class from
    each other. A folder without the file is no such version."""


_CHATGLM = KnownClass(
    classes=("ChatGLMTokenizer",), model_types=("chatglm",), begins=("[gMASK]", "sop"),
    adds=_CHATGLM_ADDS + _CHATGLM3_ROLES, layout=layouts.CHATGLM3,
)  # fmt: skip
_INTERNLM = KnownClass(
    classes=("InternLMTokenizer",), model_types=("internlm",), needs=("<eoa>",), adds_bos=True,
    controls=("<eoh>", "<eoa>"), layout=layouts.INTERNLM,
)  # fmt: skip
_KNOWN = (
    _CHATGLM._replace(
        adds=_CHATGLM_ADDS, layout=layouts.CHATGLM2, code_without=("tokenization_chatglm.py", "<|user|>")
    ),
    _CHATGLM,
    KnownClass(
        classes=("BaichuanTokenizer", "BaiChuanTokenizer"), model_types=("baichuan",), adds_bos=True,
        layout=layouts.BAICHUAN,
    ),
    _INTERNLM._replace(layout=layouts.INTERNLM_1_1, code_without=("modeling_internlm.py", "<eoh>")),
    _INTERNLM,
    # The models that hold no conversations have no <eoa>.
    _INTERNLM._replace(needs=(), controls=(), layout=""),
    KnownClass(
        model_types=("yuan",), needs=("<eod>", "<sep>", "<n>", "<pad>"), alone=True, begins=(),
        adds=("<eod>", *_YUAN_ADDS), settings=(("eos_token", "<eod>"), ("sep_token", "<sep>")), layout=layouts.YUAN,
    ),
    KnownClass(
        model_types=("aquila",), needs=("</s>", "[CLS]"), settings=(("end_of_document", "</s>"),),
        layout=layouts.AQUILA,
    ),
)  # fmt: skip


def known_class(directory: Path, config: Mapping, vocab: Mapping[str, int]) -> KnownClass | None:
    """The class of a folder's tokenizer, if it is one of those known here.

    Args:
        config: content of its tokenizer_config.json.
        vocab: entry -> id, added tokens included.
    """
    model_type = _model_type(directory)
    for one in _KNOWN:
        named = config.get("tokenizer_class") in one.classes or model_type in one.model_types
        if (named or one.alone) and vocab.keys() >= set(one.needs) and _is_version(one, directory):
            return one
    return None


def is_named(directory: Path, config: Mapping) -> bool:
    """Whether a folder names a class that is known here, or a model that uses one."""
    model_type = _model_type(directory)
    return any(config.get("tokenizer_class") in one.classes or model_type in one.model_types for one in _KNOWN)


def _is_version(one: KnownClass, directory: Path) -> bool:
    """Whether the code beside a folder's tokenizer is that of this version. It is read as a text, never run."""
    if one.code_without is None:
        return True
    name, text = one.code_without
    path = directory / name
    return path.is_file() and text not in path.read_text("utf-8", errors="replace")


def completed(known: KnownClass, directory: Path, definition: dict, config: dict) -> tuple[dict, dict]:
    """`tokenizer.json` and `tokenizer_config.json` with the tokens that the code of a class adds.

    Args:
        definition: `tokenizer.json` made of the bare SentencePiece model.
        config: content of the folder's tokenizer_config.json, with the named tokens of the model.
    Raises:
        ValueError: the folder gives a token another id than its class.
    """
    vocab = definition["model"]["vocab"]
    added = {token["content"]: token["id"] for token in definition["added_tokens"]}
    ids = {**vocab, **added}
    controls = [token for token in known.controls if token in vocab]
    within = [token for token in controls if _is_found_within(definition, token)]
    others = [token for token in controls if token not in within]
    for token in (*known.adds, *others, *_role_tokens(known, directory, vocab)):
        added[token] = ids.setdefault(token, max(ids.values()) + 1)
    forms = {token: {"id": token_id, "content": token, **_CONTROL} for token, token_id in added.items()}
    for token, form in _stated(directory, config).items():
        if ids.setdefault(token, form["id"]) != form["id"]:
            raise ValueError(f'its files give "{token}" the id {form["id"]}, and the code of its class {ids[token]}')
        forms.setdefault(token, form)
    begins = _begins(known, config)
    definition = {
        **definition,
        "added_tokens": sorted(forms.values(), key=lambda form: form["id"]),
        "pre_tokenizer": splits_of(definition),
        "post_processor": _in_front({token: ids[token] for token in begins}),
    }
    config = {key: value for key, value in config.items() if key not in ("added_tokens_decoder", "add_eos_token")}
    config["add_bos_token"] = bool(begins) and known.begins is None
    return definition, config | ({CONTROL_PIECES: within} if within else {})


def _begins(known: KnownClass, config: Mapping) -> tuple[str, ...]:
    """Tokens in front of a text."""
    if known.begins is not None:
        return known.begins
    bos = named_tokens(config).get("bos_token")
    return (bos,) if bos and config.get("add_bos_token", known.adds_bos) else ()


def settings_of(known: KnownClass, directory: Path, vocab: Mapping[str, int], config: Mapping) -> dict:
    """Settings of a tokenizer_config.json that the code of a class, or those who use it, add: the token that ends a
    document, and the layout of conversations if the folder has no chat template.

    Args:
        vocab: entry -> id, added tokens included.
        config: the settings so far.
    Raises:
        ValueError: see _role_tokens.
    """
    settings = dict(known.settings)
    if known.layout and not config.get("chat_template") and not (directory / CHAT_TEMPLATE_NAME).exists():
        roles = _role_tokens(known, directory, vocab)
        if roles:
            settings["chat_template"] = layouts.with_roles(known.layout, *roles)
        elif known.layout != layouts.BAICHUAN and vocab.keys() >= set(known.adds):
            settings["chat_template"] = known.layout
    return settings


def _role_tokens(known: KnownClass, directory: Path, vocab: Mapping[str, int]) -> tuple[str, ...]:
    """Baichuan's tokens in front of questions and answers; none for another class or a vocabulary without them.

    Raises:
        ValueError: generation_config.json names other ids than those of reserved tokens.
    """
    if known.layout != layouts.BAICHUAN:
        return ()
    stated = _json(directory / "generation_config.json")
    names = ("user_token_id", "assistant_token_id")
    ids = [stated.get(name, usual) for name, usual in zip(names, _BAICHUAN_IDS)]
    texts = {token_id: token for token, token_id in vocab.items()}
    found = tuple(texts.get(token_id, "") for token_id in ids)
    if all(layouts.RESERVED.fullmatch(token) for token in found):
        return found
    if any(name in stated for name in names):
        raise ValueError(f"generation_config.json names the ids {ids[0]} and {ids[1]}, which are no reserved tokens")
    return ()


def _stated(directory: Path, config: Mapping) -> dict[str, dict]:
    """Added tokens that the folder's own files list -> their entries of a `tokenizer.json`.

    Raises:
        ValueError: a file is damaged.
    """
    listed = _json(directory / "added_tokens.json")
    text = {**_CONTROL, "special": False}
    stated = {token: {"id": token_id, "content": token, **text} for token, token_id in listed.items()}
    decoder = config.get("added_tokens_decoder")
    for token_id, token in (decoder if isinstance(decoder, dict) else {}).items():
        form = {name: token.get(name, usual) for name, usual in _CONTROL.items()}
        stated[token["content"]] = {"id": int(token_id), "content": token["content"], **form}
    return dict(sorted(stated.items(), key=lambda item: item[1]["id"]))


def _is_found_within(definition: dict, token: str) -> bool:
    """Whether SentencePiece finds a piece within a text, whatever stands around it."""
    return json.dumps(re.escape(token))[1:-1] in json.dumps(definition["pre_tokenizer"], ensure_ascii=False)


def _in_front(ids: Mapping[str, int]) -> dict | None:
    """Step of a `tokenizer.json` that puts tokens in front of a text."""
    if not ids:
        return None
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token in ids]
    one, two = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*first, one],
        "pair": [*first, one, two],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in ids},
    }


def _json(path: Path) -> dict:
    """Content of a JSON file; empty if there is none.

    Raises:
        ValueError: it holds something else.
    """
    if not path.exists():
        return {}
    content = parsed(path.name, path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no settings")
    return content


def _model_type(directory: Path) -> object:
    """The model that a folder's config.json names. A damaged one is for the model's own reader to refuse."""
    try:
        return _json(directory / "config.json").get("model_type")
    except ValueError:
        return None
