"""The viewer's numbers: values that it takes from a log or skips, smoothing, thinning, the state of a run."""

import json
import math
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from runs import history as history_module
from runs.columns import Columns
from runs.history import RunHistory, Snapshot
from runs.reslog import LONGEST_LINE, parse_record, read_reslog
from tests.logs import line, snapshot_of
from utils.text import plain
from viewer.curves import band, smooth
from viewer.sources.run import Health, Run
from viewer.state import differences, state_of


def resumed() -> Snapshot:
    """Launch 0 makes steps 1 to 4; launch 1 goes on from step 2, an hour later; launch 2 from step 4."""
    return snapshot_of(
        line("start", step=0, time=100, max_iters=10),
        line("train", step=1, time=110, loss=5.0, tokens=10),
        line("train", step=2, time=120, loss=4.0, tokens=20),
        line("valid", step=2, time=125, loss=4.5),
        line("train", step=3, time=130, loss=99.0, tokens=30),
        line("train", step=4, time=140, loss=99.0, tokens=40),
        line("valid", step=4, time=141, loss=99.0),
        line("start", step=2, time=3600, max_iters=10),
        line("train", step=3, time=3605, loss=3.0, tokens=30),
        line("train", step=4, time=3610, loss=2.0, tokens=40),
        line("start", step=4, time=9000, max_iters=12),
        line("train", step=5, time=9007, loss=1.0, tokens=50),
    )


def test_what_a_resumed_run_superseded_vanishes():
    snapshot = resumed()
    assert snapshot.tables["train"]["step"].tolist() == [1, 2, 3, 4, 5]
    assert snapshot.tables["train"]["loss"].tolist() == [5, 4, 3, 2, 1]
    assert snapshot.tables["valid"]["loss"].tolist() == [4.5]
    assert [launch.step for launch in snapshot.launches] == [0, 2, 4]


def test_the_time_of_a_resumed_run_leaves_out_pauses_and_what_was_superseded():
    # Launch 0 lasted until its validation of step 2, at 125; launch 1 from 3600 to 3610.
    snapshot = resumed()
    assert snapshot.active_seconds("train").tolist() == [10, 20, 25 + 5, 25 + 10, 25 + 10 + 7]
    assert snapshot.active_seconds("valid").tolist() == [25]


def test_tokens_of_a_validation_lie_between_those_of_the_training():
    snapshot = snapshot_of(
        line("train", step=2, tokens=20), line("train", step=4, tokens=40),
        *(line("valid", step=step) for step in (2, 3, 9)),
    )  # fmt: skip
    assert snapshot.tokens("valid").tolist() == [20, 30, 40]
    assert snapshot.tokens("train").tolist() == [20, 40]
    assert np.isnan(snapshot_of(line("valid", step=2)).tokens("valid")).all()


def test_a_snapshot_stays_as_it_was_when_its_run_goes_on():
    data = RunHistory()
    data.feed([line("start", step=0), *(line("train", step=step, loss=float(step)) for step in range(1, 60))])
    before = data.snapshot()
    data.feed([line("train", step=step, loss=float(step)) for step in range(60, 200)])
    data.feed([line("start", step=5), line("train", step=6, loss=-1.0)])
    assert before.tables["train"]["loss"].tolist() == list(range(1, 60))
    assert data.snapshot().tables["train"]["loss"].tolist() == [1, 2, 3, 4, 5, -1]
    assert data.snapshot().version > before.version


def test_an_end_holds_until_the_next_launch():
    lines = [line("start", step=0), line("end", step=3, reason="stopped\x1b[2J by SIGTERM")]
    assert snapshot_of(*lines).ended == "stopped\N{REPLACEMENT CHARACTER}[2J by SIGTERM"
    assert snapshot_of(*lines, line("start", step=3)).ended == ""
    assert snapshot_of(line("end", reason=[[[1]]])).ended == "ended"


def test_a_number_that_json_lacks_is_shown_as_what_it_is():
    snapshot = snapshot_of(*(line("train", step=1, loss=loss) for loss in ("nan", "inf", "-inf", 1, None, "x", True)))
    np.testing.assert_array_equal(
        snapshot.tables["train"]["loss"], [math.nan, math.inf, -math.inf, 1, math.nan, math.nan, math.nan]
    )


