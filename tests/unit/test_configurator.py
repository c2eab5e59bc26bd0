"""The command line, YAML, and what they refuse."""

import errno
from pathlib import Path

import pytest
import yaml

from configurator import CONFIG_NAME, flatten, parse_config, resolve, resolve_model, to_yaml
from model.config import LlamaConfig


def parse(*argv: str) -> dict:
    return flatten(parse_config(["--data_dir=d", *argv])[0])


def test_the_originals_command_runs():
    flat = parse(
        "--task_type=pretrain", "--train_batch_size=8", "--gradient_accumulation_steps=128", "--max_seq_len=2048",
        "--learning_rate=3e-4", "--resume", "--out_dir=o",
    )  # fmt: skip
    assert (flat["gradient_accumulation_steps"], flat["learning_rate"], flat["resume"]) == (128, 3e-4, True)


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--compile"], True),
        (["--compile=True"], True),
        (["--compile", "true"], True),
        (["--compile=False"], False),
        (["--no-compile"], False),
        (["--no_compile"], False),
        ([], False),
    ],
)
def test_booleans(argv: list[str], value: bool):
    assert parse(*argv)["compile"] is value


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dtaa_dir=x"], "did you mean --data_dir"),
        (["--batch_size=2"], "did you mean --train_batch_size"),
        (["--zzzzzz=1"], "--zzzzzz is unknown"),
        (["--hidden_dim=8"], "--hidden_size"),
        (["--n_layers=8"], "--num_hidden_layers"),
        (["--grad_div_total_tokens"], "no use here"),
        (["--grad_scaling_before_comm=True"], "no use here"),
        (["--train_batch_size=two"], "of type int"),
        (["--train_batch_size=2.5"], "of type int"),
        (["--learning_rate=fast"], "of type float"),
        (["--compile=maybe"], "true or false"),
        (["--dtype=bf16"], "must be one of auto"),
        (["--train_batch_size"], "needs a value"),
        (["--train_batch_size=0"], "must be positive"),
        (["--beta1=1"], "below 1"),
        (["--learning_rate=nan"], "of type float"),
        (["--dist_timeout=inf"], "of type float"),
        (["--max_iters=inf"], "of type int"),
        (["--adam_eps=-1"], "must not be negative"),
        (["--num_key_value_heads=-2"], "must not be negative"),
        (["--head_dim=-2"], "must not be negative"),
        (["--max_iters=3", "--epoch=2"], "give only one"),
        (["--hidden_size=100", "--num_attention_heads=3"], "not divisible"),
        (["--num_attention_heads=6", "--num_key_value_heads=4"], "not a multiple"),
        (["--attention_bias", "--qkv_bias"], "only one"),
        (["--valid_only"], "needs weights"),
        (["--use_dataset_with_index=False"], "no use here"),
        (["stray.yaml", "words"], "cannot be read|is not a flag"),
    ],
)
def test_refusals_are_one_sentence(argv: list[str], message: str):
    with pytest.raises(ValueError, match=message) as caught:
        parse(*argv) if argv[0].startswith("--") else parse_config(argv)
    assert "\n" not in str(caught.value)


def test_data_dir_is_needed():
    with pytest.raises(ValueError, match="--data_dir is missing"):
        parse_config([])


