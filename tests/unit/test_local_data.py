"""Local copies of data sets: the authors' files and the dataset repositories, in small."""

import csv
import gzip
import json
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("datasets", reason="needs requirements-eval.txt")

import datasets

from evaluation.local_data import data_from, fingerprint, load_dataset
from evaluation.published import published

LETTERS = ["question", "A", "B", "C", "D", "answer"]


def lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def table(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The authors' files."""
    humaneval = {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f", "canonical_solution": " pass",
                 "test": "check"}  # fmt: skip
    lines(tmp_path / "humaneval/HumanEval.jsonl.gz", [humaneval | {"other": 1}])
    lines(tmp_path / "gsm8k/test.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh/navigate.json").write_text(
        json.dumps({"canary": "x", "examples": [{"input": "left?", "target": "No"}]})
    )
    choice = {"passage": "P. ", "question": "Q?", "options": ["(A)x", "(B)y", "(C)z"], "label": "C", "other": None}
    lines(tmp_path / "agieval/sat-math.jsonl", [choice, choice | {"passage": None, "label": ["A", "B"]}])
    lines(tmp_path / "agieval/gaokao-physics.jsonl", [choice])
    lines(tmp_path / "agieval/math.jsonl", [choice | {"options": None, "answer": "7"}])
    for split, short in (("test", "test"), ("dev", "dev")):
        table(tmp_path / f"mmlu/data/{split}/anatomy_{short}.csv", [["What, then?\nWhen?", "a", "b", "c", "d", "B"]])
    table(tmp_path / "ceval/val/law_val.csv", [["id", *LETTERS], [0, "法?", "a", "b", "c", "d", "D"]])
    lines(tmp_path / "boolq/val.jsonl", [{"question": "is it", "passage": "It is.", "idx": 0, "label": True}])
    lines(tmp_path / "boolq/train.jsonl", [{"question": "is it", "title": "T", "passage": "No.", "answer": False}])
    swag = {"ind": 1, "activity_label": "L", "ctx_a": "a", "ctx_b": "b", "ctx": "a b", "endings": ["x", "y"]}
    lines(tmp_path / "hellaswag/hellaswag_val.jsonl", [swag | {"label": 1}])
    lines(tmp_path / "piqa/valid.jsonl", [{"goal": "g", "sol1": "s", "sol2": "t"}])
    (tmp_path / "piqa/valid-labels.lst").write_text("1\n")
    mbpp = {"text": "t", "code": "c", "test_list": ["x"], "test_setup_code": "", "challenge_test_list": []}
    lines(tmp_path / "mbpp/mbpp.jsonl", [mbpp | {"task_id": number} for number in (10, 11, 510, 511, 601)])
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    tried: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        tried.append(address)
        raise OSError("there is no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tried


def test_authors_files_have_the_columns_that_tasks_name(folder: Path):
    with data_from(folder):
        # As lm-eval calls it.
        load = datasets.load_dataset
        assert load("openai/openai_humaneval", None)["test"].column_names == [
            "task_id", "prompt", "entry_point", "canonical_solution", "test",
        ]  # fmt: skip
        assert load("openai/gsm8k", "main")["test"][0] == {"question": "1 + 1?", "answer": "#### 2"}
        assert load("SaylorTwift/bbh", "navigate")["test"][0] == {"input": "left?", "target": "No"}
        first, second = load("hails/agieval-sat-math", None)["test"]
        assert first == {
            "query": "P. Q: Q? Answer Choices: (A)x (B)y (C)z\nA: Among A through C, the answer is",
            "choices": ["(A)x", "(B)y", "(C)z"], "gold": [2],
        }  # fmt: skip
        assert second["query"].startswith("Q: Q?") and second["gold"] == [0, 1]
        assert load("hails/agieval-gaokao-physics", None)["test"][0]["query"] == (
            "P. 问题：Q? 选项：(A)x (B)y (C)z\n答案：从A到C, 我们应选择"
        )
        assert load("hails/agieval-math", None)["test"][0] == {"query": "P. Q: Q?\nA: The answer is", "answer": "7"}
        mmlu = load("cais/mmlu", "anatomy")
        assert set(mmlu) == {"test", "dev"} and mmlu["dev"][0] == {
            "question": "What, then?\nWhen?", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 1,
        }  # fmt: skip
        assert load("ceval/ceval-exam", "law")["val"][0] == dict(zip(LETTERS, ["法?", "a", "b", "c", "d", "D"]))
        boolq = load("aps/super_glue", "boolq")
        assert [boolq[split][0]["label"] for split in ("validation", "train")] == [1, 0]
        assert load("Rowan/hellaswag", None)["validation"][0]["label"] == "1"
        assert load("baber/piqa", None)["validation"][0] == {"goal": "g", "sol1": "s", "sol2": "t", "label": 1}
        splits = load("google-research-datasets/mbpp", "full")
        assert [splits["test"]["task_id"], splits["validation"]["task_id"], splits["train"]["task_id"]] == [
            [11, 510], [511], [601]
        ]  # fmt: skip
    assert datasets.load_dataset.__module__ == "datasets.load"


def test_every_known_data_set_is_one_that_a_task_of_lm_eval_names():
    lm_eval = pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")
    tasks = Path(lm_eval.__file__).parent / "tasks"
    folders = ("humaneval", "mbpp", "gsm8k", "bbh", "agieval", "mmlu", "ceval", "super_glue", "hellaswag", "piqa")
    for name in folders:
        found = [
            (match[1], path.name) for path in (tasks / name).rglob("*yaml*") if path.is_file()
            if (match := re.search(r"^dataset_path: (\S+)", path.read_text(), re.MULTILINE))
        ]  # fmt: skip
        assert any(published(dataset, part) for dataset, _ in found for part in ("main", "boolq", "full", "any")), name


def test_a_copy_of_a_repository_is_read_in_any_layout_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_network: list[object]
):
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    rows = datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}])
    copy = tmp_path / "owner/parts"
    for part in ("one", "two"):
        (copy / part).mkdir(parents=True)
        rows.to_parquet(copy / part / "test-00000-of-00001.parquet")
    lines(tmp_path / "owner/plain/train.jsonl", [{"text": "c"}])
    lines(tmp_path / "owner/named/x.jsonl", [{"text": "d"}])
    (tmp_path / "owner/named/README.md").write_text(
        "---\nconfigs:\n- config_name: special\n  data_files:\n  - split: dev\n    path: x.jsonl\n---\n"
    )
    with data_from(tmp_path):
        assert load_dataset("owner/parts", "two")["test"]["text"] == ["a", "b"]
        assert load_dataset("owner/plain")["train"]["text"] == ["c"]
        assert load_dataset("owner/named", "special", trust_remote_code=True)["dev"]["text"] == ["d"]
        assert load_dataset("owner/plain", split="train")["text"] == ["c"]
        mapped = load_dataset("owner/plain")["train"].map(lambda row: {"text": row["text"] + "!"})
        assert mapped["text"] == ["c!"]
    assert not cache.exists() and not no_network


