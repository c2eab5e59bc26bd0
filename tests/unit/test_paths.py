"""Paths with `~` and variables are read as in a shell, or refused with one sentence, never taken as a folder's name."""

import argparse
import os
import subprocess
from pathlib import Path

import pytest

from utils.paths import a_path, absent, expand, for_command, for_remote_shell

HOME, SCRATCH = "/home/ada", "/scratch/a b$HOME"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", HOME)
    monkeypatch.setenv("SCRATCH", SCRATCH)
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("UNSET", raising=False)


@pytest.mark.parametrize("path", [
    "a", "~", "~/a", "~root/a", "a/~/b", "./~", "$SCRATCH/a", "${SCRATCH}a", "~/$SCRATCH", "a$", "a/$/b", "a~",
])  # fmt: skip
def test_the_shell_says_the_same(path: str):
    word = path.replace("$SCRATCH", '"$SCRATCH"').replace("${SCRATCH}", '"${SCRATCH}"')
    done = subprocess.run(["sh", "-c", f"printf %s {word}"], capture_output=True, text=True, check=True)
    assert expand(path) == done.stdout
    assert subprocess.run(
        ["sh", "-c", f"printf %s {for_remote_shell(path)}"], capture_output=True, text=True, check=True
    ).stdout == done.stdout  # fmt: skip


@pytest.mark.parametrize("path, problem", [
    ("$UNSET/a", "$UNSET is not set"), ("a/${UNSET}", "$UNSET is not set"), ("$EMPTY/a", "$EMPTY is empty"),
    ("~nobody-of-that-name/a", "no user 'nobody-of-that-name'"), ("${SCRATCH:-x}/a", "names no variable"),
    ("${}/a", "names no variable"),
])  # fmt: skip
def test_what_cannot_be_expanded_is_refused_by_name(path: str, problem: str):
    with pytest.raises(ValueError) as caught:
        expand(path)
    assert problem in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(argparse.ArgumentTypeError):
        a_path(path)


def test_an_empty_argument_is_not_the_working_directory():
    with pytest.raises(argparse.ArgumentTypeError, match="is empty"):
        a_path("")


def test_a_home_that_is_empty_does_not_become_the_root(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "")
    with pytest.raises(ValueError, match="no home directory"):
        expand("~/runs")


def test_a_real_dollar_and_a_real_tilde_can_be_written(tmp_path: Path):
    assert expand("a$$SCRATCH/b") == "a$SCRATCH/b"
    assert expand("./~/a") == "./~/a"


@pytest.mark.parametrize("path", ["a b", "$(id)", "`id`/a", "a;id", "a'b", "-x", "", "~;id/a", "~/a b", "a$$HOME"])
def test_nothing_else_means_anything_to_a_remote_shell(path: str):
    words = for_remote_shell(path)
    said = subprocess.run(["sh", "-c", f"printf '<%s>' {words}"], capture_output=True, text=True, check=True).stdout
    assert said == f"<{path.replace('~/', f'{HOME}/').replace('$$', '$')}>"


def test_a_variable_that_is_not_set_there_ends_the_command():
    done = subprocess.run(["sh", "-c", f"cd {for_remote_shell('$UNSET/a')} && echo on"], capture_output=True, text=True)
    assert done.returncode and not done.stdout and "UNSET" in done.stderr


@pytest.mark.parametrize("path", ["/runs/a", "a b", "~/x", "~", "$x/${y}", "it's", "x/$$"])
def test_a_path_comes_back_from_the_command_that_is_suggested(path: str):
    """Through a shell, and expanded once more."""
    said = subprocess.run(["sh", "-c", f"printf %s {for_command(path)}"], capture_output=True, text=True).stdout
    assert os.path.normpath(expand(said)) == os.path.normpath(path)


@pytest.mark.parametrize(
    "path, sentence",
    [("out/mien", "out/mien does not exist: did you mean out/mine?"),
     ("out/Mine", "out/Mine does not exist: did you mean out/mine?"),
     ("uot/mine", "uot/mine does not exist: did you mean out/mine?"),
     ("./mine", "./mine does not exist: did you mean out/mine?"),
     ("out/mine/ckpt/step-60", "out/mine/ckpt/step-60 does not exist: did you mean out/mine/ckpt/step-6?"),
     ("hots.yaml", "hots.yaml does not exist: give another"),
     ("tbas.yaml", "tbas.yaml does not exist: did you mean tabs.yaml?"),
     ("gpt2", "gpt2 does not exist: give another"), ("no/such/thing", "no/such/thing does not exist: give another"),
     ("out/mine/config.yaml/x", "out/mine/config.yaml/x does not exist: give another")],
)  # fmt: skip
def test_what_is_called_alike_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, sentence: str
):
    for folder in ("out/mine/ckpt/step-6", "out/other", "T2", "data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "out" / "mine" / "config.yaml").touch()
    (tmp_path / "tabs.yaml").touch()
    monkeypatch.chdir(tmp_path)
    assert absent(path, "give another") == sentence
    # The same for an absolute path.
    whole = absent(tmp_path / path, "give another").replace(f"{tmp_path}/", "")
    assert whole == sentence.removeprefix("./")
