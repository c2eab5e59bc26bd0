"""The viewer's pictures: panels, drawings of ordinary and of hostile runs, axes, marks, files."""

import csv
import io
import math
import threading
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from runs.history import RunHistory, Snapshot
from tests.logs import line, snapshot_of

pytest.importorskip("matplotlib", reason="needs matplotlib")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from viewer.colours import COLOURS, MARKS, look, on_paper
from viewer.drawing import figure as figure_module
from viewer.drawing.export import save
from viewer.drawing.figure import chinese_font, draw
from viewer.drawing.layout import fitted_name, text_width, wrapped
from viewer.formats import duration, value_text, x_text
from viewer.panels import PANELS, available, choose
from viewer.picture import DrawnPanel
from viewer.series import restarts, series_of
from viewer.text import translate
from viewer.view import X_AXES, ShownRun, View, theme_of

SIZE = (360, 260)
USUAL, LOSS = View(), View(panels=("loss",))


def usual(count: int = 30, start: int = 0) -> Snapshot:
    return snapshot_of(
        line("start", step=start, time=1000 + start),
        *(line("train", step=n, time=1000 + n, loss=5.0 / n, lr=1e-3 * n, grad_norm=1.0 + n % 3, tokens=100 * n,
               tokens_per_sec=1e5, mfu=0.4, dt=1.0) for n in range(start + 1, start + count + 1)),
        line("valid", step=start + count, time=1000 + start + count, loss=4.0),
        line("save", step=start + count, time=1000 + start + count, held_up=0.01),
    )  # fmt: skip


def drawn(snapshots: Sequence[Snapshot], view: View = USUAL) -> list[DrawnPanel]:
    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    shown = [ShownRun(f"a{n or ''}", COLOURS[n], found) for n, found in enumerate(snapshots)]
    panels = draw(figure, shown, view)
    canvas.draw()
    return panels


def keys(snapshots: Sequence[Snapshot], view: View = USUAL) -> list[str]:
    return [panel.key for panel in choose(available(snapshots), view)]


def test_scores_of_evaluations_have_panels():
    """The tasks of a group may be many, and are shown on request."""
    scored = [
        line("eval", step=step, task=task, seconds=3.0, figures={metric: [value, 0.1, 9]}, **{path: value})
        for step in (10, 20)
        for task, path, metric, value in (
            ("zero_needle", "zero_needle/acc", "acc", 0.1 * step), ("piqa", "piqa/acc,none", "acc,none", 0.5),
            ("mmlu_law", "mmlu/mmlu_law/acc,none", "acc,none", 0.25),
        )
    ]  # fmt: skip
    snapshot = snapshot_of(line("start", step=0), *scored)
    assert [(panel.key, panel.title) for panel in choose(available([snapshot]), USUAL)] == [
        ("eval/piqa/acc,none", "piqa: acc,none"), ("eval/zero_needle/acc", "zero_needle: acc"),
    ]  # fmt: skip
    assert keys([snapshot], View(panels=("all",)))[0] == "eval/mmlu/mmlu_law/acc,none"
    (curve,) = [series_of(ShownRun("a", COLOURS[0], snapshot), panel.curves[0], USUAL) for panel in
                available([snapshot]) if panel.key == "eval/zero_needle/acc"]  # fmt: skip
    assert curve.x.tolist() == [10, 20] and curve.y.tolist() == [1.0, 2.0]
    assert len(drawn([snapshot])) == 2


def figure_of(snapshots: Sequence[Snapshot], view: View, width: int) -> tuple[Figure, FigureCanvasAgg]:
    figure = Figure(figsize=(width / 100, 3), dpi=100)
    canvas = FigureCanvasAgg(figure)
    draw(figure, [ShownRun(f"a{n}", COLOURS[n], found) for n, found in enumerate(snapshots)], view)
    canvas.draw()
    return figure, canvas