def test_what_is_missing_is_named_with_its_place(folder: Path, no_network: list[object]):
    def refusal(path: str, name: str | None = None) -> str:
        with data_from(folder), pytest.raises(ValueError) as raised:
            load_dataset(path, name)
        return str(raised.value)

    mmlu = refusal("cais/mmlu", "virology")
    assert f"{folder}/mmlu/test/virology_test.csv and {folder}/mmlu/dev/virology_dev.csv" in mmlu
    assert f"a copy of the dataset repository as {folder}/cais/mmlu" in mmlu
    assert refusal("allenai/ai2_arc", "ARC-Easy").endswith(f"repository as {folder}/allenai/ai2_arc")
    (folder / "piqa/valid-labels.lst").write_text("1\n0\n")
    assert "2 labels for 1 questions" in refusal("baber/piqa")
    (folder / "piqa/valid-labels.lst").unlink()
    assert f"{folder}/piqa/valid-labels.lst is missing" in refusal("baber/piqa")
    (folder / "gsm8k/test.jsonl").write_text("<html>")
    assert f"{folder}/gsm8k/test.jsonl is not as its authors published it" in refusal("openai/gsm8k", "main")
    lines(folder / "gsm8k/test.jsonl", [{"prompt": "x"}])
    assert "KeyError: 'question'" in refusal("openai/gsm8k", "main")
    lines(folder / "gsm8k/test.jsonl", [])
    assert "holds no rows" in refusal("openai/gsm8k", "main")
    (folder / "owner/broken").mkdir(parents=True)
    assert f"{folder}/owner/broken cannot be read" in refusal("owner/broken")
    assert not no_network


def test_without_a_folder_and_a_network_a_sentence_names_the_flag(no_network: list[object]):
    with data_from(None), pytest.raises(ValueError, match="cannot be fetched .* give local copies by --data_dir D, "
                                                          "with the authors' files as D/gsm8k/test.jsonl"):  # fmt: skip
        load_dataset("openai/gsm8k", "main")


def test_fingerprints_tell_rows_and_their_order():
    rows = [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}]
    assert fingerprint(rows) == fingerprint([{"b": "x", "a": 1}, rows[1]])
    assert len({fingerprint(rows), fingerprint(rows[::-1]), fingerprint(rows[:1])}) == 3
