"""Messages of the commands about wrong flags."""

import pytest

from utils.arguments import Parser


def parser() -> Parser:
    made = Parser(prog="python -m a.command")
    made.add_argument("--data_dir", required=True)
    made.add_argument("--vocab_size", type=int)
    made.add_argument("--kind", choices=["one", "two"])
    made.add_argument("place", nargs="?")
    return made


@pytest.mark.parametrize(
    "words, sentence",
    [(["--data-dir", "D"], "--data-dir is not a flag of this command: did you mean --data_dir?"),
     (["--vocab_sise=3"], "--vocab_sise is not a flag of this command: did you mean --vocab_size?"),
     (["--DATA_DIR", "D"], "--DATA_DIR is not a flag of this command: did you mean --data_dir?"),
     (["-help"], "-help is not a flag of this command: did you mean --help?"),
     (["--data_dir=D", "-n", "2"], "-n is not a flag of this command"),
     (["--data_dir=D", "--bf16"], "--bf16 is not a flag of this command"),
     (["--data_dir=D", "a", "b", "c"], "'b c' is left over: flags begin with --, and a value with blanks needs quotes"),
     ([], "the following arguments are required: --data_dir"),
     (["--data_dir=D", "--vocab_size", "8k"], "argument --vocab_size: invalid int value: '8k'"),
     (["--data_dir=D", "--kind=three"], "argument --kind: invalid choice: 'three' (choose from 'one', 'two')")],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(words)
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", f"python -m a.command: {sentence} (--help lists the flags)\n")


@pytest.mark.parametrize(
    "words, field, value",
    [(["--data_dir=D", "--vocab_size", "-3"], "vocab_size", -3), (["--data", "D"], "data_dir", "D"),
     (["--data_dir", "- a text\nof lines"], "data_dir", "- a text\nof lines"), (["--data_dir=-D"], "data_dir", "-D"),
     (["--data_dir=D", "--", "--kind"], "place", "--kind"), (["--data_dir", "-"], "data_dir", "-")],
)  # fmt: skip
def test_what_argparse_takes_is_taken(words: list[str], field: str, value: object):
    assert getattr(parser().parse_args(words), field) == value


def test_a_command_of_several_knows_the_flags_of_each(capsys: pytest.CaptureFixture):
    made = Parser(prog="python -m a.command")
    commands = made.add_subparsers(dest="command", required=True)
    commands.add_parser("prune").add_argument("--keep_last", type=int)
    assert made.parse_args(["prune", "--keep_last=3"]).keep_last == 3
    with pytest.raises(SystemExit):
        made.parse_args(["prune", "--keep-last=3"])
    assert "prune: --keep-last is not a flag of this command: did you mean --keep_last?" in capsys.readouterr().err