@pytest.mark.parametrize(("x", "place"), [("step", 1.0), ("tokens", 100.0)])
def test_a_run_of_one_step_has_one_tick(x: str, place: float):
    figure, _ = figure_of([usual(1)], replace(LOSS, x=x), 600)
    low, high = figure.axes[0].get_xlim()
    shown = [at for at in figure.axes[0].get_xticks() if low <= at <= high]
    assert shown == [place]


@pytest.mark.parametrize(("width", "is_above"), [(700, True), (260, False)])
def test_what_lines_mean_is_said_beside_the_title_where_there_is_room(width: int, is_above: bool):
    figure, canvas = figure_of([usual()], LOSS, width)
    axes = figure.axes[0]
    renderer = canvas.get_renderer()
    legend, inside = axes.get_legend().get_window_extent(renderer), axes.get_window_extent(renderer)
    assert (legend.y0 >= inside.y1 - 1) == is_above
    assert legend.x1 <= inside.x1 + 5 and legend.x0 > axes._left_title.get_window_extent(renderer).x1 * is_above


@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("count", [40, 3000])
@pytest.mark.parametrize("rises", [False, True])
def test_a_legend_inside_lies_where_no_curve_is(rises: bool, count: int, log_y: bool):
    losses = np.linspace(1.0, 5.0, count)[:: 1 if rises else -1].tolist()
    snapshot = snapshot_of(
        line("start", step=0, time=1000),
        *(line("train", step=n, time=1000 + n, loss=loss) for n, loss in enumerate(losses, 1)),
        line("valid", step=count, time=1000 + count, loss=losses[-1]),
    )
    figure, canvas = figure_of([snapshot], replace(LOSS, log_y=log_y), 230)
    axes = figure.axes[0]
    covered = axes.get_legend().get_window_extent(canvas.get_renderer())
    assert covered.y1 <= axes.get_window_extent().y1
    points = axes.transData.transform(np.column_stack((np.arange(1, count + 1), losses)))
    assert not any(covered.contains(*point) for point in points)


def test_panels_are_those_that_have_something_to_show():
    assert available([]) == [] and drawn([]) == []
    assert keys([usual()]) == ["loss", "lr", "grad_norm", "tokens_per_sec", "mfu"]
    odd = snapshot_of(line("train", step=1, zeta=1.0, alpha=2.0), line("valid", step=1, alpha=1.0, only=3.0),
                      line("probe/deep", step=1, **{"a/b": 1.0}))  # fmt: skip
    assert [panel.key for panel in available([usual(), odd])][-4:] == ["alpha", "zeta", "probe/deep/a/b", "valid/only"]
    (panel,) = drawn([odd], View(panels=("probe/deep/a/b",)))
    assert [curve.y.tolist() for curve in panel.curves] == [[1.0]]


def test_what_is_drawn_are_the_measured_values():
    panels = drawn([usual(), usual(10)], View(panels=("loss", "mfu")))
    assert [panel.panel.key for panel in panels] == ["loss", "mfu"]
    loss, mfu = panels
    assert [curve.label for curve in loss.curves] == ["a, training", "a, validation", "a1, training", "a1, validation"]
    np.testing.assert_allclose(loss.curves[0].y, 5.0 / np.arange(1, 31))
    assert loss.curves[2].x.tolist() == list(range(1, 11)) and set(mfu.curves[0].y) == {40.0}
    for panel in panels:
        left, top, right, bottom = panel.box
        assert 0 <= left < right <= SIZE[0] and 0 <= top < bottom <= SIZE[1]
        assert panel.x_range[0] < 1 and panel.x_range[1] > 30


@pytest.mark.parametrize("x", X_AXES)
def test_every_x_axis_with_every_option(x: str):
    first = usual()
    resumed = RunHistory()
    resumed.feed([line("start", step=0), line("train", step=1, time=1001, loss=2.0, tokens=100)])
    resumed.feed([line("start", step=1, time=9000), line("train", step=2, time=9010, loss="nan", tokens=200)])
    view = View(("loss", "lr"), x, smoothing=0.9, log_y=True, outliers=False, dark=True, language="zh")
    panels = drawn([first, resumed.snapshot()], view)
    assert [panel.panel.key for panel in panels] == ["loss", "lr"]
    for panel in panels:
        assert all((np.diff(curve.x) >= 0).all() and np.isfinite(curve.x).all() for curve in panel.curves)
        assert panel.log_y and 0 < panel.y_range[0] < panel.y_range[1]


