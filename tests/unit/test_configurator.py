"""The command line and YAML, and what they refuse."""

import dataclasses
import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from configs import sizes
from configurator import _FIELDS, changes_since, flatten, is_open, parse_config, to_yaml, without_effect
from model.config import ModelConfig
from runs.layout import CONFIG_NAME
from training.build_model import choose_shape, new_model, resolve_model
from training.config import RunConfig, resolve


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
        (["--bf16"], "--bf16 is unknown: did you mean --dtype=bfloat16?"),
        (["--gpus", "2"], "--gpus is unknown: did you mean --nproc?"),
        (["--config=a.yaml"], "--config is unknown: did you mean --exp_config_file?"),
        (["--dropout=0.1"], "--dropout is unknown: did you mean --hidden_dropout?"),
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
        (["--num_workers=5000"], "at most 4,096, got 5,000"),
        (["--init_from", "--resume"], "--init_from needs a value"),
        (["--DATA_DIR=x"], "did you mean --data_dir"),
        (["--USE_POWERSGD_HOOK"], "did you mean --use_powerSGD_hook"),
        (["--seed=9223372036854775808"], "of type int"),
        (["--valid_ratio=1.5"], "between 0 and 1"),
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
        (["--size=huge"], "must be one of .*tiny, laptop, gpu, 1b"),
        (["--size=laptop", "--hidden_size=100"], "not divisible by num_attention_heads 6"),
        ([str(sizes.FOLDER / "gpu.yaml"), "--data_dir=d"], "write --size=gpu"),
        ([f"--exp_config_file={sizes.FOLDER}/../sizes/1b.yaml"], "write --size=1b"),
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


