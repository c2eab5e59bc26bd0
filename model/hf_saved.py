"""The files of a model's weights: one or several parts with an index, and the padding of the vocabulary.

A vocabulary is padded for its training, since matrix kernels like round numbers of rows. Other programs must not see
the padding, or they would draw tokens that the tokenizer does not have. So a folder holds exactly the tokenizer's rows,
and the others are beside it in a file of their own. A resumed run has them back to the bit; whoever only begins with
the weights does without them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from model.config import ModelConfig
from model.families.family import Family, Rule
from model.hf import converted, cut, vocabulary_rows, written_rules
from model.hf_files import PADDING, index_of, split_into_files


@dataclass(frozen=True)
class SavedFile:
    """A file that is to be written."""

    name: str
    parameters: dict[str, Tensor]
    """Whole parameters of which it holds something, by our names."""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    """These, or copies of them -> the file's tensors. Fused tensors exist only from here on, those of one file at a
    time; others are views."""


def deal_out(files: Sequence[SavedFile], hands: int) -> list[list[SavedFile]]:
    """The files for each of so many writers, so that all hold about the same: the largest first, each to the one that
    holds the least so far (Graham, 1969: at most 4/3 of what the best deal gives the fullest)."""
    dealt: list[list[SavedFile]] = [[] for _ in range(hands)]
    held = [0] * hands
    sizes = {file.name: sum(p.numel() * p.element_size() for p in file.parameters.values()) for file in files}
    for file in sorted(files, key=lambda file: -sizes[file.name]):
        hand = held.index(min(held))
        dealt[hand].append(file)
        held[hand] += sizes[file.name]
    return dealt


def saved_files(
    config: ModelConfig, parameters: Mapping[str, Tensor], family: Family, vocab_size: int, max_bytes: int
) -> tuple[list[SavedFile], dict[str, object] | None]:
    """The files of a model's weights, and the content of their index if there are several.

    Args:
        config: the model's.
        parameters: all of its parameters, or tensors like them without values.
        vocab_size: rows of the vocabulary that are not padding.
        max_bytes: see split_into_files.
    """
    rules = written_rules(family, replace(config, vocab_size=vocab_size), list(parameters))
    rows = vocabulary_rows(family, parameters, slice(vocab_size))
    # Without values, so that it takes neither memory nor time.
    written = _tensors(rules, rows, None, {name: parameter.to("meta") for name, parameter in parameters.items()})
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in written.items()}
    split, files = split_into_files(sizes, max_bytes), []
    for name, wanted in split.items():
        its_rules = [rule for rule in rules if not set(wanted).isdisjoint(rule.theirs)]
        its_parameters = {ours: parameters[ours] for rule in its_rules for ours in rule.ours}
        files.append(SavedFile(name, its_parameters, partial(_tensors, its_rules, rows, set(wanted))))
    if vocab_size < config.vocab_size:
        padding = vocabulary_rows(family, parameters, slice(vocab_size, None))
        files.append(SavedFile(PADDING, {name: parameters[name] for name in padding}, partial(cut, rows=padding)))
    num_parameters = sum(tensor.numel() for tensor in written.values())
    index = index_of(split, num_parameters, sum(sizes.values())) if len(split) > 1 else None
    return files, index


def _tensors(
    rules: list[Rule], rows: Mapping[str, slice], wanted: set[str] | None, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Tensors of a folder.

    Args:
        rows: parameter -> its rows in the folder, if these are not all.
        wanted: their names; None: all of the rules.
    """
    found = converted({**parameters, **cut(parameters, rows)}, rules)
    return {name: tensor for name, tensor in found.items() if wanted is None or name in wanted}
