"""--texts of evaluate_model.py."""

from pathlib import Path

import pytest

from evaluation.arguments import _texts_of


def test_texts_by_their_names(tmp_path: Path):
    (tmp_path / "a=b.txt").write_text("a")
    assert _texts_of([]) == {}
    assert _texts_of([f"mine={tmp_path}", f"one={tmp_path}/a=b.txt"]) == {"mine": tmp_path, "one": tmp_path / "a=b.txt"}
    for named, sentence in (
        (["mine"], "must be a name and a path"), (["=a"], "must be a name and a path"),
        ([f"mine={tmp_path}"] * 2, "names mine twice"), (["mine=/no/such/path"], "does not exist"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            _texts_of(named)