@pytest.mark.parametrize(("text", "problem"), [
    ("dtaa_dir: x", "did you mean data_dir"), ("max_seq_len: [1]", "got a list"), ("- a\n- b", "holds a list"),
    ("a: b: c", "line 1"), ("compile: 3", "true or false"), ("", "holds nothing"), ("# only words", "holds nothing"),
    ("{}", "holds nothing"), ("seed: 1\nlr_schedule: wsd\nseed: 2", "'seed' is given twice, line 3"),
    ("learning_rate:", "has no value"), ("out_dir: ~", "has no value"), ("compile: 'yes'", "true or false"),
    ("compile: 1", "true or false"), ("compile: 'True '", "true or false"), ("out_dir: no", "in quotes"),
    ("out_dir: 1.10", "in quotes"), ("wandb_project: on", "in quotes"), ("out_dir: 2026-01-02", "in quotes"),
    ("seed: 0022", "not a decimal number"), ("profile_steps: 6:8", "in quotes"), ("max_iters: 1e3", "of type int"),
    ("max_iters: 2.5", "of type int"), ("learning_rate: .nan", "of type float"), ("on: 3", "True is unknown"),
    ("{lr: 1}", "did you mean learning_rate"), ("Learning_Rate: 1", "did you mean learning_rate"),
    ("model: {hidden_size: 3}", "model is unknown"), ("exp_config_file: b.yaml", "names no other"),
    ("data_dir: $NO_SUCH/d", "data_dir=$NO_SUCH/d: $NO_SUCH is not set"), ("a: &a [x]\nseed: *a", "a is unknown"),
    ("seed: 1\n---\nseed: 2", "document"), ("!!python/object/apply:os.getcwd []", "constructor"), ("\xff", "cannot be"),
    ("#" * (2 << 20), "larger than"), ("task_type: [sft]", "got a list"), ("dtype: null", "has no value"),
    ("lora_target_modules: [q_proj, v_proj]", "got a list: join its parts as in q_proj,v_proj"),
    ("train_batch_size: true", "of type int"), ("valid_ratio: 5%", "of type float"), ("seed: " + "9" * 900, "..."),
])  # fmt: skip
def test_bad_yaml_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, problem: str):
    monkeypatch.delenv("NO_SUCH", raising=False)
    file = tmp_path / "c.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="c.yaml") as caught:
        parse_config([str(file), "--data_dir=d"])
    assert problem in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_yaml_of_every_kind_that_means_what_it_says(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("compile: yes\nbucket_size: 1_000_000\nmax_iters: '1_000'\nlearning_rate: 1e-4\nout_dir: 12\n"
                    "log_ranks: 0,8\nvalid_ratio: null\nadam_eps: 1\nepoch: 2\nseed: 5.0\n")  # fmt: skip
    text = file.read_text().replace("epoch: 2\n", "")
    file.write_text(text)
    flat = flatten(parse_config([str(file), "--data_dir=d"])[0])
    assert flat["compile"] is True and flat["bucket_size"] == 1_000_000 and flat["max_iters"] == 1000
    assert (flat["learning_rate"], flat["out_dir"], flat["log_ranks"]) == (1e-4, "12", "0,8")
    assert (flat["valid_ratio"], flat["adam_eps"], flat["seed"]) == (None, 1.0, 5)


def test_a_configuration_through_a_pipe(tmp_path: Path):
    """As from the shell's <(...)."""
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        pool.submit((tmp_path / "pipe").write_text, "seed: 7\n")
        assert parse_config([str(tmp_path / "pipe"), "--data_dir=d"])[0].run.seed == 7


PATHS = ("out_dir", "init_from", "data_dir", "train_data_dir", "valid_data_dir", "tokenizer_dir", "eval_data_dir",
         "eval_task_dir")  # fmt: skip


def test_no_path_is_forgotten():
    names = [name for name, (_, hint) in _FIELDS.items() if hint is str and name.endswith(("_dir", "_from", "_file"))]
    assert sorted(names) == sorted((*PATHS, "exp_config_file"))


@pytest.mark.parametrize(
    ("written", "meant"), [("~/a", "HOME/a"), ("$SCRATCH/${SCRATCH}", "/s//s"), ("a/~", "a/~"), ("a$$b", "a$b")]
)
def test_paths_mean_what_they_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, meant: str):
    """On the command line, where no shell expands the text after the =, and in a file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/s")
    expected = dict.fromkeys(PATHS, meant.replace("HOME", str(tmp_path)))
    (tmp_path / "c.yaml").write_text("".join(f"{name}: {written}\n" for name in PATHS))
    for argv in ([f"--{name}={written}" for name in PATHS], ["~/c.yaml"], ["--exp_config_file", "$HOME/c.yaml"]):
        config, _ = parse_config(argv)
        assert {name: flatten(config)[name] for name in PATHS} == expected
    # The saved path is the expanded one, and is taken literally.
    (tmp_path / CONFIG_NAME).write_text(to_yaml(config, {}))
    again, _ = parse_config(["--resume", f"--out_dir={tmp_path}"])
    assert flatten(again) == flatten(config) | {"resume": True, "out_dir": str(tmp_path), "exp_config_file": ""}
    assert not changes_since(again, tmp_path / CONFIG_NAME)


@pytest.mark.parametrize("name", (*PATHS, "exp_config_file"))
@pytest.mark.parametrize("value", ["$NO_SUCH/a", "~no-such-user/a", ""])
def test_paths_that_mean_nothing_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str):
    monkeypatch.delenv("NO_SUCH", raising=False)
    with pytest.raises(ValueError, match=f"--{name}") as caught:
        parse_config([f"--{name}={value}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("argv", "sentence"), [
    (["--resume", "--out_dir=x"], "--out_dir is x, where there is no run to resume: check it"),
    (["--resume"], "--out_dir is out/run, where there is no run to resume: give the run's"),
    (["--train_data_dir=d"], "--valid_data_dir is missing"), (["--valid_data_dir=d"], "--train_data_dir is missing"),
    ([], "--data_dir is missing: give the directory of the pretokenized data"),
    (["--task_type=sft"], "--data_dir is missing: give the directory of the data"),
    (["--valid_only", "--data_dir=d", "--out_dir=x"], "--valid_only needs weights: give --init_from"),
    (["--valid_only", "--data_dir=d", "--out_dir=run"], "--valid_only needs weights: add --resume"),
    (["", "--data_dir=d"], "the first argument is empty"),
    (["run/config.yaml", "--exp_config_file=run/config.yaml"], "both name a configuration file"),
])  # fmt: skip
def test_a_sentence_names_the_one_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, argv: list[str], sentence: str
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CONFIG_NAME).write_text("seed: 3\n")
    with pytest.raises(ValueError) as caught:
        parse_config(argv)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(("argv", "sentences"), [
    ([], []), (["--wsd_decay_ratio=0.3", "--lr_schedule=wsd", "--sft_loss=all", "--wandb_mode=online"], []),
    (["--wsd_decay_ratio=0.3"], ["--wsd_decay_ratio has no effect without --lr_schedule=wsd"]),
    (["--use_fixed_Q", "--no-warm_start"],
     ["--no-warm_start, --use_fixed_Q have no effect without --use_powerSGD_hook"]),
    (["--dpo_beta=0.3", "--sft_loss=last"], ["--dpo_beta has no effect without --task_type=dpo",
                                             "--sft_loss has no effect without --task_type=sft"]),
    (["--no-decay_lr", "--wsd_decay_ratio=0.3"], ["--wsd_decay_ratio has no effect with --no-decay_lr"]),
    (["--rope_scaling=linear"], ["--rope_scaling has no effect with --rope_scaling_factor=1"]),
    (["--rope_scaling=linear", "--rope_scaling_factor=4"], []),
    (["--rope_scaling_factor=4"], ["--rope_scaling_factor has no effect without --rope_scaling"]),
    (["--rope_scaling=linear", "--rope_scaling_factor=4", "--rope_low_freq_factor=2"],
     ["--rope_low_freq_factor has no effect without --rope_scaling=llama3"]),
    (["--rope_scaling=linear", "--rope_scaling_factor=4", "--original_max_position_embeddings=8", "--rope_beta_fast=9"],
     ["--original_max_position_embeddings has no effect without --rope_scaling=llama3, yarn or longrope",
      "--rope_beta_fast has no effect without --rope_scaling=yarn"]),
    (["--rope_scaling=yarn", "--rope_scaling_factor=4", "--rope_beta_fast=9", "--no-rope_truncate",
      "--rope_attention_factor=1", "--original_max_position_embeddings=8"], []),
    (["--rope_scaling=proportional", "--partial_rotary_factor=0.5"], []),
    (["--rope_scaling=longrope", "--rope_short_factor=1.0,1.5", "--rope_long_factor=1,2"], []),
    (["--rope_short_factor=1.0,1.5"], ["--rope_short_factor has no effect without --rope_scaling=longrope"]),
    (["--train_data_dir=a", "--valid_data_dir=b"],
     ["--data_dir has no effect beside --train_data_dir and --valid_data_dir"]),
    (["--size=laptop", "--optimizer=adamw", "--hidden_size=192"], []),
    (["--restart_data"], ["--restart_data has no effect without --resume"]),
    (["--disable_bucketing", "--bucket_size=5"], ["--bucket_size has no effect with --disable_bucketing"]),
])  # fmt: skip
def test_what_changes_nothing_is_said(argv: list[str], sentences: list[str]):
    assert without_effect(*parse_config(["--data_dir=d", *argv])) == sentences


def test_the_projects_own_configurations_say_nothing_in_vain():
    for path in (Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"):
        assert without_effect(*parse_config([str(path), "--data_dir=d", "--init_from=m"])) == [], path


def saved_run(directory: Path, *argv: str) -> None:
    config, _ = parse_config(["--data_dir=d", f"--out_dir={directory}", *argv])
    (directory / CONFIG_NAME).write_text(to_yaml(config, {"max_iters": resolve(config, 1, 1000).max_iters}))


def test_on_resume_the_command_line_beats_the_saved_configuration(tmp_path: Path):
    """The original's saved file silently overrode the command line, and lost keys whose value was None."""
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