@pytest.mark.parametrize("decoder", ["orjson", "json"])
@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b"[]", b"null", b"1", b'"train"', b"{}", b"\xff\xfe\x00", bytes(range(256)),
        b'{"name": "train", "time": 1, "step": "3"}', b'{"name": "train", "time": 1, "step": true}',
        b'{"name": "train", "time": 1, "step": 1.5}', b'{"name": "train", "time": 1, "step": -1}',
        b'{"name": "train", "time": 1, "step": 9007199254740993}',
        b'{"name": "train", "time": 1, "step": 1' + b"0" * 5000 + b"}", b'{"name": "train", "step": 1}',
        b'{"name": "train", "time": "1", "step": 1}', b'{"name": "train", "time": NaN, "step": 1}',
        b'{"name": "train", "time": 1e999, "step": 1}', b'{"name": "train", "time": -1, "step": 1}',
        b'{"name": "train", "time": true, "step": 1}', b'{"name": ["train"], "time": 1, "step": 1}',
        b'{"name": "start", "time": 1}', b'{"time": 1, "step": 1}', b'{"name": "train", "time": 1, "step": {}}',
        b"[" * 200_000, b'{"a":' * 100_000, b'{"name": "train", "time": 1, "step": 1, "x": ' + b"[" * 90_000,
        '{"name": "train", "time": 1, "step": 1, "x": "é"}'.encode("latin-1"), b"x" * (LONGEST_LINE + 1),
    ],
    ids=lambda text: repr(text[:60]) if isinstance(text, bytes) else text,
)  # fmt: skip
def test_a_line_that_holds_no_record_is_passed_over(text: bytes, decoder: str, monkeypatch: pytest.MonkeyPatch):
    if decoder == "json":
        monkeypatch.setattr(history_module, "orjson", None)
    snapshot = snapshot_of(text, line("train", step=7, loss=1.0))
    assert snapshot.tables["train"]["step"].tolist() == [7]
    assert snapshot.skipped_lines == (1 if text.strip() else 0)
    if decoder == "json":
        assert parse_record(text) is None


@pytest.mark.parametrize("decoder", ["orjson", "json"])
@pytest.mark.parametrize(
    "value", ["[1, 2]", '{"a": 1}', "true", '"text"', "null", "1" + "0" * 400, "-1" + "0" * 4000, '"\\u001b[2J"',
              "[" * 500 + "]" * 500, '"\\ud800"']  # fmt: skip
)
def test_a_metric_that_is_not_a_number_is_a_gap(value: str, decoder: str, monkeypatch: pytest.MonkeyPatch):
    if decoder == "json":
        monkeypatch.setattr(history_module, "orjson", None)
    record = f'{{"name": "train", "time": 1, "step": 1, "loss": {value}, "lr": 0.5}}'.encode()
    snapshot = snapshot_of(record, line("train", step=2, loss=3.0))
    np.testing.assert_array_equal(snapshot.tables["train"]["loss"], [math.nan, 3.0])
    np.testing.assert_array_equal(snapshot.tables["train"]["lr"], [0.5, math.nan])
    # Alone, it makes no column.
    assert "loss" not in snapshot_of(record).tables["train"]


def test_names_from_a_log_cannot_steer_a_terminal():
    evil = "\x1b]0;owned\x07\n\u202e"
    snapshot = snapshot_of(line(evil, step=1, **{evil: 1.0}), line("\ud800", step=1, **{"\ud801": 1.0}))
    names = [*snapshot.tables, *(metric for columns in snapshot.tables.values() for metric in columns)]
    assert len(names) == 2 * (1 + 4) and all(name.isprintable() for name in names)
    assert plain("a\u2028b\x9b" + 500 * "x") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}" + 196 * "x"


def test_thousands_of_metrics_leave_room_for_the_step():
    many = {f"m{number}": 1.0 for number in range(5000)}
    record = json.dumps({"name": "train", **many, "step": 3, "time": 5.0}).encode()
    columns = snapshot_of(record).tables["train"]
    assert columns["step"].tolist() == [3] and columns["time"].tolist() == [5.0] and len(columns) <= 200


def test_thousands_of_kinds_of_records_are_not_all_kept():
    snapshot = snapshot_of(line("train", step=1, loss=1.0), *(line(f"kind{n}", step=1, x=1.0) for n in range(3000)))
    assert "train" in snapshot.tables and len(snapshot.tables) <= 20


def test_the_line_that_a_crash_cut_off_is_not_said_to_be_left_out():
    torn, launch, step = b'{"name": "tra', line("start", step=1), line("train", step=1, loss=1.0)
    assert snapshot_of(launch, step, torn, launch).left_out == ()
    snapshot = snapshot_of(launch, b"", b" ", torn, torn, b"\r", launch, b"\0", step)
    assert snapshot.left_out == (("lines that hold no record ({:,})", (2,)),) and snapshot.skipped_lines == 3