def test_where_restarts_stand():
    snapshot = snapshot_of(
        line("start", step=0, time=0), line("train", step=2, time=20, tokens=200), line("train", step=3, time=30),
        line("start", step=2, time=86400), line("train", step=3, time=86410, tokens=300),
        line("start", step=3, time=172800),
    )  # fmt: skip
    assert restarts(snapshot, "step") == [2, 3]
    assert restarts(snapshot, "time") == [20, 30]
    assert restarts(snapshot, "clock") == [1, 2]
    assert restarts(snapshot, "tokens") == [200, 300]
    # A run that begins before the first logged step.
    assert restarts(snapshot_of(line("start", step=0), line("start", step=0), line("train", step=1)), "tokens") == [0]
    assert restarts(snapshot_of(line("start", step=0), line("start", step=0)), "step") == []


def test_a_zoom_holds():
    view = View(panels=("loss",), x_range=(5.0, 7.0), y_ranges=(("loss", (0.5, 2.0)),))
    (panel,) = drawn([usual()], view)
    assert (panel.x_range, panel.y_range) == ((5.0, 7.0), (0.5, 2.0))
    # One point beyond each edge is included.
    assert panel.curves[0].x.tolist() == [4, 5, 6, 7, 8]
    (panel,) = drawn([usual()], replace(view, log_y=True, y_ranges=(("loss", (-1.0, 2.0)),)))
    assert panel.y_range[0] > 0


