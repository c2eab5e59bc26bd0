"""Tokenizer folders as families of models publish them, made of small SentencePiece models; no tests.

The settings of the models and the files beside them follow the published ones: see known_classes.py for the sources.
"""

import functools
import io
import json
import random
from pathlib import Path

from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

from tests.unit.test_tokenizer import english

CHINESE = [
    "中文训练数据 天地玄黄 宇宙洪荒，问：你好？答：很好。\n" * 10, "<|User|>:x\n<|Bot|>:y " * 20,
    "    x = 1\n\ty\n" * 20,
]  # fmt: skip
CHATGLM_CODE = 'special_tokens = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]\nraise SystemExit("code was run")\n'
CHATGLM3_CODE = CHATGLM_CODE + 'role_special_tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]\n'


@functools.cache
def model(
    dummy_prefix: bool = True, user: tuple[str, ...] = (), normal: tuple[str, ...] = (), equal: int = 0
) -> bytes:
    """A `tokenizer.model` as these families train theirs: BPE that falls back to bytes, splits digits, and normalises
    nothing.

    Args:
        user: pieces that SentencePiece finds whole within a text.
        normal: ordinary pieces that no merge makes, as Yuan 2 has <eod>; they get the last ids.
        equal: number of pieces of two letters that get the best score, as pieces have that were added later.
    """
    rng = random.Random(0)
    texts, content = [english(rng, 80) for _ in range(100)] + CHINESE, io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=content, model_type="bpe", vocab_size=420 + len(user),
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, minloglevel=2, add_dummy_prefix=dummy_prefix,
        user_defined_symbols=list(user),
    )  # fmt: skip
    proto = sentencepiece_model_pb2.ModelProto.FromString(content.getvalue())
    pairs = [piece for piece in proto.pieces if piece.type == 1 and len(piece.piece) == 2]
    for piece in pairs[:equal]:
        piece.score = 0.0
    for number, piece in enumerate(normal):
        proto.pieces.add(piece=piece, score=-1e6 - number)
    return proto.SerializeToString()


def write(folder: Path, **files: object) -> Path:
    """A folder of files, with the last "_" of a name for its "."; text and bytes as they are, other values as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        content = content.encode() if isinstance(content, str) else content
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return folder


def auto_map(name: str, kind: str) -> dict:
    return {"AutoTokenizer": [f"{name}.{kind}", None]}


def chatglm(folder: Path, version: int, **more: object) -> Path:
    config = {
        "name_or_path": f"THUDM/chatglm{version}-6b", "remove_space": False, "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer", "auto_map": auto_map("tokenization_chatglm", "ChatGLMTokenizer"), **more,
    }  # fmt: skip
    return write(
        folder, tokenizer_model=model(), tokenizer_config_json=config,
        config_json={"model_type": "chatglm", "eos_token_id": 2, "pad_token_id": 0},
        tokenization_chatglm_py=CHATGLM3_CODE if version == 3 else CHATGLM_CODE,
    )  # fmt: skip


def baichuan(folder: Path, version: int, **more: object) -> Path:
    """The roles' tokens are those with the ids 195 and 196: <reserved_102>, or <reserved_106> in the second version."""
    first = 102 if version == 1 else 106
    user = [f"<other_{number}>" for number in range(195 - first - 3)] + [f"<reserved_{n}>" for n in range(first + 4)]
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": True}
    config = {
        "auto_map": auto_map("tokenization_baichuan", "BaichuanTokenizer"), "tokenizer_class": "BaichuanTokenizer",
        "bos_token": {**token, "content": "<s>"}, "eos_token": {**token, "content": "</s>"},
        "pad_token": {**token, "content": "<unk>"}, "unk_token": {**token, "content": "<unk>"},
        "add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False, **more,
    }  # fmt: skip
    generation = {"bos_token_id": 1, "eos_token_id": 2, "user_token_id": 195, "assistant_token_id": 196, "top_k": 5}
    return write(
        folder, tokenizer_model=model(dummy_prefix=version == 1, user=tuple(user)), tokenizer_config_json=config,
        config_json={"model_type": "baichuan"}, generation_config_json=generation,
        tokenization_baichuan_py='raise SystemExit("code was run")\n',
    )  # fmt: skip


def internlm(folder: Path, version: str = "1.0") -> Path:
    config = {
        "auto_map": auto_map("tokenization_internlm", "InternLMTokenizer"), "tokenizer_class": "InternLMTokenizer",
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    code = "# prompt += <|Bot|>:{record[1]}<eoa>\n" + ("# <eoh>\n" if version == "1.0" else "")
    return write(
        folder, tokenizer_model=model(user=("<eoh>", "<eoa>")), tokenizer_config_json=config,
        config_json={"model_type": "internlm"}, modeling_internlm_py=code,
    )  # fmt: skip


def yuan(folder: Path, with_config: bool = True, equal: int = 0) -> Path:
    """As in the project's own repository, whose configuration says what its users override. For `equal`, see model."""
    token = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": True, "add_eos_token": True, "bos_token": {**token, "content": "<s>"},
        "eos_token": {**token, "content": "</s>"}, "unk_token": {**token, "content": "<unk>"}, "pad_token": None,
        "tokenizer_class": "LlamaTokenizer", "sp_model_kwargs": {}, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    normal = ("<eod>", "<n>", "<sep>", "<pad>", "<commit_before>", "<jupyter_start>")
    write(folder, tokenizer_model=model(normal=normal, equal=equal), tokenizer_config_json=config)
    return write(folder, config_json={"model_type": "yuan", "eos_token_id": 77185}) if with_config else folder
