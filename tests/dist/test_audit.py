"""The audit of runs on two ranks: resumed on another number of ranks, and with a wrong loader."""

import train_my_ddp
from dataset.audit import main as audit
from dataset.loader import TrainLoader
from tests.dist.group import run_ranks
from tests.runs import out_dir, records


def train(flags: list[str]) -> int:
    return train_my_ddp.main(flags)


def train_on_the_same_data(flags: list[str]) -> int:
    """The original's mistake: every rank reads rank 0's rows."""
    initialize = TrainLoader.__init__

    def wrong(self: TrainLoader, *args: object, **kwargs: object) -> None:
        initialize(self, *args, **kwargs)
        self.data_rank = 0

    TrainLoader.__init__ = wrong
    return train_my_ddp.main(flags)


def test_two_ranks_then_one(tiny_run: list[str], capsys):
    assert run_ranks(2, train, tiny_run) == [0, 0]
    assert train_my_ddp.main([*tiny_run, "--resume", "--max_iters=6"]) == 0
    assert audit([str(out_dir(tiny_run))]) == 0
    assert "6 steps, 24 samples, 2 launches (processes: 2, 1)" in capsys.readouterr().out


def test_every_rank_reads_the_same(tiny_run: list[str], capsys):
    assert run_ranks(2, train_on_the_same_data, tiny_run) == [0, 0]
    assert len(records(tiny_run, "train")) == 4
    assert audit([str(out_dir(tiny_run))]) == 1
    assert capsys.readouterr().out.count("the micro-batches held other samples or tokens") == 4
