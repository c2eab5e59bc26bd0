"""Several directories as one stream: shares, order, resumption with another mixture, and what is said of it."""

import json
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import train_my_ddp
from data_preprocess.build_pretrain_sample_index_map import build
from data_preprocess.jobs import process_corpus
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import Corpus
from dataset.audit import main as audit
from dataset.inspect import main as inspect
from dataset.loader import TrainLoader
from dataset.mixture import MixtureDataset
from dataset.mixture_spec import directories_of, is_mixture, read_mixture
from dataset.opening import open_dataset
from dataset.order import sample_at
from dataset.pretrain import PretrainDataset
from model import Decoder, ModelConfig
from tasks.language_model import LanguageModelTask
from tests.conftest import SEQ_LEN
from tests.runs import elsewhere, final_state, out_dir, records, same_bits
from tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def sources(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three directories, one of which is small."""
    home, found = tmp_path_factory.mktemp("sources"), {"web": data_dir}
    for name, count in (("code", 400), ("wiki", 120)):
        corpus = home / f"corpus-{name}"
        corpus.mkdir()
        for number in range(8):
            lines = [f"{name} {number} has {n * n % 97} of {n}\n" for n in range(count)]
            (corpus / f"{number}.txt").write_text("".join(lines))
        tokenizer_dir = str(data_dir / "tokenizer")
        process_corpus(PretrainJob(Corpus(str(corpus)), str(home / name), tokenizer_dir, valid_ratio=0.3), 0)
        build(home / name, SEQ_LEN)
        found[name] = home / name
    return found


def named(sources: dict[str, Path], **shares: object) -> str:
    return ",".join(f"{sources[name]}:{share}" for name, share in shares.items())


def mixture(text: str, total: int = 1000) -> MixtureDataset:
    found = open_dataset("pretrain", text, "train", SEQ_LEN)
    assert isinstance(found, MixtureDataset)
    found.arrange(total)
    return found


def test_each_source_keeps_its_own_order(sources: dict[str, Path]) -> None:
    data = mixture(named(sources, web="0.6", code="0.3", wiki="0.1"))
    positions = np.arange(700)
    ids = data.ids_at(3, positions)
    which = data.sources_of(ids)
    assert np.bincount(which).tolist() == [420, 210, 70]
    begin = 0
    for number, name in enumerate(("web", "code", "wiki")):
        alone = PretrainDataset(sources[name], "train", SEQ_LEN)
        mine = ids[which == number]
        assert np.array_equal(mine - begin, sample_at(3, np.arange(len(mine)), len(alone)))
        assert np.array_equal(data.read_rows(mine[:9]), alone.read_rows(mine[:9] - begin))
        begin += len(alone)
    batch = data.collate(ids[:5])
    assert batch["sources"].tolist() == which[:5].tolist()


def test_validation_holds_each_sample_once_and_all_sources_early(sources: dict[str, Path]) -> None:
    data = open_dataset("pretrain", named(sources, web="0.5", code="0.25", wiki="0.25"), "valid", SEQ_LEN)
    assert isinstance(data, MixtureDataset)
    ids = np.arange(len(data))
    rows = data.read_rows(ids)
    alone = [PretrainDataset(path, "valid", SEQ_LEN) for path in sources.values()]
    expected = np.concatenate([part.read_rows(np.arange(len(part))) for part in alone])
    assert sorted(map(bytes, rows)) == sorted(map(bytes, expected))
    assert set(data.sources_of(ids[:4]).tolist()) == {0, 1, 2}


def test_a_file_with_phases_and_limits(sources: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(
        f"sources:\n  web: {sources['web']}\n  wiki: {{dir: {sources['wiki']}, epochs: 1.5}}\n"
        "phases:\n  - {web: 0.5, wiki: 0.5}\n  - {from: 0.9, web: 1}\n"
    )
    assert is_mixture(file) and directories_of(file) == [sources["web"], sources["wiki"]]
    data, size = mixture(str(file), total=2000), len(PretrainDataset(sources["wiki"], "train", SEQ_LEN))
    which = data.sources_of(data.ids_at(0, np.arange(2000)))
    assert (which[:20] == 1).sum() == 10 and (which == 1).sum() == int(1.5 * size)
    assert not which[1800:].any()
    file.write_text(
        f"sources:\n  web: {sources['web']}\n"
        "phases:\n  - {web: 1}\n  - {from: 0.9, web: 1}\n  - {from: 9, web: 1}\n"
    )
    with pytest.raises(ValueError, match="one after the other, got 0, 1800, 9"):
        mixture(str(file), total=2000)
    # Its end is found before the run, not in it.
    file.write_text(f"sources:\n  wiki: {{dir: {sources['wiki']}, epochs: 1}}\nshares: {{wiki: 1}}\n")
    with pytest.raises(ValueError, match=f"the mixture ends after {size} samples.*and the run needs 2,000"):
        mixture(str(file), total=2000)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("sources: 3", "has no `sources:`"),
        ("sources: {a: x}", "needs either `shares:`"),
        ("sources: {a: x}\nshares: {a: 1, b: 2}", "has b, which means nothing there: known are from, a"),
        ("sources: {a: {dir: x, epoch: 1}}\nshares: {a: 1}", "has epoch, which means nothing there"),
        ("sources: {a: {dir: x, epochs: -1}}\nshares: {a: 1}", "must not be negative"),
        ("sources: {a: x}\nshares: {a: yes}", "must be a number, got True"),
        ("sources: {a: x}\nshares: {a: 0}", "gives no source a share"),
        ("sources: {a: x}\nphases: [{a: 1, from: 0.5}]", "must begin at 0"),
        ("sources: {a: x}\nphases: [{a: 1}, {a: 1, from: 1.5}]", "below 1, a part of the run, or a whole number"),
        ("sources: [", "mix.yaml: "),
    ],
)
def test_a_file_that_is_no_mixture(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        read_mixture(tmp_path / "mix.yaml")


def test_on_the_command_line(tmp_path: Path) -> None:
    spec = read_mixture("data/web:0.6,other/code:.4")
    assert [(source.name, str(source.path)) for source in spec.sources] == [("web", "data/web"), ("code", "other/code")]
    assert spec.wishes(100) == [(0, (Fraction(3, 5), Fraction(2, 5)))]
    with pytest.raises(ValueError, match="several sources called a: name them in a YAML file"):
        read_mixture("x/a:1,y/a:1")
    assert not is_mixture(tmp_path) and not is_mixture("data/web") and not is_mixture("c:/data")


def test_sources_that_do_not_belong_together(sources: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(sources["wiki"], other)
    with pytest.raises(ValueError, match="other and wiki hold the same data|wiki and other hold the same data"):
        mixture(f"{sources['wiki']}:0.5,{other}:0.5")
    with pytest.raises(ValueError, match="source nowhere of the mixture: "):
        mixture(f"{sources['wiki']}:0.5,{tmp_path / 'nowhere'}:0.5")


@pytest.mark.parametrize("data_size", [2, 4])
def test_ranks_together_read_one_stream(sources: dict[str, Path], data_size: int) -> None:
    data = mixture(named(sources, web="0.6", code="0.3", wiki="0.1"))
    loaders = [TrainLoader(data, 5, 1, 4, rank, data_size, 8, num_workers=0) for rank in range(data_size)]
    for number in range(5):
        steps = [next(loader) for loader in loaders]
        batches = [batch for step in steps for batch in step.micro_batches]
        positions = sorted(int(batch["row_ids"]) for batch in batches)
        assert positions == list(range(8 + 4 * number, 12 + 4 * number))
        for batch in batches:
            assert int(batch["sample_ids"]) == data.ids_at(5, batch["row_ids"].numpy())[0]


def given(run: list[str]) -> dict[str, list[int]]:
    """Source -> its samples that the run's records took, in order, by the order alone."""
    found: dict[str, list[int]] = {}
    starts = [record for record in records(run, "start")]
    for record in records(run, "train"):
        start = [one for one in starts if one["step"] < record["step"]][-1]
        names = [(source["name"], source["dir"]) for source in start["mixture"]["sources"]]
        data = MixtureDataset(
            read_mixture(",".join(f"{directory}:1" for _, directory in names)),
            [PretrainDataset(directory, "train", SEQ_LEN) for _, directory in names],
        )
        data.take(start["mixture"])
        first, last = record["samples"]
        which, indices = data.schedule.at(np.arange(first, last + 1))  # type: ignore[union-attr]
        for number, index in zip(which.tolist(), indices.tolist()):
            found.setdefault(Path(names[number][1]).name, []).append(index)
    return found


def with_data(run: list[str], text: str) -> list[str]:
    return [flag for flag in run if not flag.startswith("--data_dir=")] + [f"--data_dir={text}"]


def test_a_run_and_its_resumption_in_another_mixture(
    sources: dict[str, Path], tiny_run: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_data(tiny_run, named(sources, web="0.5", code="0.5"))
    assert train_my_ddp.main([*run, "--save_interval=2"]) == 0
    (start,) = records(run, "start")
    assert [source["name"] for source in start["mixture"]["sources"]] == [sources["web"].name, "code"]
    last = records(run, "train")[-1]
    # The sources' own losses are parts of the whole one.
    assert min(last["loss/code"], last[f"loss/{sources['web'].name}"]) < last["loss"]
    assert max(last["loss/code"], last[f"loss/{sources['web'].name}"]) > last["loss"]
    assert "loss/code" in records(run, "valid")[-1]

    # Killed and resumed as it was: the same bits.
    again = elsewhere(run, tmp_path / "again")
    shutil.copytree(out_dir(run), out_dir(again))
    shutil.rmtree(out_dir(again) / "ckpt" / "step-4")
    assert train_my_ddp.main([*again, "--resume"]) == 0
    assert same_bits(final_state(again, 4), final_state(run, 4))

    # Another mixture, with a source more: nothing is repeated or left out in any source.
    new = with_data(run, named(sources, code="0.25", wiki="0.25", web="0.5"))
    assert train_my_ddp.main([*new, "--resume", "--max_iters=8"]) == 0
    for taken in given(new).values():
        assert taken == list(range(len(taken)))
    assert {name: len(taken) for name, taken in given(new).items()} == {
        sources["web"].name: 16, "code": 12, "wiki": 4,
    }  # fmt: skip
    capsys.readouterr()
    assert audit([str(out_dir(new))]) == 0
    printed = capsys.readouterr().out
    assert "every position was taken once" in printed and "wiki 4 (12.50%)" in printed

    # A token's origin can still be told.
    data = open_dataset("pretrain", named(sources, code="0.25", wiki="0.25", web="0.5"), "train", SEQ_LEN)
    assert isinstance(data, MixtureDataset)
    data.take(records(new, "start")[-1]["mixture"])
    position = next(n for n in range(16, 32) if data.sources_of(data.ids_at(1337, np.array([n])))[0] == 1)
    assert inspect([str(out_dir(new)), "--position", str(position)]) == 0
    (first, *shown) = capsys.readouterr().out.splitlines()
    assert f"of wiki, {sources['wiki']}" in first
    sample = first.split()[4]
    assert inspect([str(sources["wiki"]), "--sample", sample]) == 0
    assert capsys.readouterr().out.splitlines() == shown
    assert inspect([str(out_dir(new))]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("source ")] == [
        f"source {sources[name].name}, {sources[name]}" for name in ("code", "wiki", "web")
    ]
    assert inspect([str(out_dir(new)), "--sample", "1"]) == 2
    assert "give the directory of the source" in capsys.readouterr().err


def test_a_run_that_began_with_one_directory(
    sources: dict[str, Path], tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_data(tiny_run, str(sources["web"]))
    assert train_my_ddp.main([*run, "--max_iters=2"]) == 0
    new = with_data(run, named(sources, web="0.5", code="0.5"))
    assert train_my_ddp.main([*new, "--resume", "--max_iters=4"]) == 0
    start = records(new, "start")[-1]
    assert start["samples_consumed"] == 8 and start["mixture"]["schedule"]["phases"][0]["done"] == [8, 0]
    assert audit([str(out_dir(new))]) == 0
    assert "12 (75.00%)" in capsys.readouterr().out


def test_the_audit_finds_a_wrong_loader(
    sources: dict[str, Path], tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_data(tiny_run, named(sources, web="0.5", code="0.5"))
    ids_at = MixtureDataset.ids_at

    def wrong(self: MixtureDataset, seed: int, positions: np.ndarray) -> np.ndarray:
        # The source is right, the sample is the one after.
        ids = ids_at(self, seed, positions)
        return np.where(ids == ids[0], ids_at(self, seed, positions + 2), ids)

    with monkeypatch.context() as patch:
        patch.setattr(MixtureDataset, "ids_at", wrong)
        assert train_my_ddp.main(run) == 0
    assert audit([str(out_dir(run))]) == 1
    assert "WRONG step 1: the digest" in capsys.readouterr().out


def test_the_audit_finds_a_source_that_was_begun_anew(
    sources: dict[str, Path], tiny_run: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = with_data(tiny_run, named(sources, web="0.5", code="0.5"))
    assert train_my_ddp.main([*run, "--max_iters=2"]) == 0
    new = with_data(run, named(sources, web="0.25", code="0.75"))
    assert train_my_ddp.main([*new, "--resume", "--max_iters=4"]) == 0
    path = out_dir(run) / "reslog.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    [line for line in lines if line["name"] == "start"][-1]["mixture"]["schedule"]["phases"][0]["done"] = [4, 0]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert audit([str(out_dir(run))]) == 1
    assert "goes on in source" in capsys.readouterr().out


def test_a_mixture_of_conversations_is_refused(sources: dict[str, Path], tiny_run: list[str]) -> None:
    run = with_data(tiny_run, named(sources, web="0.5", code="0.5"))
    tokenizer = load_tokenizer(sources["web"] / "tokenizer")
    assert tokenizer.vocab_size == 512
    assert train_my_ddp.main([*run, "--task_type=sft"]) == 2


@pytest.mark.parametrize("is_training", [True, False])
def test_losses_of_sources_are_those_of_their_rows(is_training: bool) -> None:
    shape = ModelConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = Decoder(shape.resolve(50, 8))
    model.initialize(torch.Generator().manual_seed(0))
    model.train(is_training)
    task = LanguageModelTask(model, 0, torch.ones(50, dtype=torch.int64))
    rows = torch.arange(4 * 8).view(4, 8) % 50
    labels = rows.roll(-1, 1).clone()
    labels[0, :3] = labels[2, 1] = -100
    batch = {"input_ids": rows, "labels": labels, "positions": torch.arange(8).expand(4, 8)}
    whole = [task(one) for one in ({name: value[n : n + 1] for name, value in batch.items()} for n in range(4))]
    task.sources = ("a", "b", "c")
    loss, count, sums = task(batch | {"sources": torch.tensor([1, 0, 1, 0])})
    loss = loss.detach()
    assert set(sums) == set(task.metric_names)
    for name, members in (("a", (1, 3)), ("b", (0, 2)), ("c", ())):
        assert sums[f"tokens/{name}"] == sum(int(whole[n][1]) for n in members)
        assert float(sums[f"loss/{name}"]) == pytest.approx(sum(float(whole[n][0].detach()) for n in members), rel=1e-6)
    figures = task.figures(float(loss), float(count), {name: float(value) for name, value in sums.items()})
    assert "loss/a" in figures and "loss/c" not in figures
