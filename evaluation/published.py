"""Data sets as their authors published them, turned into the rows of the dataset repositories that tasks name.

| data set         | files, in --data_dir                                                                       |
|------------------|--------------------------------------------------------------------------------------------|
| HumanEval        | humaneval/HumanEval.jsonl or .jsonl.gz; HumanEvalPlus.jsonl                                |
| MBPP             | mbpp/mbpp.jsonl                                                                            |
| GSM8K            | gsm8k/test.jsonl, and gsm8k/train.jsonl for the examples                                   |
| BIG-Bench Hard   | bbh/navigate.json ...                                                                      |
| AGIEval          | agieval/sat-math.jsonl ... (data/v1 of the repository)                                     |
| MMLU             | mmlu/test/anatomy_test.csv ..., and mmlu/dev/anatomy_dev.csv ... for the examples          |
| C-Eval           | ceval/val/law_val.csv ..., and ceval/dev/law_dev.csv ... for the examples                  |
| BoolQ            | boolq/val.jsonl (SuperGLUE) or boolq/dev.jsonl, and boolq/train.jsonl for examples         |
| HellaSwag        | hellaswag/hellaswag_val.jsonl, and hellaswag_train.jsonl for examples                      |
| PIQA             | piqa/valid.jsonl and valid-labels.lst (or dev.jsonl, dev-labels.lst), train.jsonl likewise |
"""

import csv
import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Convert = Callable[[Path, str, str], list[Row]]
"""(File, name of the part, split) -> rows."""


@dataclass(frozen=True)
class Published:
    """A data set."""

    files: Mapping[str, Sequence[str]]
    """Split of the dataset repository -> paths, of which the first that is there is read. "{name}" is the part's."""
    convert: Convert


def published(dataset: str, name: str) -> Published | None:
    """What is known of a dataset repository, or of its part of this name."""
    if dataset.startswith(_AGIEVAL):
        return Published({"test": [f"agieval/{dataset.removeprefix(_AGIEVAL)}.jsonl"]}, _agieval)
    return _KNOWN.get((dataset, name)) or _KNOWN.get((dataset, "*"))


def _lines(path: Path) -> Iterator[Row]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _columns(*names: str) -> Convert:
    """Rows that have these columns already."""
    return lambda path, name, split: [{column: row[column] for column in names} for row in _lines(path)]


def _bbh(path: Path, name: str, split: str) -> list[Row]:
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    return [{"input": row["input"], "target": row["target"]} for row in examples]


_CHINESE = ("logiqa-zh", "jec-qa-kd", "jec-qa-ca", "gaokao-chinese", "gaokao-geography", "gaokao-history",
            "gaokao-biology", "gaokao-chemistry", "gaokao-physics", "gaokao-mathqa", "gaokao-mathcloze")  # fmt: skip


def _agieval(path: Path, name: str, split: str) -> list[Row]:
    """The authors' prompts without examples (src/dataset_loader.py of their repository)."""
    is_chinese, rows = path.stem in _CHINESE, []
    for row in _lines(path):
        begin = (row["passage"] or "") + ("问题：" if is_chinese else "Q: ") + row["question"]
        options = row.get("options")
        if not options:
            query = begin + ("\n答案：" if is_chinese else "\nA: The answer is")
            rows.append({"query": query, "answer": str(row["answer"])})
            continue
        last = "ABCDEFG"[len(options) - 1]
        if is_chinese:
            query = f"{begin} 选项：{' '.join(options)}\n答案：从A到{last}, 我们应选择"
        else:
            query = f"{begin} Answer Choices: {' '.join(options)}\nA: Among A through {last}, the answer is"
        gold = ["ABCDEFG".index(letter) for letter in row["label"]]
        rows.append({"query": query, "choices": options, "gold": gold})
    return rows


def _mmlu(path: Path, name: str, split: str) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {"question": row[0], "subject": name, "choices": row[1:5], "answer": "ABCD".index(row[5])}
            for row in csv.reader(file) if row
        ]  # fmt: skip