def hostile() -> Iterator[tuple[str, list[bytes], str]]:
    """(name, lines, what the viewer reports as left out)."""
    names = [f"kind{n}" for n in range(20)]
    yield "kinds", [line(f"kind{n}", step=1, x=1.0) for n in range(50)], "kinds of records but the first 20"
    yield "metrics at once", [line("train", step=1, **{f"m{n}": 1.0 for n in range(500)})], (
        "metrics of train but the first 197")
    yield "a metric a record", [line("train", step=n, **{f"m{n}": 1.0}) for n in range(500)], (
        "metrics of train but the first 197")
    yield "launches", [line("start", step=0)] * 40, "restarts but the first 30"
    wide = [line(name, step=1, **{f"m{n}": 1.0 for n in range(100)}) for name in names]
    thin = [line(name, step=step) for step, name in product(range(2, 502), names)]
    yield "wide, then thin", wide + thin, "records of kind19, evenly"
    yield "no records", [b"{}", b"[]", b"\0", b"\xff", b"1" * 5000, b"[" * 9000], "lines that hold no record (6)"


HOSTILE = {what: (lines, said) for what, lines, said in hostile()}


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_log_can_fill_is_bounded_and_what_is_left_out_is_said(what: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history_module, "_MOST_LAUNCHES", 30, raising=False)
    monkeypatch.setattr(history_module, "_FREE_CELLS", 10_000, raising=False)
    lines, said = HOSTILE[what]
    snapshot = snapshot_of(*lines)
    assert len(snapshot.launches) <= 30 and len(snapshot.tables) <= 20
    cells = sum(column.size for columns in snapshot.tables.values() for column in columns.values())
    # Eight bytes per number in the lines, and in the free ones.
    assert cells <= 10_000 + 8 * sum(max(len(json.loads(text)) - 1, 0) for text in lines if text.startswith(b'{"'))
    assert any(said in text.format(*values) for text, values in snapshot.left_out)
    # The newest record is there, whatever was dropped.
    if what == "wide, then thin":
        assert snapshot.tables["kind19"]["step"][-1] == 501


