"""New tokens: rows that an embedding and a head grow by, and a way to train these rows alone.

A new row begins as the mean of the known ones. Then a new token's score is the mean of all scores, so that its
probability is at most the mean probability: with n new tokens beside V known ones, the loss of a known text grows by at
most log(1 + n / V). Small random rows have scores near 0, which is far above those of most tokens (Hewitt, 2021,
"Initializing New Word Embeddings for Pretrained Language Models").

If all else is frozen, new rows are a parameter of their own (n, C) that takes the place of the matrix's rows wherever
that is used; the matrix stays as it is. A tied matrix shares one. Names are PEFT's (trainable_token_indices):

    embed_tokens.token_adapter.trainable_tokens_delta     (which are the rows, not differences from the old ones)

PEFT resizes no model by itself. In front of such an adapter, its users write

    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(adapter)), mean_resizing=False)
    model = PeftModel.from_pretrained(model, adapter)

if the base has fewer rows than the adapter's tokenizer has entries.

For a loss, the head's matrix is copied with these rows, as PEFT does: V C values more, and as many of a gradient.

Shapes: B batch, T tokens, C hidden size, V vocabulary, n trained rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.decoder import Decoder
from model.dropout import DropoutKey
from model.families.family import EMBEDDING, HEAD
from model.linear import Head


def with_rows(matrix_VC: Tensor, ids: Sequence[int], rows_nC: Tensor) -> Tensor:
    """A copy of a matrix of the vocabulary with some rows replaced. It is longer if an id lies behind its end."""
    longer = grown_rows(matrix_VC, len(matrix_VC), max(0, max(ids, default=0) + 1 - len(matrix_VC)))
    return longer.index_copy_(0, torch.tensor(ids, device=longer.device), rows_nC.to(longer))


def grown_rows(matrix_VC: Tensor, first: int, count: int) -> Tensor:
    """A copy of a matrix of the vocabulary in which the rows from `first` on, `count` of them, are the mean of those
    before. It is longer if they lie behind its end."""
    assert first <= len(matrix_VC), "rows must not leave a gap"
    longer = matrix_VC.new_empty(max(len(matrix_VC), first + count), matrix_VC.shape[1])
    longer[: len(matrix_VC)] = matrix_VC
    if count:
        longer[first : first + count] = _mean_row(matrix_VC[:first])
    return longer


def _mean_row(matrix_VC: Tensor) -> Tensor:
    """(C,), in the dtype of the matrix."""
    return matrix_VC.mean(dim=0, dtype=torch.float64).to(matrix_VC.dtype)


def grow(model: Decoder, first: int, count: int) -> None:
    """Give a model without an adapter its first rows for new tokens.

    Args:
        first: entries of the vocabulary that the weights know.
        count: number of new tokens, which have the next ids. The model may have rows there already.
    """
    grow_modules(model.embed_tokens, model.lm_head, first, count)
    model.config = replace(model.config, vocab_size=len(model.embed_tokens.weight))


@torch.no_grad()
def grow_modules(embedding: nn.Module, head: nn.Module, first: int, count: int) -> None:
    """Give an embedding and a head, which may be tied, rows for new tokens; see `grow`."""
    assert isinstance(embedding, nn.Embedding) and isinstance(head, Head), "they have trained rows already"
    is_tied, trains = head.weight is embedding.weight, embedding.weight.requires_grad
    embedding.weight = nn.Parameter(grown_rows(embedding.weight, first, count), trains)
    head.weight = embedding.weight if is_tied else nn.Parameter(grown_rows(head.weight, first, count), trains)
    embedding.num_embeddings = head.out_features = len(embedding.weight)


def begin(model: Decoder, first: int, count: int, known: Callable[[str], Tensor], dtype: torch.dtype) -> None:
    """Give the rows for new tokens, which a model has already, their first values: those that `grow` gives.

    Args:
        first: entries of the vocabulary that the weights know.
        count: number of new tokens, which have the next ids.
        known: name of a matrix of the vocabulary -> the rows that the weights have.
        dtype: dtype in which the model computes.
    """
    layers: list[tuple[str, nn.Module | None]] = [(EMBEDDING, model.embed_tokens), (HEAD, model.lm_head)]
    for name, layer in layers[:1] if model.config.tie_word_embeddings else layers:
        if layer is None:
            # Another process holds it.
            continue
        mean_C = _mean_row(known(name)[:first].to(dtype))
        plain = layer.base_layer if isinstance(layer, WITH_ROWS) else layer
        model.filling.put(cast(Tensor, plain.weight), mean_C.expand(count, -1), first)
        if isinstance(layer, WITH_ROWS):
            # Only new tokens have such rows.
            rows = layer.token_adapter.trainable_tokens_delta
            model.filling.put(rows, mean_C.expand(model.filling.held(rows).shape[0], -1))


class TrainedRows(nn.Module):
    """Rows of a matrix of the vocabulary that are trained.

    Args:
        matrix_VC: has the first values, the device and the dtype.
        ids: tokens, each once.
    """

    ids: Tensor
    """(n,) int64."""
    places: Tensor
    """(V,) int64: place of a token among the trained ones; -1: it is not one."""

    def __init__(self, matrix_VC: Tensor, ids: Sequence[int]):
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(matrix_VC.detach()[list(ids)].clone())
        # An outline of a model has no values, but these are needed when it gets some.
        device = "cpu" if matrix_VC.is_meta else matrix_VC.device
        found = torch.tensor(ids, device=device)
        places = torch.full((len(matrix_VC),), -1, device=device)
        places[found] = torch.arange(len(found), device=device)
        self.register_buffer("ids", found, persistent=False)
        self.register_buffer("places", places, persistent=False)


class EmbeddingWithRows(nn.Module):
    """An embedding in which some rows are trained apart from the rest."""

    def __init__(self, base_layer: nn.Embedding, token_adapter: TrainedRows):
        super().__init__()
        self.base_layer, self.token_adapter = base_layer, token_adapter

    @property
    def weight(self) -> Tensor:
        """The matrix below (V, C); it tells device and dtype."""
        return self.base_layer.weight

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        """(B, T) -> (B, T, C)."""
        places_BT = self.token_adapter.places[input_ids_BT]
        rows_BTC = F.embedding(places_BT.clamp(min=0), self.token_adapter.trainable_tokens_delta)
        return torch.where((places_BT >= 0)[..., None], rows_BTC, self.base_layer(input_ids_BT))


class HeadWithRows(nn.Module):
    """A head in which some rows are trained apart from the rest. Its methods are those of model.linear.Head."""

    def __init__(self, base_layer: Head, token_adapter: TrainedRows):
        super().__init__()
        self.base_layer, self.token_adapter = base_layer, token_adapter

    def _trained_rows(self) -> Tensor:
        return self.base_layer.scaled(self.token_adapter.trainable_tokens_delta)

    def rows(self) -> Tensor:
        return self.base_layer.rows().index_copy(0, self.token_adapter.ids, self._trained_rows())

    def forward(self, hidden: Tensor, key: DropoutKey | None = None) -> Tensor:
        # Without a copy of the matrix, which would take longer than the scores of a single token.
        scores = self.base_layer(hidden, key)
        return scores.index_copy(-1, self.token_adapter.ids, F.linear(hidden, self._trained_rows()))

    def loss_sum(
        self, hidden: Tensor, labels: Tensor, grad_scale: float = 1.0, told: Tensor | None = None
    ) -> Tensor:
        return self.base_layer.ops.loss_sum(hidden, self.rows(), labels, grad_scale=grad_scale, told=told)

    def token_logprobs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        return self.base_layer.ops.token_logprobs(hidden, self.rows(), labels)


WITH_ROWS = (EmbeddingWithRows, HeadWithRows)


def train_rows(model: Decoder, ids: Sequence[int]) -> None:
    """Let these rows of a frozen model's embedding and head train.

    Args:
        ids: tokens, each once.
    Raises:
        ValueError: the model has no such row, or trains a whole matrix of the vocabulary.
    """
    embedding, head = model.embed_tokens, model.lm_head
    if embedding.weight.requires_grad or head.weight.requires_grad:
        raise ValueError(
            "new rows cannot be trained alone where the whole matrix is trained: give --train_added_tokens=all"
        )
    if not 0 <= min(ids) <= max(ids) < len(embedding.weight):
        raise ValueError(f"rows of the tokens {min(ids)} to {max(ids)} are to train: there are {len(embedding.weight)}")
    rows = TrainedRows(embedding.weight, ids)
    is_tied = head.weight is embedding.weight
    model.embed_tokens = EmbeddingWithRows(embedding, rows)  # type: ignore[assignment]
    model.lm_head = HeadWithRows(head, rows if is_tied else TrainedRows(head.weight, ids))  # type: ignore[assignment]