HOSTILE = {
    "nothing but a start": [line("start", step=0)],
    "one point": [line("train", step=1, loss=1.0)],
    "the greatest step": [line("train", step=1 << 53, loss=1.0)],
    "all NaN": [line("train", step=n, loss="nan", grad_norm="inf") for n in range(100)],
    "infinities": [line("train", step=n, loss=("inf", "-inf", 1.0)[n % 3], tokens="inf") for n in range(30)],
    "huge": [line("train", step=n, loss=(-1) ** n * 1.7e308, lr=1.7e308, tokens=(-1) ** n * 1.7e308) for n in range(9)],
    "tiny": [line("train", step=n, loss=5e-324, lr=1e-310 * n, tokens=5e-324 * n) for n in range(9)],
    "falling": [line("train", step=9 - n, time=1000 - n, loss=1.0, tokens=1000 - 7 * (n % 5)) for n in range(9)],
    "clocks": [line(("train", "start")[n % 2], step=n, time=(1e11, 0, 5e9)[n % 3], loss=1.0) for n in range(30)],
    "launches": [line(("start", "train")[n % 2], step=n % 5, time=n, loss=1.0) for n in range(200)],
    "wrong types": [line("train", step=1, loss=[1], lr={"a": 1}, grad_norm=True, mfu="x", dt=10**400, tokens=[])],
    "gaps": [line("train", step=n * n, **{("loss", "lr")[n % 2]: 1.0}) for n in range(30)],
    "names": [line(name, **{name: 1.0, "loss": 1.0} | {"step": 1}) for name in
              ("", "$x$", "$\\frac{", "_hidden", "%s %d {}", "\x1b[2J\n", "中文", "\ud800", "x" * 5000, "<b>", "=1+1",
               "/", "a/b/c", "step", "launch", "train", "\u202egnp", "😀")],
    "many metrics": [line("train", step=1, **{f"m{n}": 1.0 for n in range(3000)})],
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_runs_are_drawn(what: str):
    snapshot = snapshot_of(*HOSTILE[what])
    found = available([snapshot])
    assert all(panel.title.isprintable() and panel.key.isprintable() for panel in found)
    for x in X_AXES:
        # Drawing is slow, so only the first axis gets more than one panel.
        some = found[:2] + found[-2:] if x == "step" else found[:1]
        view = View(tuple(panel.key for panel in some), x, smoothing=0.5)
        panels = drawn([snapshot], view)
        assert len(panels) == len(choose(found, view))
        for panel in panels:
            assert all(map(math.isfinite, (*panel.x_range, *panel.y_range)))
            assert panel.x_range[0] < panel.x_range[1] and panel.y_range[0] < panel.y_range[1]
    for panel in drawn([snapshot], replace(view, log_y=True, outliers=len(found) % 2 == 0)):
        assert not panel.log_y or 0 < panel.y_range[0] < panel.y_range[1] < math.inf


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [200, 1400])
def test_what_is_left_out_stands_under_the_panels(width: int, language: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(figure_module, "MOST_PANELS", 3, raising=False)
    wide = snapshot_of(line("train", step=1, **{f"m{n}": 1.0 for n in range(3000)}), b"{}", line("train", step=2))
    figure, canvas = figure_of([usual(), wide], View(panels=("all",), language=language), width)
    assert len(figure.axes) == 3
    (shown,) = [text for text in figure.texts if translate("left out", language) in text.get_text()]
    text, place = shown.get_text(), shown.get_window_extent(canvas.get_renderer())
    assert text.endswith("…") == (width == 200) and place.x1 <= width
    lowest = min(axes.xaxis.get_tightbbox(canvas.get_renderer()).y0 for axes in figure.axes)
    assert 0 <= place.y0 and place.y1 <= lowest
    if width == 1400 and language == "en":
        assert text == ("left out: a1: lines that hold no record (1); a1: metrics of train but the first 197; "
                        "panels but the first 3")  # fmt: skip
    figure, _ = figure_of([usual()], LOSS, width)
    assert not [text for text in figure.texts if "left out" in text.get_text()]


def test_a_log_of_nothing_but_noise_says_so():
    figure, _ = figure_of([snapshot_of(b"{}", b"x")], LOSS, 400)
    assert [text.get_text() for text in figure.texts][0] == "left out: lines that hold no record (2)"


LABELS = ["$\\frac{1}", "100%", "_hidden", "a\\b{}^_", "中文实验", "x" * 300, "<script>&'\""]


def test_hostile_names_are_drawn_as_they_are():
    figure = Figure(figsize=(6, 4), dpi=100)
    canvas = FigureCanvasAgg(figure)
    draw(figure, [ShownRun(label, COLOURS[0], usual(3)) for label in LABELS], View(panels=("lr",)))
    canvas.draw()
    (legend,) = figure.legends
    *shown, long, last = [text.get_text() for text in legend.get_texts()]
    assert [*shown, last] == [label for label in LABELS if len(label) < 300]
    # A text that does not fit loses its middle.
    assert long.strip("x") == "…" and 10 < len(long) < 300
    assert not any(text.get_parse_math() for text in legend.get_texts())


ZOOMS = [(x, ends) for x in X_AXES for ends in ((0.0, 1e-3), (-1e5, 1.9e6), (19000.0, 19000.00001), (0.0, 1e15))]


# Dates so far out have no names; the window does not zoom there.
@pytest.mark.parametrize("x, ends", [zoom for zoom in ZOOMS if zoom != ("clock", (0.0, 1e15))])
def test_every_zoom_can_be_drawn(x: str, ends: tuple):
    (panel,) = drawn([usual()], View(panels=("loss",), x=x, x_range=ends))
    assert panel.x_range == ends


def test_threads_draw_at_the_same_time():
    """The window draws in one thread while another writes a file."""
    view, wrong = View(panels=("loss",)), []

    def work() -> None:
        for _ in range(3):
            try:
                assert len(drawn([usual(5)], view)) == 1
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def saved(path: Path, label: str = "a", view: View = LOSS, snapshot: Snapshot | None = None) -> bytes:
    save(path, [ShownRun(label, COLOURS[0], snapshot or usual(5))], view, SIZE)
    assert list(path.parent.iterdir()) == [path]
    return path.read_bytes()


def png_size(content: bytes) -> tuple[int, int]:
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-12:-4] == b"\0\0\0\0IEND"
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_picture_files(tmp_path: Path):
    path = tmp_path / "a.PNG"
    assert png_size(saved(path)) == SIZE
    path.unlink()
    assert saved(tmp_path / "a.pdf", "中文 $x$").startswith(b"%PDF")
    with pytest.raises(ValueError, match="ends in none of"):
        save(tmp_path / "a.exe", [], View(), SIZE)
    with pytest.raises(OSError):
        save(tmp_path / "absent" / "a.png", [], View(), SIZE)


