"""What a checkpoint tells other programs of ending a text.

They look in three places: transformers and vLLM in generation_config.json, others in config.json, and llama.cpp and
TRL in what the tokenizer calls its `eos_token`. All three name the tokens at which generate.py stops.
"""

import json
from pathlib import Path

from model.generation_config import GenerationConfig, read_generation_config
from tokenizer import Tokenizer
from tokenizer.base import CHAT_TEMPLATE_NAME, END_OF_DOCUMENT, PAD
from tokenizer.chat_template import ChatTemplate
from utils.files import atomic_write, atomic_write_json


def find_generation_config(task_type: str, tokenizer: Tokenizer, weights: Path | None) -> GenerationConfig:
    """By which tokens the run teaches to end a text; all else is as the model that it begins with has it.

    Args:
        weights: folder of that model: of a resumed run its checkpoint, which has what the run began with.
    Raises:
        ValueError: a file in that folder is not as it should be.
    """
    if weights is not None:
        source = read_generation_config(weights)
    else:
        source = GenerationConfig((), next(iter(tokenizer.begin_ids), None), tokenizer.special_ids.get(PAD))
    if task_type == "pretrain":
        return source.ending_with([tokenizer.eod_id])
    return source.ending_with(_ends_of_answers(tokenizer, ChatTemplate(tokenizer)))


def save_tokenizer(tokenizer: Tokenizer, directory: Path, for_chat: bool) -> None:
    """Write a tokenizer's folder.

    Args:
        for_chat: of a model that was taught to answer. Its `eos_token` is what ends an answer, as in the folders of
            Qwen's and Llama's chat models: TRL's chat and llama.cpp look at nothing else. And it has the chat template
            by which it was taught.
    """
    tokenizer.save_pretrained(directory)
    if not for_chat:
        return
    template = ChatTemplate(tokenizer)
    if tokenizer.chat_template is None:
        atomic_write(directory / CHAT_TEMPLATE_NAME, template.source.encode())
    end_id = _ends_of_answers(tokenizer, template)[0]
    # A template that writes eos_token itself would lay conversations out differently.
    if end_id == tokenizer.eod_id or "eos_token" in template.source:
        return
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    texts = {token_id: text for text, token_id in tokenizer.special_ids.items()}
    values["eos_token"] = texts[end_id]
    if END_OF_DOCUMENT not in tokenizer.special_ids:
        # Where this folder is read here, documents end as before: its tokens are the same data's.
        values["end_of_document"] = texts[tokenizer.eod_id]
    atomic_write_json(path, values)


def _ends_of_answers(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Tokens by which a model is taught to end an answer; the end of a document, which it may know as well, last."""
    return [*sorted(template.stop_ids - {tokenizer.eod_id}), tokenizer.eod_id]
