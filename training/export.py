"""What a checkpoint tells other programs: where a text ends, and which tokens it is made of.

They look in three places for an end: transformers in generation_config.json, others in config.json, and llama.cpp and
TRL in what the tokenizer calls its `eos_token`. All three name the tokens at which generate.py stops.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from model.config import LlamaConfig
from model.families import family_of
from model.families.family import Family
from model.generation_config import GenerationConfig, read_generation_config
from tokenizer import Tokenizer
from tokenizer.base import CHAT_TEMPLATE_NAME, END_OF_DOCUMENT, GENERAL_CLASS, PAD
from tokenizer.chat_template import ChatTemplate, template_of
from utils.files import atomic_write, atomic_write_json

_SENTENCE_PIECE, _ADDED_TOKENS = "tokenizer.model", "added_tokens.json"


@dataclass(frozen=True)
class Export:
    tokenizer: Tokenizer
    generation: GenerationConfig
    for_chat: bool
    """Of a model that is taught to answer."""
    sentence_piece: dict[str, bytes]
    """Name -> content of the tokenizer.model of the folder that the model came from, and of the added_tokens.json
    beside it: llama.cpp's converter takes the scores of the pieces from the one, and without it a tokenizer that gives
    other ids; what was added to them it looks for in the other, where the configuration does not tell."""

    def family(self, config: LlamaConfig) -> Family:
        """The family as which the model is written: its name may tell other programs how texts are split."""
        return family_of(config, generic_tokenizer=self.tokenizer.class_name == GENERAL_CLASS)

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's folder."""
        self.tokenizer.save_pretrained(directory)
        for name, content in self.sentence_piece.items():
            if not (directory / name).exists():
                atomic_write(directory / name, content)
        if self.for_chat:
            _make_it_for_chat(self.tokenizer, directory)


def plan_export(for_chat: bool, tokenizer: Tokenizer, weights: Path | None) -> Export:
    """By which tokens the run teaches to end a text; all else is as the model that it begins with has it.

    Args:
        for_chat: whether the model is taught to answer.
        weights: folder of that model: of a resumed run its checkpoint, which has what the run began with. Nothing of it
            is read later.
    Raises:
        ValueError: a file in that folder is not as it should be.
    """
    sentence_piece = {}
    if weights is None:
        source = GenerationConfig((), next(iter(tokenizer.begin_ids), None), tokenizer.special_ids.get(PAD))
    else:
        source = read_generation_config(weights)
        if (weights / _SENTENCE_PIECE).is_file():
            kept = [path for name in (_SENTENCE_PIECE, _ADDED_TOKENS) if (path := weights / name).is_file()]
            sentence_piece = {path.name: path.read_bytes() for path in kept}
    ends = _ends_of_answers(tokenizer, template_of(tokenizer)) if for_chat else [tokenizer.eod_id]
    return Export(tokenizer, source.ending_with(ends), for_chat, sentence_piece)


def _make_it_for_chat(tokenizer: Tokenizer, directory: Path) -> None:
    """Let a tokenizer's folder have the chat template by which the model is taught, and call what ends an answer its
    `eos_token`, as the folders of Qwen's and Llama's chat models do: TRL's chat and llama.cpp look at nothing else."""
    template = template_of(tokenizer)
    if tokenizer.chat_template is None:
        atomic_write(directory / CHAT_TEMPLATE_NAME, template.source.encode())
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    # Early readers of version 4 look for it here alone.
    values.setdefault("chat_template", template.source)
    end_id = _ends_of_answers(tokenizer, template)[0]
    texts = {token_id: text for text, token_id in tokenizer.special_ids.items()}
    # A template that writes eos_token itself would lay conversations out differently. And an end that was added as text
    # would become a special token by that name: another tokenizer than the data's.
    if end_id != tokenizer.eod_id and "eos_token" not in template.source and end_id in texts:
        values["eos_token"] = texts[end_id]
        if END_OF_DOCUMENT not in tokenizer.special_ids:
            # Where this folder is read here, documents end as before: its tokens are the same data's.
            values["end_of_document"] = texts[tokenizer.eod_id]
    atomic_write_json(path, values)


def _ends_of_answers(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Tokens by which a model is taught to end an answer; the end of a document, which it may know as well, last."""
    return [*sorted(template.stop_ids - {tokenizer.eod_id}), tokenizer.eod_id]
