"""Values chosen from data and weights if nobody has given them: the batch of SFT and DPO, and the context."""

import itertools
import re
from pathlib import Path

import pytest
import yaml

import train_my_ddp
from configurator import flatten, parse_config
from data_preprocess.build_pretrain_sample_index_map import build
from model import flops
from runs.layout import CONFIG_NAME
from tests.conftest import SEQ_LEN
from tests.runs import records
from tests.unit import test_sft_train as sft
from training import rates
from training.batch import batch_for, choose_batch, split_batch
from training.data import fit_context


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> sft.Home:
    return sft.Home(tmp_path_factory.mktemp("home"))


def batch_of(samples: int, world_size: int, *argv: str) -> tuple[int, int]:
    config, given = parse_config(["--data_dir=d", "--init_from=m", *argv])
    data = choose_batch(config.run, config.data, given, samples, world_size)
    return data.train_batch_size, data.gradient_accumulation_steps


def test_the_batch_leaves_the_data_enough_steps():
    """As many samples as possible, up to the usual 64, with a hundred steps."""
    for samples in range(1, 20_000, 37):
        batch = batch_for(samples)
        assert batch in (4, 8, 16, 32, 64)
        assert batch == 4 or samples / batch >= 100
        assert batch == 64 or samples / (2 * batch) < 100


