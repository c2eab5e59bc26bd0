"""zero_bits_per_byte: how well the model predicts documents of several domains, and a user's own.

Bits per byte compare models of different tokenizers. A document is scored in windows of the model's whole context, as
in lm-eval. The overall figure weighs bytes, and is over our domains alone: a user's texts do not change it.
"""

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evaluation.asking import Answerer
from evaluation.own.documents import DOMAINS, Document, documents
from evaluation.own.outcomes import Record, fingerprint, outcome
from evaluation.own.questions import scores_of
from evaluation.own.rolling import windows
from evaluation.results import Figure
from evaluation.task import Options, Outcome
from utils.paths import absent


class BitsPerByteTask:
    name, version = "zero_bits_per_byte", "1"
    needs_writing = runs_code = False
    takes_examples = False

    def run(self, answerer: Answerer, options: Options) -> Outcome:
        """
        Raises:
            ValueError: a user's text cannot be used.
            OSError: it cannot be read.
        """
        begun = time.monotonic()
        own = documents()
        # A user's texts would otherwise be the last, and never be among the first so many.
        found = own[: options.limit] + list(_users(options.texts, options.limit))
        tokenizer = answerer.tokenizer
        ids = tokenizer.encode_batch([document.text for document in found], num_threads=1)
        begin = tokenizer.begin_ids or [tokenizer.eod_id]
        asked = [list(windows(one, begin, answerer.context)) for one in ids]
        scores = iter(scores_of(answerer, [window for one in asked for window in one]))
        samples: list[Record] = [
            {"domain": document.domain, "document": document.name, "begins": document.text[:200],
             "bytes": len(document.text.encode()), "tokens": len(tokens),
             "bits": math.fsum(-next(scores).logprob for _ in one) / math.log(2)}
            for document, tokens, one in zip(found, ids, asked)
        ]  # fmt: skip
        by_domain: dict[str, list[Record]] = {}
        for sample in samples:
            by_domain.setdefault(sample["domain"], []).append(sample)
        ours = [by_domain[domain] for domain in DOMAINS if domain in by_domain]
        figures = {"bits_per_byte": overall(ours)} if ours else {}
        figures |= {
            f"bits_per_byte/{domain}": ratio(one)
            for domain, one in by_domain.items() if any(sample["bytes"] for sample in one)
        }  # fmt: skip
        settings = {"python": platform.python_version()}
        if missing := [domain for domain in DOMAINS if domain not in {document.domain for document in own}]:
            settings["missing"] = f"this Python has no files for {', '.join(missing)}"
        data = fingerprint([list(document) for document in found])
        return outcome(self, options, begun, figures, samples, data, **settings)


def ratio(samples: Sequence[Record]) -> Figure:
    """Bits a byte over documents of different lengths, of which there is at least one byte. The standard error is that
    of a ratio of two sums, by the delta method (Cochran, Sampling Techniques, 1977, chapter 6)."""
    count, size = len(samples), sum(sample["bytes"] for sample in samples)
    value = math.fsum(sample["bits"] for sample in samples) / size
    error = None
    if count > 1:
        squares = math.fsum((sample["bits"] - value * sample["bytes"]) ** 2 for sample in samples)
        error = math.sqrt(squares * count / (count - 1)) / size
    return Figure(value, error, count, False)


def overall(domains: Sequence[Sequence[Record]]) -> Figure:
    """Bits a byte over several domains. Other documents would be drawn within each of them, and the domains' shares
    kept, so that differences between domains are no error."""
    figures = [ratio(samples) for samples in domains]
    sizes = [sum(sample["bytes"] for sample in samples) for samples in domains]
    value = math.fsum(size * figure.value for size, figure in zip(sizes, figures)) / sum(sizes)
    errors = [figure.error for figure in figures if figure.error is not None]
    error = None
    if len(errors) == len(figures):
        error = math.hypot(*(size * error for size, error in zip(sizes, errors))) / sum(sizes)
    return Figure(value, error, sum(figure.count for figure in figures), False)


def _users(texts: Mapping[str, Path], limit: int | None) -> Iterator[Document]:
    """A user's documents, the first `limit` of each domain."""
    for domain, path in texts.items():
        if domain in DOMAINS:
            raise ValueError(f"--texts: {domain} is a domain of ours: take another name than {', '.join(DOMAINS)}")
        if not path.exists():
            raise ValueError(f"--texts: {absent(str(path))}")
        found = (document for file in _files_of(path) for document in _documents_of(domain, file))
        filled = [document for document in found if document.text]
        if not filled:
            raise ValueError(f"--texts: there is no text in {path}")
        yield from filled[:limit]


def _files_of(path: Path) -> list[Path]:
    """The file, or those of a folder by their names, without hidden ones."""
    if path.is_file():
        return [path]
    return sorted(
        one for one in path.rglob("*")
        if one.is_file() and not any(part.startswith(".") for part in one.relative_to(path).parts)
    )  # fmt: skip


def _documents_of(domain: str, file: Path) -> Iterator[Document]:
    """A file is a document; a line of a .jsonl file is one, too, in its field "text"."""
    try:
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"--texts: {file} is not text in UTF-8: convert it, or name a folder without "
                         f"it") from None  # fmt: skip
    if file.suffix != ".jsonl":
        yield Document(domain, file.name, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield Document(domain, f"{file.name} line {number}", _text_of(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValueError(f'--texts: {file} line {number} must be a record such as {{"text": "..."}}') from None


def _text_of(line: str) -> str:
    text = json.loads(line)["text"]
    # JSON can spell half a surrogate pair, which has no bytes.
    text.encode()
    return text