def test_a_picture_whose_text_is_text(tmp_path: Path):
    labels = "<script>alert(1)</script>&\"'"
    names = snapshot_of(*HOSTILE["names"])
    view = View(panels=tuple(panel.key for panel in available([names])[-8:]), language="zh")
    text = saved(tmp_path / "a.svg", labels, view, names).decode()
    root = xml.etree.ElementTree.fromstring(text)
    assert not [element.tag for element in root.iter() if element.tag.endswith("script")]
    assert labels in "".join(root.itertext())


def test_a_table(tmp_path: Path):
    snapshot = snapshot_of(
        line("train", step=1, time=1.5, loss=0.1, lr=2e-5, tokens=10),
        line("train", step=2, time=2.5, loss="nan", lr=1e300, tokens="inf"),
        line("valid", step=2, time=3, loss=-1e-9),
        line("other", step=2, time=3, x=1),
    )  # fmt: skip
    content = saved(tmp_path / "a.csv", "=cmd|' /C calc'!A0", View(panels=("loss", "lr")), snapshot).decode()
    assert list(csv.reader(io.StringIO(content))) == [
        ["run", "record", "step", "time", "tokens", "loss", "lr"],
        ["'=cmd|' /C calc'!A0", "train", "1", "1.500", "10", "0.1", "2e-05"],
        ["'=cmd|' /C calc'!A0", "train", "2", "2.500", "", "", "1e+300"],
        ["'=cmd|' /C calc'!A0", "valid", "2", "3.000", "", "-1e-09", ""],
    ]


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path):
    evil = ["=1+1", "+1", "-1", "@SUM(1)", "\t=1", "\r=1", "\n=1"]
    snapshot = snapshot_of(*(line(name, step=1, **{name: 1.0}) for name in evil))
    view = View(panels=tuple(panel.key for panel in available([snapshot])))
    for label in evil[:4]:
        rows = list(csv.reader(io.StringIO(saved(tmp_path / "a.csv", label, view, snapshot).decode())))
        assert len(rows) == 1 + len(evil)
        for cell in (cell for row in rows for cell in row):
            assert not cell or cell[0] not in "=+-@\t\r\n", cell


def test_durations():
    for seconds, text in ((0, "0 s"), (3600, "1 h"), (7500, "2 h 5 min"), (86400 * 2 + 3600 * 4, "2 d 4 h")):
        assert duration(seconds) == text
    for seconds in (-5.0, 59.9999, 60.0, 599.9, 3599.9, 86399.9, 1e6, 1e15, 1e300):
        text = duration(seconds)
        assert text.isprintable() and text.startswith("-") == (seconds < 0)
    assert duration(math.nan) == duration(math.inf) == "?"


def test_values_beside_the_cursor():
    assert [value_text(value) for value in (math.nan, 1234567.0, 0.1234567)] == ["nan", "1,234,567", "0.12346"]
    for x in X_AXES:
        for value in (0.0, -1e300, 1e300, 1e17, -1e6, 20000.5):
            assert x_text(value, x).isprintable()


def _everything_left_out() -> tuple:
    data = RunHistory()
    data._skipped, data._too_many_tables, data._too_many_launches = 1, True, True
    data.feed([line("train", step=1)])
    data._tables["train"].too_many_columns, data._tables["train"].thinned = True, 1
    data.feed([])
    assert len(data.snapshot().left_out) == 5
    return data.snapshot().left_out