@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_thinning_is_even_and_counted(batch: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(history_module, "_MOST_CELLS", 5 * 100, raising=False)
    data, lines = RunHistory(), [line("train", step=step, loss=float(step)) for step in range(1, 2001)]
    for first in range(0, len(lines), batch):
        data.feed(lines[first : first + batch])
    snapshot = data.snapshot()
    kept = snapshot.tables["train"]["loss"]
    assert 25 <= len(kept) <= 100 and kept[-1] == 2000 and snapshot.tables["train"]["step"].tolist() == kept.tolist()
    # No stretch of the run is missing: of two thousand in a hundred, at worst every eightieth.
    assert 1 <= np.diff(kept, prepend=0).min() and np.diff(kept, prepend=0).max() <= 80
    assert snapshot.left_out == (("records of {}, evenly ({:,})", ("train", 2000 - len(kept))),)


class Counting(dict):
    """A record that counts how often its keys and values are read."""

    looks = 0

    def get(self, *args: object) -> object:
        Counting.looks += 1
        return super().get(*args)

    def __getitem__(self, key: str) -> object:
        Counting.looks += 1
        return super().__getitem__(key)

    def items(self) -> Iterator:
        Counting.looks += len(self)
        return super().items()


@pytest.mark.parametrize("count", [100, 400])
def test_each_record_is_looked_at_a_few_times_however_many_keys_the_others_have(
    count: int, monkeypatch: pytest.MonkeyPatch
):
    parse = history_module.parse_record
    monkeypatch.setattr(history_module, "parse_record", lambda *args: Counting(parse(*args)))
    Counting.looks = 0
    snapshot_of(*(line("train", step=n, **{f"{n} {m}": 1.0 for m in range(9)}) for n in range(count)))
    assert Counting.looks <= 30 * count


@pytest.mark.parametrize("count", [300, 1200])
def test_a_launch_moves_no_rows_that_stand(count: int, monkeypatch: pytest.MonkeyPatch):
    """In a long log, thousands of launches each go back by one step."""
    moved, take = [], Columns._take
    monkeypatch.setattr(Columns, "_take", lambda table, rows: moved.append(table.rows) or take(table, rows))
    monkeypatch.setattr(history_module, "_BATCH_BYTES", 1000)
    steps = [line("train", step=n, loss=1.0) for n in range(count)]
    back = [line("start", step=count - 1), line("train", step=count, loss=2.0)]
    snapshot = snapshot_of(*steps, *(back * count))
    assert snapshot.tables["train"]["step"].tolist() == list(range(count + 1))
    assert sum(moved) <= 2 * count


@pytest.mark.parametrize("seed", range(8))
def test_what_is_shown_is_what_stands(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In batches and polls of any size, it equals the other reader of logs."""
    random_ = random.Random(seed)
    monkeypatch.setattr(history_module, "_BATCH_BYTES", random_.choice((1, 300, 5000)))
    lines, step = [], 0
    for _ in range(250):
        step = max(step + random_.choice((-4, 0, 1, 1, 1, 2)), 0)
        if random_.random() < (0.02, 0.3)[seed % 2]:
            step = max(step - random_.randrange(15), 0)
            lines.append(line("start", step=step))
        metrics = {key: random_.random() for key in random_.sample(("loss", "lr", "x"), random_.randrange(3))}
        lines.append(line(random_.choice(("train", "valid")), step=step, **metrics))
    data, before = RunHistory(), []
    rest = list(lines)
    while rest:
        size = random_.randrange(1, 60)
        data.feed(rest[:size])
        rest = rest[size:]
        tables = data.snapshot().tables
        copies = {name: {key: column.copy() for key, column in found.items()} for name, found in tables.items()}
        before.append((tables, copies))
    path = tmp_path / "reslog.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    for name in ("train", "valid"):
        records = sorted(read_reslog(path, (name,)), key=lambda record: record["step"])
        for metric in ("step", "loss", "lr", "x"):
            expected = [record.get(metric, math.nan) for record in records]
            if metric in data.snapshot().tables[name] or np.isfinite(expected).any():
                np.testing.assert_array_equal(data.snapshot().tables[name][metric], expected)
    for tables, copies in before:
        for name, found in copies.items():
            for metric, column in found.items():
                np.testing.assert_array_equal(tables[name][metric], column)


def test_steps_that_fall_are_put_in_order():
    snapshot = snapshot_of(*(line("train", step=step, loss=float(step)) for step in (5, 3, 9, 1)))
    assert snapshot.tables["train"]["step"].tolist() == [1, 3, 5, 9]
    assert snapshot.tables["train"]["loss"].tolist() == [1, 3, 5, 9]


def test_a_hundred_thousand_launches():
    data = RunHistory()
    data.feed(b'{"name": "start", "step": 0, "time": %d}' % number for number in range(100_000))
    data.feed([line("train", step=1, time=100_001.0, loss=1.0)])
    snapshot = data.snapshot()
    assert len(snapshot.launches) == 100_000
    assert snapshot.active_seconds("train").tolist() == [2.0]


def test_a_record_whose_step_is_null_does_not_stop_a_reader(tmp_path: Path):
    path = tmp_path / "reslog.jsonl"
    lines = [b'{"name": "note", "time": 1, "step": null}', line("train", step=3), line("start", step=1)]
    path.write_bytes(b"\n".join(lines))
    assert [record["name"] for record in read_reslog(path)] == ["note", "start"]


def test_smoothing_is_the_average_that_its_formula_says():
    random = np.random.default_rng(0)
    for count, weight in ((1, 0.9), (7, 0.5), (127, 0.99), (128, 0.3), (129, 0.9), (1000, 0.999)):
        y = random.normal(size=count)
        y[random.random(count) < 0.1] = math.nan
        y[random.random(count) < 0.05] = math.inf
        expected, state, seen = [], 0.0, 0
        for value in y:
            if not math.isfinite(value):
                expected.append(math.nan)
                continue
            seen += 1
            state = weight * state + (1 - weight) * value
            expected.append(state / (1 - weight**seen))
        if seen:
            np.testing.assert_allclose(smooth(y, weight), expected, rtol=1e-9, atol=1e-12)


def test_smoothing_of_nothing():
    y = np.array([1.0, math.nan])
    assert smooth(y, 0.0) is y and len(smooth(np.empty(0), 0.9)) == 0
    assert not np.isfinite(smooth(np.array([math.inf, math.nan]), 0.9)).any()


@pytest.mark.parametrize("seed", range(8))
def test_thinning_loses_no_spike(seed: int):
    """In each column of the screen, the kept points reach as low and as high as all points."""
    random = np.random.default_rng(seed)
    count, columns = int(random.integers(900, 4000)), int(random.integers(1, 200))
    x = np.sort(random.choice(np.linspace(-5, 1e6, 3 * count), count))
    y = random.normal(size=count) * 10.0 ** random.integers(-5, 5, count)
    y[random.random(count) < 0.2] = math.nan
    y[random.random(count) < 0.02] = random.choice([math.inf, -math.inf])
    if seed == 0:
        y[:] = math.nan
    middle, low, high = band(x, y, columns)
    assert len(middle) <= columns and (np.diff(middle) >= 0).all()
    column = np.minimum(((x - x[0]) / (x[-1] - x[0]) * columns).astype(int), columns - 1)
    for number, at, least, greatest in zip(np.unique(column), middle, low, high, strict=True):
        there = column == number
        assert x[there].min() <= at <= x[there].max()
        np.testing.assert_array_equal((least, greatest), (np.fmin.reduce(y[there]), np.fmax.reduce(y[there])))


def test_thinning_of_points_at_one_place():
    x, y = np.full(100, 3.0), np.arange(100.0)
    middle, low, high = band(x, y, 5)
    assert (middle.tolist(), low.tolist(), high.tolist()) == ([3.0], [0.0], [99.0])


def test_a_few_points_are_a_line():
    x = np.arange(20.0)
    assert band(x, x, 5) is None and band(x, x, 0) is None and band(x, x, 4) is not None


def state(snapshot: Snapshot, now: float, **health) -> tuple[str, str]:
    run = Run(None, "out/a")
    run.health = Health(**health)
    found = state_of(run, snapshot, now)
    return found.kind, found.detail


def test_how_a_run_is_doing():
    going = snapshot_of(
        line("start", step=0, time=1000, max_iters=100),
        *(line("train", step=n, time=1000 + n, dt=1.0, loss=2.0) for n in range(1, 11)),
    )
    assert state(going, 1050) == ("running", "")
    kind, detail = state(going, 1010 + 61)
    assert kind == "stalled" and detail.startswith("no news for 1")
    assert state(going, 1050, phase="validate") == ("running", "validate")
    # A heartbeat is news, and both clocks are the other machine's.
    assert state(going, 1200, heartbeat_at=1199.0) == ("running", "")
    assert state(going, 9999, clock_ahead=-8960.0)[0] == "running"
    assert state(going, 1020, clock_ahead=3600.0)[0] == "stalled"
    assert state(going, 1050, problem="gone") == ("no connection", "gone")
    assert state(snapshot_of(), 5.0) == ("waiting", "no results yet")
    assert state(snapshot_of(line("start", step=0), line("end", reason="done")), 9e9) == ("ended", "done")


def test_slow_steps_do_not_make_a_run_stalled():
    slow = snapshot_of(line("start", step=0, time=0), line("train", step=1, time=600, dt=600.0))
    assert state(slow, 600 + 5999)[0] == "running"
    assert state(slow, 600 + 6001)[0] == "stalled"


def test_the_clock_of_a_run_was_set_back():
    snapshot = snapshot_of(line("start", step=0, time=9e10), line("train", step=1, time=1000, loss=1.0))
    assert state(snapshot, 5000.0)[0] == "stalled"


def test_figures_of_a_run():
    run = Run(None, "out/a")
    found = state_of(run, resumed(), 9008.0)
    assert (found.step, found.max_iters, found.loss, found.valid_loss) == (5, 12, 1.0, 4.5)
    lines = [line("start", step=0, max_iters="9"), *(line("train", step=n, dt=d) for n, d in ((1, 2), (2, 2), (3, 50)))]
    run.health.config = {"derived.max_iters": 13}
    assert state_of(run, snapshot_of(*lines), 1001.0).seconds_left == 10 * 2


@pytest.mark.parametrize("facts", [{"max_iters": [1]}, {"max_iters": 10**300}, {"max_iters": -1}, {"max_iters": True}])
def test_a_plan_that_is_not_a_number_of_steps(facts: dict):
    snapshot = snapshot_of(line("start", step=0, **facts), line("train", step=1, dt="inf", tokens_per_sec="nan"))
    found = state_of(Run(None, "a"), snapshot, 1001.0)
    assert found.max_iters is None and math.isnan(found.seconds_left) and math.isnan(found.tokens_per_sec)


def test_differences_of_settings():
    a = {"lr": 0.1, "seed": 1, "name": "x\x1b[2J", "derived.lr": 0.1, "derived.world": 2}
    b = {"lr": 0.2, "seed": 1, "derived.lr": 0.2, "derived.world": 4, "extra": None}
    assert differences([a, b]) == [
        ("lr", ["0.1", "0.2"]), ("name", ["x\N{REPLACEMENT CHARACTER}[2J", ""]), ("derived.world", ["2", "4"]),
        ("extra", ["", "None"]),
    ]  # fmt: skip
    assert differences([a, a]) == [] and differences([]) == []
    # One run differs from nothing: its settings are shown.
    assert [key for key, _ in differences([a])] == list(a) and ("lr", ["0.1"]) in differences([a])
