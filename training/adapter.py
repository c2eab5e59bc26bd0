"""The adapter of a run: which one, on which base, and whether they belong together."""

from collections.abc import Set
from dataclasses import dataclass, fields, replace
from pathlib import Path

from checkpoint.choosing import resolve_checkpoint_dir
from model import ModelConfig, hf
from model.adapters import folder, lora, peft
from model.adapters.config import AdapterConfig
from model.adapters.folder import Weights
from model.adapters.lora import LoraSpec
from parallel.context import DistContext
from training.config import RunConfig
from utils.files import sha256_of_file

_OF_TRAINING = {
    "vocab_size", "max_position_embeddings", "initializer_range", "hidden_dropout", "attention_dropout",
    "residual_in_fp32", "router_aux_loss_coef", "router_aux_loss", "router_z_loss_coef",
}  # fmt: skip
"""Fields that an adapter's run may change, since who uses the adapter need not know them. All else is the base's, whose
config.json counts."""
_FLAGS = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")
_NAMES = ("lora_target_modules", "lora_modules_to_save")


@dataclass(frozen=True)
class Adapter:
    """What a run trains instead of all weights."""

    spec: LoraSpec
    loaded_from: Path | None
    """Folder of the adapter that it goes on with; None: it is new."""
    base: Path
    """Folder of the weights that it is for."""
    fingerprint: str
    """Of these weights."""
    is_known_base: bool
    """Whether the adapter that it goes on with says what weights it is for, and they are these."""

    def in_config(self, config: AdapterConfig) -> AdapterConfig:
        """The options with those of this adapter, so that the run's configuration says what it trains."""
        spec = self.spec
        return replace(
            config, lora_r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout, use_rslora=spec.use_rslora,
            use_dora=spec.use_dora, lora_target_modules=",".join(spec.targets),
            lora_modules_to_save=",".join(spec.modules_to_save),
        )  # fmt: skip


def first_weights(run: RunConfig, adapter: str = "") -> Weights | None:
    """The weights that --init_from names, with --adapter if it is given; None: new weights.

    Args:
        adapter: folder of an adapter, a run or a checkpoint.
    Raises:
        ValueError: a folder cannot be used, or they do not go together.
    """
    if not run.init_from:
        return None
    found = resolve_checkpoint_dir(Path(run.init_from))
    return folder.weights_of(found, resolve_checkpoint_dir(Path(adapter)) if adapter else None)


def resumed_weights(run: RunConfig, given: Set[str], checkpoint: Path) -> Weights:
    """The weights of a checkpoint that a run goes on from; an adapter's base is the one that it names, unless another
    place of it is given.

    A command that is only repeated with --resume gives no other place: it names the run of which the base is a
    checkpoint, even if that has newer ones now, or what the run began with, even if that is gone.

    Args:
        given: names of the flags that were given.
    Raises:
        ValueError: the base is gone.
    """
    if not folder.is_adapter(checkpoint):
        return Weights(checkpoint)
    note = folder.read_note(checkpoint)
    noted = Path(note.base) if note is not None and Path(note.base).exists() else None
    if "init_from" in given and not (noted is not None and noted.is_relative_to(Path(run.init_from).resolve())):
        try:
            first = first_weights(run)
        except ValueError:
            if noted is None:
                raise
        else:
            assert first is not None
            return Weights(first.base, checkpoint)
    return Weights(folder.base_of(checkpoint, "give the place of these weights with --init_from"), checkpoint)