def test_the_batch_is_the_same_on_one_two_four_and_eight_processes():
    for batch, most, world_size in itertools.product((4, 8, 16, 32, 64), (2, 8), range(1, 17)):
        size, count = split_batch(batch, world_size, most)
        assert 1 <= size <= most and count % world_size == 0
        # Other numbers of processes share a similar batch.
        assert size * count == batch or world_size > batch or world_size not in (1, 2, 4, 8)
        assert abs(size * count - batch) <= max(batch // 3, world_size)
        if world_size in (1, 2, 4, 8) and world_size <= batch:
            assert (size, count) == split_batch(batch, 1, most)


@pytest.mark.parametrize(("argv", "expected"), [
    (["--task_type=sft", "--epoch=3"], (1, 8)), (["--task_type=dpo", "--epoch=3"], (1, 8)),
    (["--task_type=sft", "--epoch=0.5"], (1, 4)), (["--task_type=dpo", "--epoch=0.5"], (1, 4)),
    (["--task_type=sft", "--epoch=300"], (8, 8)), (["--task_type=sft", "--epoch=300", "--size=laptop"], (2, 32)),
    (["--task_type=sft", "--max_iters=7"], (1, 4)),
    (["--task_type=sft", "--train_batch_size=3"], (3, 8)), (["--task_type=sft", "--epoch=3",
     "--gradient_accumulation_steps=8"], (8, 8)), (["configs/sft.yaml"], (2, 16)), ([], (8, 8)),
    (["--size=tiny"], (4, 2)),
])  # fmt: skip
def test_a_batch_that_was_said_stays(monkeypatch: pytest.MonkeyPatch, argv: list[str], expected: tuple[int, int]):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    if argv and argv[0].endswith(".yaml"):
        config, given = parse_config([*argv, "--data_dir=d", "--init_from=m"])
        assert choose_batch(config.run, config.data, given, 300, 1) == config.data
    else:
        assert batch_of(300, 1, *argv) == expected


def test_a_sizes_batch_is_shared_by_any_number_of_processes():
    """A step has the same samples if the processes can share them."""
    assert [batch_of(300, n, "--size=laptop") for n in (1, 2, 4, 8)] == [(2, 4), (2, 4), (2, 4), (1, 8)]
    assert [batch_of(300, n, "--size=gpu") for n in (3, 8, 16)] == [(14, 9), (16, 8), (8, 16)]
    # Without a size, and for given values, nothing changes.
    assert batch_of(300, 3) == (8, 8) and batch_of(300, 3, "--size=gpu", "--train_batch_size=2") == (2, 8)


def test_a_run_keeps_the_batch_that_was_chosen(
    home: sft.Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Even with so many epochs that another batch would be chosen, and on other numbers of processes."""
    monkeypatch.setattr(flops, "device_peak_flops", lambda *_: 1e11)
    flags = ["--task_type=sft", f"--data_dir={home.raw_sft}", f"--init_from={home.model}", "--dtype=float32",
             "--device=cpu", "--num_threads=1", f"--out_dir={tmp_path / 'run'}", "--sample_texts=0"]  # fmt: skip
    assert train_my_ddp.main(flags) == 0
    saved = yaml.safe_load((tmp_path / "run" / CONFIG_NAME).read_text())
    values = {"train_batch_size": 1, "gradient_accumulation_steps": 4, "max_seq_len": sft.SEQ_LEN}
    assert values.items() <= saved.items()
    said = capsys.readouterr().out
    rows = int(re.search("4 rows a step, chosen from the ([0-9]+) there are", said)[1])
    assert f"max_seq_len is {sft.SEQ_LEN}, as the weights" in said
    assert records(flags, "start")[0]["global_batch_size"] == 4
    config, given = parse_config(["--resume", f"--out_dir={tmp_path / 'run'}", "--epoch=500"])
    run, data = config.run, config.data
    assert choose_batch(run, data, given, rows, 4) == fit_context(run, data, given) == data
    assert values.items() <= flatten(config).items()
    config, given = parse_config([*flags, "--epoch=500"])
    assert choose_batch(config.run, config.data, given, rows, 4).gradient_accumulation_steps == 8


@pytest.mark.parametrize(("argv", "lengths", "expected"), [
    ([], [], SEQ_LEN), (["--size=laptop"], [], SEQ_LEN), (["--size=laptop"], [512], 512), ([], [512, 1024], 1024),
    ([], [512], "has an index for samples of 64 and of 512 tokens: say which with --max_seq_len"),
    (["--max_seq_len=77"], [], 77),
])  # fmt: skip
def test_pretraining_takes_the_context_of_its_index(
    data_dir: Path, tmp_path: Path, argv: list[str], lengths: list[int], expected: int | str
):
    for path in data_dir.iterdir():
        if path.is_file():
            (tmp_path / path.name).symlink_to(path)
    for length in lengths:
        build(tmp_path, length)
    config, given = parse_config([f"--data_dir={tmp_path}", *argv])
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            fit_context(config.run, config.data, given)
    else:
        assert fit_context(config.run, config.data, given).max_seq_len == expected


def test_fine_tuning_takes_the_context_of_data_and_weights(home: sft.Home):
    for data, argv, expected in (
        (home.sft, [], sft.SEQ_LEN), (home.raw_sft, [], sft.SEQ_LEN), (home.raw_sft, ["--size=tiny"], sft.SEQ_LEN),
        (home.raw_sft, ["--max_seq_len=2048"], 2048), (home.raw_sft, ["--size=tiny", "--max_seq_len=60"], 60),
    ):  # fmt: skip
        config, given = parse_config(["--task_type=sft", f"--data_dir={data}", f"--init_from={home.model}", *argv])
        assert fit_context(config.run, config.data, given).max_seq_len == expected


@pytest.mark.parametrize(("task", "rate", "parameters", "is_warned"), [
    ("sft", "3e-4", 7_000_000_000, True), ("sft", "2e-5", 7_000_000_000, False), ("sft", "1e-3", 13_800_000, False),
    ("dpo", "5e-5", 7_000_000_000, True), ("dpo", "5e-7", 7_000_000_000, False),
    ("pretrain", "3e-4", 7_000_000_000, False),
])  # fmt: skip
def test_a_rate_that_ruins_a_large_model_is_said(
    caplog: pytest.LogCaptureFixture, task: str, rate: str, parameters: int, is_warned: bool
):
    config, _ = parse_config(["--data_dir=d", "--init_from=m", f"--task_type={task}", f"--learning_rate={rate}"])
    rates.warn_of_rate(config.run, config.optimizer.learning_rate, parameters)
    assert ("likely to ruin the weights" in caplog.text) == is_warned