def _ceval(path: Path, name: str, split: str) -> list[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return [
            {column: row[column] for column in ("question", "A", "B", "C", "D", "answer")}
            for row in csv.DictReader(file)
        ]


def _boolq(path: Path, name: str, split: str) -> list[Row]:
    return [
        {"question": row["question"], "passage": row["passage"], "idx": number,
         "label": int(row["label"] if "label" in row else row["answer"])}
        for number, row in enumerate(_lines(path))
    ]  # fmt: skip


def _hellaswag(path: Path, name: str, split: str) -> list[Row]:
    columns = ("ind", "activity_label", "ctx_a", "ctx_b", "ctx", "endings")
    return [{column: row[column] for column in columns} | {"label": str(row["label"])} for row in _lines(path)]


def _piqa(path: Path, name: str, split: str) -> list[Row]:
    labels = path.with_name(f"{path.stem}-labels.lst").read_text(encoding="utf-8").split()
    rows = list(_lines(path))
    if len(labels) != len(rows):
        raise ValueError(f"{len(labels)} labels for {len(rows)} questions")
    columns = ("goal", "sol1", "sol2")
    return [{column: row[column] for column in columns} | {"label": int(one)} for row, one in zip(rows, labels)]


_MBPP_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
"""First and last `task_id`, from the authors' README."""


def _mbpp(path: Path, name: str, split: str) -> list[Row]:
    first, last = _MBPP_SPLITS[split]
    columns = ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list")
    return [{column: row[column] for column in columns} for row in _lines(path) if first <= row["task_id"] <= last]


_AGIEVAL = "hails/agieval-"
_HUMANEVAL = _columns("task_id", "prompt", "entry_point", "canonical_solution", "test")
_MMLU = Published(
    {split: [f"mmlu/{folder}{short}/{{name}}_{short}.csv" for folder in ("", "data/")]
     for split, short in (("test", "test"), ("dev", "dev"), ("validation", "val"))},
    _mmlu,
)  # fmt: skip
_KNOWN: dict[tuple[str, str], Published] = {
    ("openai/openai_humaneval", "*"): Published(
        {"test": ["humaneval/HumanEval.jsonl", "humaneval/HumanEval.jsonl.gz"]}, _HUMANEVAL
    ),
    ("evalplus/humanevalplus", "*"): Published(
        {"test": ["humaneval/HumanEvalPlus.jsonl", "humaneval/HumanEvalPlus.jsonl.gz"]}, _HUMANEVAL
    ),
    ("google-research-datasets/mbpp", "full"): Published(
        {split: ["mbpp/mbpp.jsonl"] for split in ("test", "train", "validation", "prompt")}, _mbpp
    ),
    ("openai/gsm8k", "main"): Published(
        {"test": ["gsm8k/test.jsonl"], "train": ["gsm8k/train.jsonl"]}, _columns("question", "answer")
    ),
    ("SaylorTwift/bbh", "*"): Published({"test": ["bbh/{name}.json"]}, _bbh),
    ("cais/mmlu", "*"): _MMLU,
    ("hails/mmlu_no_train", "*"): _MMLU,
    ("ceval/ceval-exam", "*"): Published(
        {split: [f"ceval/{split}/{{name}}_{split}.csv", f"ceval/formal_ceval/{split}/{{name}}_{split}.csv"]
         for split in ("val", "dev", "test")},
        _ceval,
    ),
    ("aps/super_glue", "boolq"): Published(
        {"validation": ["boolq/val.jsonl", "boolq/dev.jsonl", "BoolQ/val.jsonl"],
         "train": ["boolq/train.jsonl", "BoolQ/train.jsonl"]},
        _boolq,
    ),
    ("Rowan/hellaswag", "*"): Published(
        {"validation": ["hellaswag/hellaswag_val.jsonl"], "train": ["hellaswag/hellaswag_train.jsonl"]}, _hellaswag
    ),
    ("baber/piqa", "*"): Published(
        {"validation": ["piqa/valid.jsonl", "piqa/dev.jsonl", "piqa/physicaliqa-train-dev/dev.jsonl"],
         "train": ["piqa/train.jsonl", "piqa/physicaliqa-train-dev/train.jsonl"]},
        _piqa,
    ),
}  # fmt: skip