def test_yaml_lies_between_the_defaults_and_the_command_line(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-3\nmax_seq_len: 128\ntie_word_embeddings: true\nvalid_ratio: null\n")
    config, given = parse_config([str(file), "--data_dir=d", "--max_seq_len=64"])
    flat = flatten(config)
    # YAML 1.1 reads 1e-3 as text: the field's type decides.
    assert (flat["learning_rate"], flat["max_seq_len"], flat["tie_word_embeddings"]) == (1e-3, 64, True)
    assert given == {"learning_rate", "max_seq_len", "tie_word_embeddings", "valid_ratio", "data_dir"}


@pytest.mark.parametrize("text", ["dtaa_dir: x\n", "max_seq_len: [1]\n", "- a\n- b\n", "a: b: c\n", "compile: 3\n"])
def test_bad_yaml_is_named(tmp_path: Path, text: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="c.yaml"):
        parse_config([str(file), "--data_dir=d"])


def saved_run(directory: Path, *argv: str) -> None:
    config, _ = parse_config(["--data_dir=d", f"--out_dir={directory}", *argv])
    (directory / CONFIG_NAME).write_text(to_yaml(config, {"max_iters": resolve(config, 1, 1000).max_iters}))


def test_on_resume_the_command_line_beats_the_saved_configuration(tmp_path: Path):
    """The original's saved file silently beat the command line, and lost keys whose value was None."""
    saved_run(tmp_path, "--learning_rate=1e-3", "--max_seq_len=77", "--max_iters=5")
    assert "valid_ratio" in yaml.safe_load((tmp_path / CONFIG_NAME).read_text())
    flat = flatten(parse_config([f"--out_dir={tmp_path}", "--resume", "--learning_rate=2e-3"])[0])
    assert (flat["learning_rate"], flat["max_seq_len"], flat["data_dir"], flat["max_iters"]) == (2e-3, 77, "d", 5)
    file = tmp_path / "now.yaml"
    file.write_text("max_seq_len: 99\n")
    flat = flatten(parse_config([str(file), f"--out_dir={tmp_path}", "--resume"])[0])
    assert flat["max_seq_len"] == 99


def test_without_resume_the_saved_configuration_is_not_read(tmp_path: Path):
    saved_run(tmp_path, "--max_seq_len=77")
    assert flatten(parse_config(["--data_dir=d", f"--out_dir={tmp_path}"])[0])["max_seq_len"] == 1024


def test_a_new_epoch_beats_the_saved_max_iters(tmp_path: Path):
    saved_run(tmp_path, "--max_iters=5")
    config, _ = parse_config([f"--out_dir={tmp_path}", "--resume", "--epoch=2"])
    assert resolve(config, 1, 640).max_iters == 20


def test_a_saved_configuration_can_be_given_again(tmp_path: Path):
    for length in ("--max_iters=5", "--epoch=2"):
        saved_run(tmp_path, length)
        config, _ = parse_config([str(tmp_path / CONFIG_NAME), "--out_dir=elsewhere"])
        assert (config.run.max_iters, config.run.epoch) == ((5, 1.0) if "max" in length else (0, 2.0))


def test_epochs_count_samples_when_the_batch_changes():
    config, _ = parse_config(["--data_dir=d", "--epoch=1", "--train_batch_size=2", "--gradient_accumulation_steps=5"])
    assert resolve(config, 1, 1000).max_iters == 100
    # 60 steps of 5 samples are done; 700 samples are left for steps of 10.
    assert resolve(config, 1, 1000, step=60, samples_consumed=300).max_iters == 130


def test_a_negated_flag_must_not_contradict_the_weights():
    stored = LlamaConfig(vocab_size=64, tie_word_embeddings=True).resolve(max_seq_len=8)
    config, given = parse_config(["--data_dir=d", "--no-tie_word_embeddings"])
    with pytest.raises(ValueError, match="tie_word_embeddings=False does not fit"):
        resolve_model(config.model, given, stored, 64, 8)
    config, given = parse_config(["--data_dir=d", "--intermediate_size=0"])
    assert resolve_model(config.model, given, stored, 64, 8) == stored


def test_what_a_launch_does_is_not_saved(tmp_path: Path):
    saved_run(tmp_path, "--resume", "--restart_data")
    assert not {"resume", "restart_data"} & set(yaml.safe_load((tmp_path / CONFIG_NAME).read_text()))


def test_the_global_batch_does_not_depend_on_the_ranks():
    config, _ = parse_config(["--data_dir=d", "--train_batch_size=4", "--gradient_accumulation_steps=12"])
    assert {resolve(config, ranks, 960).global_batch_size for ranks in (1, 2, 3, 4)} == {48}
    with pytest.raises(ValueError, match="multiple of their number, 5: use 15"):
        resolve(config, 5, 960)


def test_help_lists_every_field_with_its_docstring(capsys: pytest.CaptureFixture):
    with pytest.raises(SystemExit) as caught:
        parse_config(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for name in flatten(parse_config(["--data_dir=d"])[0]):
        assert f"--{name}" in text
    for group in ("run options", "data options", "model options", "optimizer options", "parallel options"):
        assert group in text


def test_a_read_error_that_may_pass_is_no_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The monitor tries again after a crash, and not after a command that is wrong."""
    (tmp_path / CONFIG_NAME).write_text("max_iters: 3\n")

    def refuse(self: Path, *_: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match="Stale"):
        parse_config(["--data_dir=d", f"--out_dir={tmp_path}", "--resume"])