def test_every_title_is_translated():
    titles = {panel.title for panel in PANELS} | set(X_AXES)
    titles |= {"left out", "panels but the first {}", *(text for text, _ in _everything_left_out())}
    untranslated = {title for title in titles if translate(title, "zh") == title}
    assert not untranslated and translate("loss", "en") == "loss"
    assert chinese_font() is None or isinstance(chinese_font(), str)


def many_runs(count: int, snapshot: Snapshot, name: str = "run-{}") -> list[ShownRun]:
    looks = map(look, range(count))
    return [ShownRun(name.format(n), colour, snapshot, mark) for n, (colour, mark) in enumerate(looks)]


def pictured(runs: list[ShownRun], view: View, width: int, height: int) -> tuple[Figure, list[DrawnPanel], object]:
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    canvas = FigureCanvasAgg(figure)
    panels = draw(figure, runs, view)
    canvas.draw()
    return figure, panels, canvas.get_renderer()


EVERYTHING = snapshot_of(
    *(line(curve.table, step=n, **{curve.metric: 1.0}) for panel in PANELS for curve in panel.curves for n in (1, 2))
)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width, height", [(1400, 900), (1000, 400), (420, 900), (700, 420)])
def test_titles_do_not_overprint(width: int, height: int, language: str):
    figure, _, renderer = pictured(many_runs(1, EVERYTHING), View(("all",), language=language), width, height)
    titles = [axes._left_title.get_window_extent(renderer) for axes in figure.axes]
    assert len(titles) == len(PANELS) and all(0 <= title.x0 and title.x1 <= width for title in titles)
    for n, title in enumerate(titles):
        others = titles[:n] + titles[n + 1 :] + [axes.get_window_extent(renderer) for axes in figure.axes]
        assert not any(title.overlaps(other) for other in others)


def test_a_title_that_is_too_long_is_shortened():
    room = text_width("communication that was", 9.5)
    assert wrapped("communication that was not hidden", 9.5, room) == ["communication that was", "not hidden"]
    assert wrapped("a", 9.5, room) == ["a"]
    (cut,) = wrapped("x" * 100, 9.5, room)
    assert cut.endswith("…") and text_width(cut, 9.5) <= room < text_width("x" + cut, 9.5)
    short = fitted_name("sweep-of-learning-rates-1e-4", 9, room * 0.8)
    assert short.startswith("sweep") and short.endswith("1e-4") and text_width(short, 9) <= room * 0.8


@pytest.mark.parametrize("size", [(1400, 900), (1036, 650), (700, 1200)])
def test_the_loss_is_the_largest_panel(size: tuple[int, int]):
    _, panels, _ = pictured(many_runs(1, usual()), View(), *size)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (panel.box for panel in panels)]
    assert panels[0].panel.key == "loss" and areas[0] > 1.9 * max(areas[1:])
    for panel in panels:
        assert 0 <= panel.box[0] and panel.box[2] <= size[0] and panel.box[3] <= size[1]
        for other in panels:
            apart = panel.box[2] <= other.box[0] or panel.box[3] <= other.box[1]
            assert apart or other is panel or other.box[2] <= panel.box[0] or other.box[3] <= panel.box[1]


def test_many_names_leave_room_for_the_panels():
    name = "a-name-that-tells-everything-about-a-run-and-then-its-number-{}"
    for count in (1, 30, 90):
        figure, panels, renderer = pictured(many_runs(count, usual(), name), LOSS, 1000, 700)
        names = figure.legends[0].get_window_extent(renderer)
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert names.x1 <= 1000 and 700 - names.y0 < panels[0].box[1] - 20 < 300
        assert shown[-1] == f"and {91 - len(shown)} more" if count == 90 else len(shown) == count
        assert shown[0].endswith("number-0")


def test_every_run_has_its_own_look():
    assert len({look(n) for n in range(len(COLOURS) * len(MARKS))}) == len(COLOURS) * len(MARKS) >= 72
    assert [look(n)[1] for n in range(len(COLOURS))] == [""] * len(COLOURS) and len(COLOURS) >= 12
    figure, panels, _ = pictured(many_runs(30, usual()), LOSS, 900, 600)
    assert len({(curve.colour, curve.mark) for curve in panels[0].curves}) == 30
    for number in (12, 29):
        colour, mark = look(number)
        lines = [line for line in figure.axes[0].lines if (line.get_color(), line.get_marker()) == (colour, mark)]
        assert lines and 2 <= sum(len(line.get_xdata()) for line in lines) <= 12


