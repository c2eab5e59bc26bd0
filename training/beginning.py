"""What a run's model begins with: weights, an adapter, rows of added tokens, and the shape that follows from them."""

from dataclasses import dataclass, replace
from pathlib import Path

from model import ModelConfig
from model.adapters.folder import Weights
from parallel.context import DistContext
from tokenizer import Tokenizer
from training.adapter import Adapter, as_it_began, plan_adapter
from training.added_tokens import added_tokens, rows_of, rows_to_add
from training.build_model import choose_shape, find_weights
from training.config import Config


@dataclass(frozen=True)
class Beginning:
    """Plain data, decided before a weight is read."""

    source: Weights | None
    """Folders of the weights; None: they are new."""
    shape: ModelConfig
    adapter: Adapter | None
    """What is trained instead of the model's own weights."""
    new_rows: range
    """Tokens whose rows the weights lack, or have but never trained."""

    @property
    def base(self) -> Path | None:
        """Folder of the model's own weights."""
        return self.source.base if self.source is not None else None

    @property
    def adapter_dir(self) -> Path | None:
        """Folder of the adapter that the run goes on with."""
        return self.source.adapter if self.source is not None else None


def find_beginning(
    config: Config, given: frozenset[str], context: DistContext, resumed_from: Path | None, tokenizer: Tokenizer
) -> Beginning:
    """What the run begins with. Collective.

    Args:
        given: names of the flags that were given.
        resumed_from: folder of the model that a resumed run goes on with; None for a new run.
        tokenizer: the data's.
    Raises:
        ValueError: something is missing, contradicts the flags or does not go together.
    """
    run, is_resumed = config.run, resumed_from is not None
    # A resumed run's checkpoint knows them.
    added = added_tokens(run, config.adapter, tokenizer)
    added = [] if is_resumed else added
    source = find_weights(run, config.adapter, given, resumed_from, tokenizer, added)
    has_adapter = config.adapter.is_used or (source is not None and source.adapter is not None)
    shape = choose_shape(
        config.model, run, given, source.base if source is not None else None, is_resumed and not has_adapter,
        tokenizer.vocab_size, config.data.max_seq_len, has_adapter,
        least_rows=tokenizer.vocab_size if added else rows_of(source),
    )  # fmt: skip
    new_rows = rows_to_add(source, shape, tokenizer.vocab_size, len(added))
    adapter = plan_adapter(config.adapter, given, shape, source, is_resumed, context, new_rows)
    if adapter is not None and is_resumed and run.task.needs_weights:
        # The reference may have to be computed again.
        adapter = as_it_began(adapter, run, config.adapter.adapter, shape)
    return Beginning(source, shape, adapter, new_rows)


def with_adapter(config: Config, adapter: Adapter | None, is_resumed: bool) -> Config:
    """The configuration with the options of an adapter that brought its own, so that it says what the run trains."""
    if adapter is None or (is_resumed and config.adapter.lora_r is not None):
        return config
    return replace(config, adapter=adapter.in_config(config.adapter))