SIZES = [name for name in _FIELDS["size"][1].__args__ if name]


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_whole(size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its values have their fields' types, fit together, and are found from anywhere."""
    monkeypatch.chdir(tmp_path)
    for task, weights in (("pretrain", ""), ("pretrain", "m"), ("sft", "m"), ("dpo", "m")):
        values = sizes.values_of(size, task, has_weights=bool(weights))
        flags = [f"--task_type={task}", *([f"--init_from={weights}"] if weights else [])]
        config, given = parse_config(["--data_dir=d", f"--size={size}", *flags])
        flat = flatten(config)
        assert values.items() <= flat.items() and flat["size"] == size
        assert without_effect(config, given) == []
        # The weights give the shape; the batch comes from conversations, and from nothing else.
        assert weights == "" or config.model == ModelConfig()
        assert ("gradient_accumulation_steps" in values) == (task == "pretrain")
    assert sorted(path.stem for path in sizes.FOLDER.glob("*.yaml")) == sorted(SIZES)


@pytest.mark.parametrize(("argv", "changed"), [
    (["--max_seq_len=77"], {"max_seq_len": 77}), (["--max_iters=7"], {"max_iters": 7}),
    (["--epoch=2"], {"max_iters": 0, "epoch": 2.0}), (["--learning_rate=1e-3"], {"learning_rate": 1e-3}),
    # Rates are those of the optimizer.
    (["--optimizer=adamw"], {"optimizer": "adamw", "learning_rate": 3e-4, "lr_schedule": "cosine", "beta2": 0.95,
                             "min_lr_ratio": 0.1, "warmup_ratio": 0.01, "wsd_decay_ratio": 0.2, "muon_iterations": 5,
                             "muon_momentum": 0.95}),
])  # fmt: skip
def test_a_size_lies_below_all_that_is_given(tmp_path: Path, argv: list[str], changed: dict):
    whole = parse("--size=tiny")
    assert parse("--size=tiny", *argv) == whole | changed
    file = tmp_path / "c.yaml"
    file.write_text("size: tiny\n" + "".join(f"{flag[2:].replace('=', ': ')}\n" for flag in argv))
    assert flatten(parse_config([str(file), "--data_dir=d"])[0]) == whole | changed | {"exp_config_file": str(file)}


def test_a_size_that_changes_nothing_is_said():
    values = sizes.values_of("gpu", "dpo", has_weights=True)
    argv = ["--size=gpu", "--task_type=dpo", "--init_from=m", *(f"--{name}={value}" for name, value in values.items())]
    assert without_effect(*parse_config(["--data_dir=d", *argv])) == ["--size has no effect beside what else was given"]


def test_a_resumed_run_keeps_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run keeps the values that it began with, even if the size has changed."""
    saved_run(tmp_path, "--size=laptop", "--learning_rate=1e-3")
    begun, resume = parse("--size=laptop", "--learning_rate=1e-3"), ["--resume", f"--out_dir={tmp_path}"]
    monkeypatch.setattr(sizes, "values_of", lambda *_, **__: {"hidden_size": 4096, "valid_iters": 3})
    for argv in (resume, [*resume, "--size=laptop"], [*resume, "--size=laptop", "--grad_clip=2"]):
        config, given = parse_config(argv)
        assert flatten(config) == begun | {"resume": True, "out_dir": str(tmp_path)} | (
            {"grad_clip": 2.0} if "--grad_clip=2" in argv else {}
        )
        assert without_effect(config, given) == [] and not is_open(config.run, given, "max_seq_len")
        assert changes_since(config, tmp_path / CONFIG_NAME).keys() == {"grad_clip"} & given
    with pytest.raises(ValueError, match="was begun with --size=laptop.*leave --size out") as caught:
        parse_config([*resume, "--size=gpu"])
    assert "\n" not in str(caught.value)
    # A run's resolved values can begin another run.
    again = flatten(parse_config([str(tmp_path / CONFIG_NAME), "--out_dir=o"])[0])
    assert again == begun | {"out_dir": "o", "exp_config_file": str(tmp_path / CONFIG_NAME)}


def test_a_run_that_was_begun_without_a_size_gets_none(tmp_path: Path):
    saved_run(tmp_path, "--max_seq_len=77")
    path = tmp_path / CONFIG_NAME
    for text in (path.read_text(), path.read_text().replace("size: ''\n", "")):
        path.write_text(text)
        config, given = parse_config(["--resume", f"--out_dir={tmp_path}", "--size=tiny"])
        assert flatten(config) == parse("--max_seq_len=77") | {"resume": True, "out_dir": str(tmp_path)}
        assert without_effect(config, given) == [
            "--size has no effect on this run, which was begun without one: its values are those saved"
        ]


def test_a_resumed_run_takes_no_other_adapter(tmp_path: Path):
    flags = ["--resume", f"--out_dir={tmp_path}"]
    saved_run(tmp_path, "--init_from=base", "--adapter=first")
    assert parse_config([*flags, "--adapter=first"])[0].adapter.adapter == "first"
    with pytest.raises(ValueError, match="--adapter=second: a resumed run goes on with its own"):
        parse_config([*flags, "--adapter=second"])


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
    stored = ModelConfig(vocab_size=64, tie_word_embeddings=True).resolve(max_seq_len=8)
    config, given = parse_config(["--data_dir=d", "--no-tie_word_embeddings"])
    with pytest.raises(ValueError, match="tie_word_embeddings=False does not fit"):
        resolve_model(config.model, given, stored, 64, 8)
    config, given = parse_config(["--data_dir=d", "--intermediate_size=0"])
    assert resolve_model(config.model, given, stored, 64, 8) == stored


def test_weights_may_have_a_single_expert():
    """Fewer than a token is sent to by default."""
    stored = ModelConfig(vocab_size=64, num_local_experts=1, num_experts_per_tok=1).resolve(max_seq_len=8)
    config, given = parse_config(["--data_dir=d"])
    assert resolve_model(config.model, given, stored, 64, 8) == stored


@pytest.mark.parametrize("name", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_that_of_the_weights_unless_a_flag_says_another(name: str):
    stored = ModelConfig(vocab_size=64, **{name: 0.1}).resolve(max_seq_len=8)
    for flags, expected in (([], 0.1), ([f"--{name}=0"], 0.0), ([f"--{name}=0.2"], 0.2)):
        config, given = parse_config(["--data_dir=d", *flags])
        assert getattr(resolve_model(config.model, given, stored, 64, 8), name) == expected


def test_a_shape_that_was_edited_in_the_runs_configuration_is_refused(tmp_path: Path):
    """The edit used to be ignored, and was written back as if the model had that shape."""
    shape = ["--hidden_size=64", "--num_attention_heads=4", "--num_hidden_layers=2", "--rope_theta=5e5"]
    saved_run(tmp_path, *shape)
    stored = parse_config(["--data_dir=d", *shape])[0].model.resolve(64, 1024)
    path = tmp_path / CONFIG_NAME
    text = path.read_text()

    def resumed(line: str, edited: str, is_own: bool = True) -> ModelConfig:
        path.write_text(text.replace(line, edited))
        config, given = parse_config(["--resume", f"--out_dir={tmp_path}"])
        return resolve_model(config.model, given, stored, 64, 1024, is_own)

    assert resumed("", "") == stored
    for line, edited in [("hidden_size: 64", "hidden_size: 128"), ("num_hidden_layers: 2", "num_hidden_layers: 12"),
                         ("qkv_bias: false", "qkv_bias: true"), ("head_dim: 0", "head_dim: 32")]:  # fmt: skip
        with pytest.raises(ValueError, match=f"{edited.replace(':', ' is').replace('true', 'True')} in the run's"):
            resumed(line, edited)
    # In a run that began with other weights, the shape is theirs, and fields that nobody gave have their defaults.
    assert resumed("num_hidden_layers: 2", "num_hidden_layers: 12", is_own=False) == stored
    with pytest.raises(ValueError, match="hidden_size is 128 in the run's"):
        resumed("hidden_size: 64", "hidden_size: 128", is_own=False)
    # Options on which no weight depends can be changed, there as on the command line.
    assert resumed("rope_theta: 500000.0", "rope_theta: 7000.0").rope_theta == 7000.0


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
    assert text.index("--size") < min(text.index(f"--{name}") for name in ("task_type", "out_dir", "data_dir"))
    for group in ("run options", "data options", "model options", "optimizer options", "parallel options"):
        assert group in text


def test_a_read_error_that_may_pass_is_not_a_wrong_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The monitor tries again after a crash, but not after a wrong command."""
    (tmp_path / CONFIG_NAME).write_text("max_iters: 3\n")

    def refuse(self: Path, *_: object) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(OSError, match="Stale"):
        parse_config(["--data_dir=d", f"--out_dir={tmp_path}", "--resume"])


def test_a_family_that_is_named_adds_its_values():
    config, given = parse_config(["--data_dir=d", "--model_type=qwen2"])
    assert new_model(config.model, given).qkv_bias
    for flag, message in [("--no-qkv_bias", "--model_type=qwen2 cannot be such a model: qkv_bias is True in every"),
                          ("--attention_bias", "attention_bias is False in every qwen2, not True")]:  # fmt: skip
        config, given = parse_config(["--data_dir=d", "--model_type=qwen2", flag])
        with pytest.raises(ValueError, match=message):
            new_model(config.model, given)
    # A value other than the default counts as chosen, wherever it was said: by a size, or when the run began.
    with pytest.raises(ValueError, match="attention_bias is False"):
        new_model(dataclasses.replace(config.model, attention_bias=True), frozenset())
    plain = parse_config(["--data_dir=d"])[0].model
    assert new_model(plain, frozenset()) is plain


@pytest.mark.parametrize("is_own", [False, True])
def test_weights_of_another_family_are_refused(is_own: bool):
    stored = ModelConfig(vocab_size=64, model_type="llama").resolve(max_seq_len=8)
    for name, fits in [("llama", True), ("qwen2", False)]:
        config, given = parse_config(["--data_dir=d", f"--model_type={name}"])
        if fits:
            assert resolve_model(config.model, given, stored, 64, 8, is_own) == stored
            continue
        with pytest.raises(ValueError, match=f"--model_type={name} does not fit .*, which are of family llama: leave"):
            resolve_model(config.model, given, stored, 64, 8, is_own)
        with pytest.raises(ValueError, match=f"model_type is {name} in the run's config.yaml, and llama in its weig"):
            resolve_model(config.model, frozenset(), stored, 64, 8, is_own)


def test_a_qwen2_that_was_saved_as_a_llama_for_its_tokenizer_goes_on():
    stored = ModelConfig(vocab_size=64, model_type="llama", qkv_bias=True).resolve(max_seq_len=8)
    wanted = ModelConfig(model_type="qwen2", qkv_bias=True)
    assert resolve_model(wanted, frozenset(), stored, 64, 8, is_own=True) == stored


def test_a_model_that_no_family_holds_is_refused_before_the_training():
    run = RunConfig()
    with pytest.raises(ValueError, match="no family"):
        choose_shape(ModelConfig(normalized_head=True, qk_norm=True), run, frozenset(), None, False, 64, 8)
    assert choose_shape(ModelConfig(), run, frozenset(), None, False, 64, 8).model_type == ""