SIGHTS = {
    "ordinary": np.eye(3),
    # Machado, Oliveira and Fernandes, 2009, table of severity 1, in linear RGB.
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
}  # fmt: skip
TO_XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def linear(colours: Sequence[str]) -> np.ndarray:
    values = np.array([[int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)] for colour in colours])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    x, y, z = np.cbrt(np.clip(rgb, 1e-4, 1) @ TO_XYZ.T / TO_XYZ.sum(1)).T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("dark", [False, True])
def test_colours_can_be_told_apart(dark: bool, sight: str):
    colours = linear([on_paper(colour, dark) for colour in COLOURS])
    seen = lab(colours @ np.array(SIGHTS[sight]).T)
    apart = np.linalg.norm(seen[:, None] - seen[None], axis=-1) + 1e3 * np.eye(len(seen))
    # Those of the matplotlib style "petroff10", made for the purpose, are ten colours and 13 apart.
    assert apart.min() > (20 if sight == "ordinary" else 11)
    paper = linear([theme_of(View(dark=dark)).paper]) @ TO_XYZ[1]
    light, dim = np.maximum(colours @ TO_XYZ[1], paper), np.minimum(colours @ TO_XYZ[1], paper)
    assert ((light + 0.05) / (dim + 0.05)).min() > 2.5


def of_task(task: str | None, loss: float, **more: float) -> Snapshot:
    values = {"lr": loss / 1e4, "grad_norm": 1.0, **more}
    train = [line("train", step=n, loss=loss + n, **values) for n in (1, 2)]
    return snapshot_of(line("start", step=0, **({"task": task} if task else {})), *train)


def test_each_task_has_its_own_loss(tmp_path: Path):
    tasks = [of_task("dpo", 0.1), of_task("pretrain", 10.0), of_task("sft", 2.0), of_task("pretrain", 8.0)]
    runs = [ShownRun(f"a{n}", COLOURS[n], found) for n, found in enumerate(tasks)]
    figure, panels, _ = pictured(runs, View(("loss", "lr", "grad_norm")), 900, 600)
    found = {panel.panel.key: [curve.label[:2] for curve in panel.curves] for panel in panels}
    assert found == {
        "loss (pretrain)": ["a1", "a3"], "loss (sft)": ["a2"], "loss (dpo)": ["a0"],
        "lr (pretrain)": ["a1", "a3"], "lr (sft)": ["a2"], "lr (dpo)": ["a0"], "grad_norm": ["a0", "a1", "a2", "a3"],
    }  # fmt: skip
    assert panels[2].y_range[1] < 3 < panels[0].y_range[0]
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["loss, pretraining", "loss, SFT", "loss, DPO"]
    # One task alone, in a picture and in a table.
    view = View(("loss", "lr"), alone="loss (sft)")
    assert [panel.panel.key for panel in pictured(runs, view, 400, 300)[1]] == ["loss (sft)"]
    save(tmp_path / "a.csv", runs, view, SIZE)
    rows = list(csv.reader((tmp_path / "a.csv").read_text().splitlines()))
    assert {row[0] for row in rows[1:]} == {"a2"} and rows[0][-1] == "loss"
    # With runs of one task, nothing is split; and a task that is not there is not shown alone.
    assert [panel.panel.key for panel in pictured(runs[1::2], view, 400, 300)[1]] == ["loss", "lr"]
    # A run that does not name its task reveals it by its metrics, or counts as pretraining.
    silent = [of_task(None, 1.0), of_task(None, 0.1, **{"rewards/margins": 1.0}), of_task("x" * 99, 3.0)]
    assert keys_drawn(silent) == ["loss (pretrain)", "loss (dpo)", f"loss ({'x' * 20})"]


