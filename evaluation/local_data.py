"""Data sets of lm-eval's tasks: from local copies if there is a folder for them, from the hub otherwise.

    --data_dir D    D/OWNER/NAME      a copy of the dataset repository, for any task
                    D/gsm8k/...       the authors' files, for the data sets of published.py

Tasks ask `datasets.load_dataset`, which `data_from` replaces for a while. With a folder, nothing is downloaded and no
network is tried. Copies are read into memory, and leave no cache behind.
"""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from evaluation.published import Published, published
from evaluation.surroundings import replaced

_BUILDERS = ("json", "csv", "parquet", "arrow", "text")
"""Names by which a task's file means files, which it gives as `data_files`."""
_IGNORED = ("trust_remote_code", "cache_dir", "download_mode", "token", "streaming", "keep_in_memory")
_REACH_S = 10.0
_current: ContextVar["_Source | None"] = ContextVar("source of data sets", default=None)


class _Source:
    """Where data sets come from.

    Args:
        load: `datasets.load_dataset` itself.
    """

    def __init__(self, data_dir: Path | None, load: Callable[..., Any]):
        self._data_dir, self._load, self._known = data_dir, load, dict[str, Any]()

    def get(self, path: str, name: str | None, how: dict[str, Any]) -> Any:
        """A data set: split -> rows.

        Raises:
            ValueError: it is not there, or cannot be read.
        """
        key = repr((path, name, sorted(how.items(), key=lambda item: item[0])))
        if key not in self._known:
            self._known[key] = self._read(path, name, how)
        return self._known[key]

    def _read(self, path: str, name: str | None, how: dict[str, Any]) -> Any:
        if path in _BUILDERS or Path(path).is_dir():
            return self._in_memory(path, name, how)
        if self._data_dir is None:
            return self._fetch(path, name, how)
        copy = self._data_dir / path
        if copy.is_dir():
            return self._copy(copy, name, how)
        known = published(path, name or "")
        found = _authors_files(known, self._data_dir, name or "") if known else None
        if found is None:
            raise ValueError(f"the data of {_shown(path, name)} are not in {self._data_dir}: "
                             f"{_wanted(known, self._data_dir, path, name)}")  # fmt: skip
        if split := how.get("split"):
            return found[split]
        return found

    def _copy(self, folder: Path, name: str | None, how: dict[str, Any]) -> Any:
        """A copy of a dataset repository. Without its README.md, a part of it is the folder of that name."""
        if name and not (folder / "README.md").exists() and (folder / name).is_dir():
            return self._in_memory(str(folder / name), None, how)
        return self._in_memory(str(folder), name, how)

    def _in_memory(self, path: str, name: str | None, how: dict[str, Any]) -> Any:
        with TemporaryDirectory(prefix="datasets-") as cache:
            try:
                return self._load(path, name, cache_dir=cache, keep_in_memory=True, **how)
            except Exception as error:
                # The library raises errors of many kinds for files that it cannot read.
                raise ValueError(f"the data in {_shown(path, name)} cannot be read: {_first_line(error)}") from error

    def _fetch(self, path: str, name: str | None, how: dict[str, Any]) -> Any:
        """A data set of the hub, or of the cache that an earlier download filled."""
        from datasets.exceptions import DatasetNotFoundError

        with ExitStack() as stack:
            if not _reaches_hub():
                stack.enter_context(_offline())
            try:
                return self._load(path, name, **how)
            except (ConnectionError, OSError, DatasetNotFoundError, ValueError) as error:
                raise ValueError(
                    f"the data of {_shown(path, name)} cannot be fetched ({_first_line(error)}): give local copies by "
                    f"--data_dir D, with {_places(published(path, name or ''), Path('D'), path, name)}"
                ) from error


@contextmanager
def data_from(data_dir: Path | None) -> Iterator[None]:
    """While it lasts, data sets come from a folder; None: from the hub."""
    import datasets

    with ExitStack() as stack:
        source = _Source(data_dir, _original())
        token = _current.set(source)
        stack.callback(_current.reset, token)
        stack.enter_context(replaced(datasets, "load_dataset", load_dataset))
        if data_dir is not None:
            stack.enter_context(_offline())
        yield


def load_dataset(path: str, name: str | None = None, **how: Any) -> Any:
    """What tasks get as `datasets.load_dataset`. A task's module may keep it beyond `data_from`; then it is the
    library's own.

    Raises:
        ValueError: the data set is not there, or cannot be read.
    """
    source = _current.get()
    if source is None:
        return _original()(path, name, **how)
    return source.get(path, name, {key: value for key, value in how.items() if key not in _IGNORED})


def fingerprint(rows: Iterable[Any]) -> str:
    """Digest of rows, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def advice_for(data_dir: Path, path: str, name: str | None, split: str) -> str:
    """Where a split of a data set belongs."""
    known = published(path, name or "")
    if known and split in known.files and not (data_dir / path).is_dir():
        return str(data_dir / known.files[split][0].format(name=name or ""))
    return f"a file of the split in {data_dir / path}"


def _original() -> Callable[..., Any]:
    from datasets.load import load_dataset as original

    return original


def _authors_files(known: Published, data_dir: Path, name: str) -> Any:
    """Splits of which there are files; None: there is none."""
    from datasets import Dataset, DatasetDict

    splits = {}
    for split, places in known.files.items():
        paths = [data_dir / place.format(name=name) for place in places]
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            splits[split] = Dataset.from_list(_rows(known, path, name, split))
    return DatasetDict(splits) if splits else None


def _rows(known: Published, path: Path, name: str, split: str) -> list[dict[str, Any]]:
    try:
        rows = known.convert(path, name, split)
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing: it belongs beside {path}") from None
    except (ValueError, KeyError, TypeError, IndexError, EOFError, csv.Error) as error:
        raise ValueError(
            f"{path} is not as its authors published it ({type(error).__name__}: {_first_line(error)}): fetch it again"
        ) from None
    if not rows:
        raise ValueError(f"{path} holds no rows: fetch it again")
    return rows


def _shown(path: str, name: str | None) -> str:
    return f"{path} ({name})" if name else path


def _wanted(known: Published | None, data_dir: Path, path: str, name: str | None) -> str:
    return f"put there {_places(known, data_dir, path, name)}"


def _places(known: Published | None, data_dir: Path, path: str, name: str | None) -> str:
    """Both forms of a data set, and where they belong."""
    copy = f"a copy of the dataset repository as {data_dir / path}"
    if known is None:
        return copy
    places = dict.fromkeys(data_dir / places[0].format(name=name or "") for places in known.files.values())
    files = " and ".join(map(str, list(places)[:2]))
    return f"the authors' files as {files}, or {copy}"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0]).rstrip(".:")[:200] if lines else type(error).__name__


@contextmanager
def _offline() -> Iterator[None]:
    """While it lasts, the libraries try no network."""
    import datasets
    from huggingface_hub import constants

    with replaced(constants, "HF_HUB_OFFLINE", True), replaced(datasets.config, "HF_HUB_OFFLINE", True):
        yield


def _reaches_hub() -> bool:
    """Whether the hub answers at all. The libraries would try for minutes."""
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_REACH_S)
    except OfflineModeIsEnabled:
        return False
    except Exception:
        # Each version of the hub's client has its own kind of error for a missing network.
        return False
    return True
