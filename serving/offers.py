"""The names under which a loaded model and its adapters are offered."""

import time
from pathlib import Path

from checkpoint.folder import MANIFEST
from model.adapters.folder import is_adapter
from serving.catalog import Offer
from serving.loading import Served, Speech
from tokenizer import Tokenizer
from tokenizer.chat_template import ChatTemplate, template_of
from utils.small_files import is_number

_HINTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def offers_of(served: Served, path: Path, name: str) -> list[Offer]:
    """The model without an adapter, then its adapters; an adapter that is in use already comes first, since it is what
    the user has named.

    Args:
        path: its checkpoint or folder.
        name: of the model, or of the adapter in `path` if it holds one.
    """
    step, created = step_of(path), int(time.time())
    templates: dict[str, tuple[ChatTemplate | None, str]] = {}

    def offer(adapter: str | None, shown: str, parent: str | None) -> Offer:
        speech = served.speech_of(adapter)
        key = speech.tokenizer.fingerprint + (speech.tokenizer.chat_template or "")
        if key not in templates:
            templates[key] = _template_of(speech.tokenizer)
        template, why_not = templates[key]
        return Offer(
            shown, adapter, parent, speech.tokenizer, speech.stop_ids, served.model.config.max_position_embeddings,
            template, why_not, step, created, _hints(speech),
        )  # fmt: skip

    # An adapter in `path` is called as its folder; clients know it by the name that the user gave.
    own = served.names[0] if is_adapter(path) else None
    base = name if own is None else f"{name}-base"
    others = [offer(one, one, base) for one in served.names if one != own]
    model = offer(None, base, None)
    return [model, *others] if own is None else [offer(own, name, base), model, *others]


def step_of(path: Path) -> int | None:
    """Step of a checkpoint; None for any other folder."""
    number = path.name.removeprefix("step-")
    return int(number) if (path / MANIFEST).exists() and number.isdigit() else None


def _template_of(tokenizer: Tokenizer) -> tuple[ChatTemplate | None, str]:
    """The chat template, or why there is none."""
    try:
        return template_of(tokenizer), ""
    except ValueError as error:
        return None, str(error)


def _hints(speech: Speech) -> dict[str, float]:
    """Settings that a client may want to begin with."""
    return {name: value for name in _HINTS if is_number(value := speech.settings.get(name), 0, 1000)}