def keys_drawn(snapshots: Sequence[Snapshot]) -> list[str]:
    return [panel.panel.key for panel in drawn(snapshots, LOSS)]


def noisy(count: int) -> Snapshot:
    noise = np.random.default_rng(0).normal(0, 1, count)
    return snapshot_of(
        line("start", step=0, time=0),
        *(line("train", step=n, time=n, loss=100 + noise[n - 1]) for n in range(1, count + 1)),
    )  # fmt: skip


@pytest.mark.parametrize("count, is_smoothed", [(1, False), (40, False), (300, True), (3000, True)])
def test_smoothing_is_on_from_the_beginning_where_a_curve_is_long(count: int, is_smoothed: bool):
    (panel,) = drawn([noisy(count)], replace(LOSS, smoothing=None))
    curve = panel.curves[0]
    if not is_smoothed:
        assert curve.measured is None
        return
    assert np.std(curve.y) < 0.7 * np.std(curve.measured)
    # It begins with the first value, not with 0.
    assert curve.y[0] == pytest.approx(curve.measured[0]) and curve.y.min() > 97


@pytest.mark.parametrize("count", [1, 10, 30])
def test_measured_curves_do_not_cover_smoothed_ones(count: int):
    figure, panels, _ = pictured(many_runs(count, noisy(300)), View(("loss",), smoothing=0.9, marks=False), 900, 600)
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 100]
    faint = [line.get_alpha() for line in lines if line.get_alpha() is not None]
    assert len(faint) == count and len(lines) == 2 * count
    # Drawn over each other, they hide less than half of the curves below.
    assert 0.2 < 1 - np.prod([1 - alpha for alpha in faint]) < 0.4
    assert all(curve.measured is not None for curve in panels[0].curves)


@pytest.mark.parametrize("runs", [1, 10])
def test_marks_do_not_cover_the_axis(runs: int):
    data = RunHistory()
    for launch in range(100):
        data.feed([line("start", step=10 * launch)] + [
            line(name, step=n, loss=1.0) for n in range(10 * launch + 1, 10 * launch + 11) for name in ("train", "save")
        ])  # fmt: skip
    figure, _, _ = pictured(many_runs(runs, data.snapshot()), LOSS, 900, 500)
    (axes,) = figure.axes
    (saves,) = [c for c in axes.collections if len(c.get_offsets()) > 1]
    (lines,) = [c for c in axes.collections if c.get_paths() and not len(c.get_offsets()) > 1]
    restarts = [path.vertices[0, 0] for path in lines.get_paths()]
    for places, least in ((saves.get_offsets()[:, 0], 13.9), (restarts, 7.9)):
        pixels = axes.transData.transform(np.column_stack([places, np.ones(len(places))]))[:, 0]
        assert np.abs(np.diff(pixels)).min() >= least and len(pixels) > 20
    # The newest checkpoint is always drawn.
    assert max(saves.get_offsets()[:, 0]) == 1000 and max(restarts) == 990


def test_a_run_of_one_step_can_be_seen():
    """A line through one point would draw nothing."""
    figure = Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100)
    draw(figure, [ShownRun("a", COLOURS[0], usual(1))], LOSS)
    solid = [line for axes in figure.axes for line in axes.lines if line.get_linestyle() == "-"]
    assert any(line.get_marker() == "o" and len(line.get_xdata()) == 1 for line in solid)


def test_each_source_of_a_mixture_has_a_panel():
    def losses(table: str, step: int, names: Sequence[str]) -> bytes:
        return line(table, step=step, time=1000 + step, loss=5.0, **{f"loss/{name}": 4.0 for name in names})

    def shown(names: Sequence[str]) -> list[str]:
        records = [losses("train", 1, names), losses("train", 2, names), losses("valid", 2, names)]
        return keys([snapshot_of(line("start", step=0, time=1000), *records)])

    assert shown(["web", "code"]) == ["loss", "loss/code", "loss/web"]
    # Many would leave no room for anything else.
    assert shown([f"source{n}" for n in range(20)]) == ["loss"]

