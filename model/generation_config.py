"""The generation settings of a Hugging Face folder: which tokens end a text, and how the next one is drawn.

They stand in two files. transformers and vLLM take `generation_config.json` if there is one; other programs read only
`config.json`. Here both count: a text ends at every token that either of them names.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

from model.hf_files import read_json, shown

GENERATION_CONFIG = "generation_config.json"
_MARKS = ("_from_model_config", "transformers_version")
"""Notes of transformers about a file that it wrote; in a file of ours they would be untrue."""
_SETTINGS = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "do_sample", "early_stopping", "num_beams",
    "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens",
    "forced_eos_token_id",
}  # fmt: skip
"""Settings that stand in the config.json of folders older than generation_config.json. transformers still reads
them there."""


@dataclass(frozen=True)
class GenerationConfig:
    """Which tokens end and begin a text, and all other settings as they were found."""

    eos_ids: tuple[int, ...] = ()
    """Tokens that end a text."""
    bos_id: int | None = None
    """The token that begins one."""
    pad_id: int | None = None
    settings: dict[str, object] = field(default_factory=dict)
    """The rest of a generation_config.json, unchanged: temperature, top_p, repetition_penalty ..."""

    def ending_with(self, ids: Iterable[int]) -> "GenerationConfig":
        """The settings of a model that has also learnt to end texts with these tokens. They come first, since some
        readers take only one."""
        return replace(self, eos_ids=tuple(dict.fromkeys([*ids, *self.eos_ids])))

    @property
    def token_ids(self) -> dict[str, int | list[int] | None]:
        """Keys of a config.json. A null is written, too: transformers would fill in another id."""
        one_or_more = list(self.eos_ids) if len(self.eos_ids) > 1 else next(iter(self.eos_ids), None)
        return {"eos_token_id": one_or_more, "bos_token_id": self.bos_id, "pad_token_id": self.pad_id}

    def to_hf(self) -> dict[str, object]:
        """Content of a generation_config.json."""
        ids = {name: value for name, value in self.token_ids.items() if value is not None}
        # The settings' own beginning and padding count; their ends are among eos_ids.
        return ids | self.settings | {"eos_token_id": self.token_ids["eos_token_id"]}


def read_generation_config(directory: str | Path) -> GenerationConfig:
    """The settings of a folder with a config.json.

    Raises:
        ValueError: a value in one of the two files is wrong; file and key are named.
        OSError: a disk or a network fails, and may be back later.
    """
    model, settings = Path(directory) / "config.json", Path(directory) / GENERATION_CONFIG
    of_model = _read(model)
    if settings.exists():
        of_settings = _read(settings)
    else:
        of_settings = {key: value for key, value in of_model.items() if key in _SETTINGS and value is not None}
    eos_ids = [*_ids(of_settings, "eos_token_id", settings), *_ids(of_model, "eos_token_id", model)]
    others = {}
    for name in ("bos_token_id", "pad_token_id"):
        # Checked in both files; the model's own ids are those in its config.json.
        _id(of_settings, name, settings)
        others[name] = _id(of_model, name, model)
    kept = {key: value for key, value in of_settings.items() if key not in ("eos_token_id", *_MARKS)}
    return GenerationConfig(tuple(dict.fromkeys(eos_ids)), others["bos_token_id"], others["pad_token_id"], kept)


def read_adapters_generation_config(base: str | Path, adapter: str | Path) -> GenerationConfig:
    """The settings of a folder with an adapter: those of its base, and before them its own generation_config.json.

    Raises:
        ValueError, OSError: see read_generation_config.
    """
    of_base, path = read_generation_config(base), Path(adapter) / GENERATION_CONFIG
    if not path.exists():
        return of_base
    own = _read(path)
    settings = {key: value for key, value in own.items() if key not in ("eos_token_id", *_MARKS)}
    return replace(of_base, settings=of_base.settings | settings).ending_with(_ids(own, "eos_token_id", path))


def _read(path: Path) -> dict:
    values = read_json(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a dictionary, not {shown(values)}")
    try:
        json.dumps(values, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half a surrogate pair, which no file can hold: a checkpoint could not be saved.
        raise ValueError(f"{path} holds text that is not valid Unicode") from None
    return values


def _ids(values: dict, name: str, path: Path) -> list[int]:
    """One id or several, as `eos_token_id` may be given."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(map(_is_id, ids)):
        raise ValueError(f"{path}: {name} must be the id of a token or a list of them, not {shown(value)}")
    return ids


def _id(values: dict, name: str, path: Path) -> int | None:
    value = values.get(name)
    if value is not None and not _is_id(value):
        raise ValueError(f"{path}: {name} must be the id of a token, not {shown(value)}")
    return value


def _is_id(value: object) -> bool:
    # In Llamas of 2023, -1 means that there is no such token.
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value < 1 << 31