def plan_adapter(
    config: AdapterConfig, given: Set[str], shape: ModelConfig, weights: Weights | None, is_resumed: bool,
    context: DistContext, new_rows: range = range(0),
) -> Adapter | None:  # fmt: skip
    """The run's adapter, if it trains one. Collective.

    Args:
        given: names of the flags that were given.
        shape: the model's.
        weights: what it begins with.
        is_resumed: it is a checkpoint of this run.
        new_rows: tokens that the weights do not know.
    Raises:
        ValueError: it cannot be trained, contradicts the flags, or is for another base.
    """
    if weights is None or (weights.adapter is None and not config.is_used):
        if config.is_used:
            raise ValueError("an adapter needs weights to stand on: give --init_from")
        if config.load_in_4bit:
            raise ValueError("--load_in_4bit freezes the weights: give --lora_r, so that something trains")
        if idle := [n for n in (*_FLAGS, *_NAMES) if n in given and getattr(config, n) not in (None, False)]:
            # All weights would train, at a rate that is meant for an adapter.
            raise ValueError(f"--{idle[0]} is for an adapter: give --lora_r, too, or leave it out to train all weights")
        return None
    if weights.adapter is None and is_resumed:
        raise ValueError(
            f"the run was begun without an adapter: leave out its flags, or begin a new run with --init_from="
            f"{weights.base}"
        )
    _require_bases_config(shape, weights.base)
    if weights.adapter is None:
        spec = LoraSpec.of(config, new_rows)
        if spec.r > shape.hidden_size:
            raise ValueError(
                f"--lora_r={spec.r} is more than the rank of any matrix of the model, at most {shape.hidden_size}: 8 "
                f"to 64 are usual"
            )
    else:
        spec = folder.check(shape, weights.adapter)
        compared = {*_FLAGS, *_NAMES} if is_resumed and config.lora_r is not None else given
        _require_same_adapter(config, compared, spec, shape, weights.adapter)
    outline = hf.outline(shape)
    lora.attach(outline, spec, seed=0)
    # Asked before the training: otherwise the first save would fail.
    folder.saved_files(outline, spec, weights.base, "")
    fingerprint = _fingerprint(weights, context)
    is_known = folder.require_base(weights, fingerprint)
    return Adapter(spec, weights.adapter, weights.base.resolve(), fingerprint, is_known)


def as_it_began(adapter: Adapter, run: RunConfig, first: str, shape: ModelConfig) -> Adapter:
    """The adapter with the values that the run began with, if these are still there: those of a reference. A resumed
    run's own values replace them later.

    Args:
        first: --adapter.
        shape: the model's.
    """
    try:
        weights = first_weights(run, first)
        began_with = weights.adapter if weights is not None else None
        is_alike = began_with is None or folder.check(shape, began_with) == adapter.spec
    except ValueError:
        return adapter
    return replace(adapter, loaded_from=began_with) if is_alike else adapter


def _require_bases_config(shape: ModelConfig, base: Path) -> None:
    """
    Raises:
        ValueError: the model differs from the base by more than its training, which no file of an adapter would tell.
    """
    stored = hf.read_config(base)
    for field in fields(ModelConfig):
        asked, has = getattr(shape, field.name), getattr(stored, field.name)
        if field.name not in _OF_TRAINING and asked != has:
            raise ValueError(
                f"--{field.name}={asked}: an adapter is for its base as it is, which has {has}: leave it out"
            )


def _require_same_adapter(
    config: AdapterConfig, names: Set[str], spec: LoraSpec, shape: ModelConfig, adapter: Path
) -> None:
    """
    Args:
        names: flags that count.
    Raises:
        ValueError: they describe another adapter than the one in the folder.
    """
    of_folder = Adapter(spec, None, adapter, "", False).in_config(config)
    for name in (*_FLAGS, *_NAMES):
        asked, has = getattr(config, name), getattr(of_folder, name)
        if name in names and asked != has and not (name in _NAMES and _means_same(of_folder, name, asked, shape)):
            raise ValueError(
                f"--{name}={asked} does not fit the adapter in {adapter}, which has {'none' if has == '' else has}: "
                f"leave it out"
            )
    if config.add_tokens and (config.train_added_tokens == "new") != bool(spec.token_ids):
        has = "new rows alone" if spec.token_ids else "all rows"
        raise ValueError(
            f"--train_added_tokens={config.train_added_tokens} does not fit the adapter in {adapter}, which trains "
            f"{has}: leave it out"
        )


def _means_same(has: AdapterConfig, name: str, asked: str, shape: ModelConfig) -> bool:
    """Whether names that are asked for, such as all-linear, mean the same parameters as those of an adapter.

    Args:
        name: of the flag that gives them.
    """
    trained = []
    for each in (replace(has, **{name: asked}), has):
        model = hf.outline(shape)
        lora.attach(model, LoraSpec.of(each), seed=0)
        trained.append({*peft.adapted_layers(model), *peft.whole_parameters(model)})
    return trained[0] == trained[1]


def _fingerprint(weights: Weights, context: DistContext) -> str:
    """The base's fingerprint; one rank of each node reads it. Collective.

    Raises:
        ValueError: the nodes have different weights.
    """

    def of_node() -> list[str] | None:
        if context.local_rank != 0:
            return None
        adapters = [sha256_of_file(weights.adapter / folder.TENSORS)] if weights.adapter is not None else []
        return [folder.fingerprint(weights.base), *adapters]

    found = [fingerprints for fingerprints in context.gather_from(of_node) if fingerprints is not None]
    if any(fingerprints != found[0] for fingerprints in found):
        raise ValueError(f"the nodes hold different weights in {weights.told}: copy the same to all of them")
    return found[0][0]
