"""Information for other programs in a checkpoint: where a text ends, and which tokens it is made of.

Programs look in three places for the end: transformers in generation_config.json, others in config.json, llama.cpp and
TRL at the `eos_token` of the tokenizer. All three name the tokens at which generate.py stops.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from model.config import ModelConfig
from model.families import family_of
from model.families.family import Family
from model.generation_config import GenerationConfig, read_adapters_generation_config, read_generation_config
from tokenizer import Tokenizer
from tokenizer.base import CHAT_TEMPLATE_NAME, END_OF_DOCUMENT, GENERAL_CLASS, PAD
from tokenizer.chat_template import ChatTemplate, template_of
from tokenizer.hf_definition import CONTROL_PIECES
from utils.files import atomic_write, atomic_write_json

_SENTENCE_PIECE, _ADDED_TOKENS = "tokenizer.model", "added_tokens.json"


@dataclass(frozen=True)
class Export:
    tokenizer: Tokenizer
    generation: GenerationConfig
    for_chat: bool
    """Whether the model is taught to answer."""
    vocab_size: int
    """Rows of the vocabulary that others see."""
    sentence_piece: dict[str, bytes]
    """Name -> content of tokenizer.model and added_tokens.json in the folder that the model came from. llama.cpp's
    converter takes the scores of the pieces from the first, and without it makes a tokenizer that gives other ids. It
    looks for added pieces in the second if the configuration does not list them."""

    def family(self, config: ModelConfig) -> Family:
        """Family as which the model is written. Its name may tell other programs how to split texts."""
        return family_of(config, generic_tokenizer=self.tokenizer.class_name == GENERAL_CLASS)

    def warning(self, config: ModelConfig) -> str:
        """Sentence about programs that will split texts by other rules than the tokenizer's; empty: none will."""
        family = self.family(config)
        if self.tokenizer.class_name != GENERAL_CLASS or not family.names_tokenizer:
            return ""
        return (
            f"checkpoints are written as {family.model_type}, the only family that holds such a model, and from 5.8 on "
            f"transformers takes its tokenizer for that family's own: load it by PreTrainedTokenizerFast, not by "
            f"AutoTokenizer, which would split texts by other rules"
        )

    def save_tokenizer(self, directory: Path) -> None:
        """Write the tokenizer's folder."""
        self.tokenizer.save_pretrained(directory)
        for name, content in self.sentence_piece.items():
            if not (directory / name).exists():
                atomic_write(directory / name, content)
        if self.for_chat:
            _make_it_for_chat(self.tokenizer, directory)


def plan_export(
    for_chat: bool, tokenizer: Tokenizer, weights: Path | None, vocab_size: int, adapter: Path | None = None
) -> Export:
    """The tokens by which the run teaches to end a text; all else as in the model that it begins with.

    Args:
        for_chat: whether the model is taught to answer.
        weights: folder of that model; for a resumed run its checkpoint, which has kept all this. It is not read later.
        vocab_size: rows of the vocabulary that are not padding.
        adapter: folder of an adapter for that model, whose own files come first.
    Raises:
        ValueError: a file in that folder is not as it should be.
    """
    sentence_piece = {}
    if weights is None:
        source = GenerationConfig((), next(iter(tokenizer.begin_ids), None), tokenizer.special_ids.get(PAD))
    else:
        source = read_adapters_generation_config(weights, adapter) if adapter else read_generation_config(weights)
        holding = (folder for folder in (adapter, weights) if folder and (folder / _SENTENCE_PIECE).is_file())
        if folder := next(holding, None):
            kept = [path for name in (_SENTENCE_PIECE, _ADDED_TOKENS) if (path := folder / name).is_file()]
            sentence_piece = {path.name: path.read_bytes() for path in kept}
    ends = _ends_of_answers(tokenizer, template_of(tokenizer)) if for_chat else [tokenizer.eod_id]
    return Export(tokenizer, source.ending_with(ends), for_chat, vocab_size, sentence_piece)


def _make_it_for_chat(tokenizer: Tokenizer, directory: Path) -> None:
    """Add the chat template by which the model is taught to a tokenizer's folder, and name the end of an answer as its
    `eos_token`. The folders of Qwen's and Llama's chat models do so, and TRL's chat and llama.cpp look at nothing else.
    """
    template = template_of(tokenizer)
    if tokenizer.chat_template is None:
        atomic_write(directory / CHAT_TEMPLATE_NAME, template.source.encode())
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    # Early releases of transformers 4 look for it only here.
    values.setdefault("chat_template", template.source)
    end_id = template.end_id
    texts = {token_id: text for text, token_id in tokenizer.special_ids.items()}
    # A template that writes eos_token itself would lay conversations out differently with another one. And an end that
    # was added as text, or that is a piece within a text, would become a special token by this: the tokenizer would no
    # longer be the data's.
    is_apart = end_id in texts and texts[end_id] not in values.get(CONTROL_PIECES, [])
    if end_id != tokenizer.eod_id and "eos_token" not in template.source and is_apart:
        values["eos_token"] = texts[end_id]
        if END_OF_DOCUMENT not in tokenizer.special_ids:
            # For our own reader, documents end as before: the tokens belong to the same data.
            values["end_of_document"] = texts[tokenizer.eod_id]
    atomic_write_json(path, values)


def _ends_of_answers(tokenizer: Tokenizer, template: ChatTemplate) -> list[int]:
    """Tokens by which a model is taught to end an answer, first that of a last one; and the end of a document, which it
    may also know."""
    return list(dict.fromkeys([template.end_id, *sorted(template.stop_ids - {tokenizer.eod_id}), tokenizer.eod_id]))
