"""SentencePiece models of others whose pieces share scores: the `sentencepiece` library itself encodes them.

SentencePiece's BPE joins the neighbours whose piece has the best score, and among equal scores the leftmost. A
`tokenizer.json` ranks all merges, so that there are no equals. Vocabularies to which pieces were added later have
thousands with a score of 0 (Yuan 2, many Chinese Llamas): there, one line in a hundred gets other ids from a
`tokenizer.json`, in every version of transformers. The saved folder therefore keeps the `tokenizer.model`, and says in
its tokenizer_config.json that it decides; AutoTokenizer reads the tokenizer.json beside it all the same.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from tokenizer.base import any_of
from tokenizer.hf_bbpe import HFBBPETokenizer
from utils.files import atomic_write

DECIDED_BY = "ids_decided_by"
"""Key of ours in a tokenizer_config.json, with the value MODEL."""
MODEL = "tokenizer.model"


def has_equal_scores(processor: SentencePieceProcessor, definition: Mapping) -> bool:
    """Whether two pieces that merges make have the same score.

    Args:
        definition: `tokenizer.json` made of the model.
    """
    merges = (merge.split(" ") if isinstance(merge, str) else merge for merge in definition["model"].get("merges", []))
    made = {"".join(merge) for merge in merges}
    return len({processor.get_score(processor.piece_to_id(piece)) for piece in made}) < len(made)


class ForeignSPTokenizer(HFBBPETokenizer):
    """A tokenizer whose plain text goes through a SentencePiece model. All else is as in its `tokenizer.json`."""

    def __init__(self, definition: str, config: dict, chat_template: str | None, model: bytes):
        """
        Args:
            model: content of the `tokenizer.model`.
            (others: see the base class)
        Raises:
            ValueError: see the base class.
        """
        super().__init__(definition, config, chat_template)
        self._model, self._processor = model, SentencePieceProcessor(model_proto=model)
        self._special = frozenset(self.special_ids.values())
        self._puts_blank = self._processor.encode("x", out_type=str)[0].startswith("▁")
        both = self.fingerprint + hashlib.sha256(model).hexdigest()
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str], num_threads: int = 0) -> list[list[int]]:
        texts = list(texts)
        batch = self._processor.encode(texts, num_threads=num_threads or -1)
        added = any_of(self.added_ids) if self.added_ids else None
        # The base class knows that no text makes a control token, and finds what was added.
        others = [
            index
            for index, ids in enumerate(batch)
            if not self._special.isdisjoint(ids) or (added and added.search(texts[index]))
        ]
        for index, ids in zip(others, super().encode_batch([texts[index] for index in others], num_threads)):
            batch[index] = ids
        return batch

    def encode_pieces(
        self, pieces: Sequence[tuple[str, bool]], also: frozenset[str] = frozenset()
    ) -> tuple[list[int], list[int]]:
        """Ids of a laid-out text, see the base class: between two control tokens, a text is encoded by itself."""
        ids: list[int] = []
        counts = [0] * len(pieces)
        for is_plain, group in groupby(self._parts(pieces, also), lambda part: part[2] is None):
            parts = list(group)
            if not is_plain:
                for number, _, token_id in parts:
                    ids.append(token_id)
                    counts[number] += 1
                continue
            new = self._remembered(["".join(text for _, text, _ in parts)])[0]
            ends = list(accumulate(len(text.replace("▁", " ").encode("utf-8")) for _, text, _ in parts))
            places = list(accumulate((self._lengths[token_id] for token_id in new), initial=-self._puts_blank))
            if places[-1] != ends[-1]:
                return super().encode_pieces(pieces, also)
            ids += new
            place = 0
            for end in places[1:]:
                while ends[place] < end:
                    place += 1
                counts[parts[place][0]] += 1
        return ids, counts

    @cached_property
    def _lengths(self) -> list[int]:
        return self.token_byte_lengths()

    def with_tokens(self, tokens: Sequence[str]) -> "ForeignSPTokenizer":
        return ForeignSPTokenizer(*self._parts_with(tokens), self._chat_template, self._model)

    def save_pretrained(self, directory: str | Path) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        atomic_write(Path(directory) / MODEL, self._model)
        super().save_pretrained(directory)
