"""The viewer's window, on an invisible screen: mouse and buttons, questions, remembered settings, and that nothing slow
happens in its thread."""

import argparse
import json
import logging
import math
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.logs import text_line as line

pytest.importorskip("matplotlib", reason="needs matplotlib")
pytest.importorskip("PyQt5.QtWidgets", reason="needs PyQt5", exc_type=ImportError)

from PyQt5.QtCore import QEvent, QPoint, QPointF, QSettings, Qt
from PyQt5.QtGui import QMouseEvent, QWheelEvent
from PyQt5.QtTest import QTest
from PyQt5.QtWidgets import QApplication, QInputDialog, QMessageBox

from viewer.desktop import draughtsman as draughtsman_module
from viewer.desktop import window as window_module
from viewer.desktop.remembered import remembered_view
from viewer.desktop.window import Window
from viewer.picture import DrawnPanel
from viewer.sources.addresses import RunAddress
from viewer.sources.local import LocalFiles
from viewer.sources.source import open_sources
from viewer.view import View


@pytest.fixture(scope="session")
def app() -> QApplication:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QT_QPA_PLATFORM", "offscreen")
        yield QApplication.instance() or QApplication(["resplot"])


@pytest.fixture(autouse=True)
def mistakes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """PyQt would end the process after an exception in a slot; failures in drawing are logged."""
    found = []
    monkeypatch.setattr(sys, "excepthook", lambda *problem: found.append(problem))
    yield
    assert not found
    assert not [record for record in caplog.get_records("call") if record.levelno >= logging.ERROR]


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        QApplication.processEvents()
        time.sleep(0.002)


def write_run(directory: Path, count: int = 20, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    lines = [line("start", step=0, max_iters=100)]
    lines += [
        line("train", step=n, time=1000 + n, loss=5 / n, lr=n, extra=n, tokens=10 * n) for n in range(1, count + 1)
    ]
    (directory / "reslog.jsonl").write_text("".join(lines))
    (directory / "config.yaml").write_text(json.dumps(config))
    return directory


USUAL = View(panels=("loss", "lr"))
OpenWindow = Callable[..., Window]


@pytest.fixture
def open_window(app: QApplication, tmp_path: Path) -> Iterator[OpenWindow]:
    opened = []

    def open_window(*paths: Path, view: View = USUAL) -> Window:
        def open_more(places: list[RunAddress], **options) -> list:
            return open_sources(places, interval_s=0.05, **options)

        window = Window(view, open_more, QSettings(str(tmp_path / "layout.ini"), QSettings.IniFormat))
        opened.append(window)
        window.resize(500, 420)
        window.show()
        window.open([RunAddress(None, str(path)) for path in paths])
        until(lambda: len(window.runs) >= len(paths) and all(run.history.snapshot().version for run in window.runs))
        window.refresh()
        if paths:
            picture(window)
        return window

    yield open_window
    for window in opened:
        window.close()
        for host in window._sources:
            host.join(30)
        window.draughtsman._thread.join(30)
        window.deleteLater()
    QApplication.processEvents()


def picture(window: Window) -> list[DrawnPanel]:
    """The panels, once they are drawn as currently requested."""

    def is_there() -> bool:
        found, view = window.canvas._picture, window._view
        return found is not None and found.panels and found.image.size() == window.canvas.size() and (
            (found.view.x, found.view.x_range, found.view.y_ranges, found.view.panels, found.view.smoothing,
             found.view.alone) == (view.x, view.x_range, view.y_ranges, view.panels, view.smoothing, view.alone)
        )  # fmt: skip

    # The canvas may be about to get another size.
    QApplication.processEvents()
    until(is_there)
    return window.canvas._picture.panels


def at(panel: DrawnPanel, across: float, down: float) -> QPoint:
    left, top, right, bottom = panel.box
    return QPoint(round(left + across * (right - left)), round(top + down * (bottom - top)))


def drag(window: Window, start: QPoint, end: QPoint, button: int = Qt.LeftButton) -> None:
    QTest.mousePress(window.canvas, button, Qt.NoModifier, start)
    move(window, (start + end) / 2, button)
    window.canvas.grab()
    move(window, end, button)
    QTest.mouseRelease(window.canvas, button, Qt.NoModifier, end)


def move(window: Window, to: QPoint, buttons: int = Qt.NoButton) -> None:
    QApplication.sendEvent(
        window.canvas, QMouseEvent(QEvent.MouseMove, QPointF(to), Qt.NoButton, Qt.MouseButtons(buttons), Qt.NoModifier)
    )


def wheel(window: Window, point: QPoint, notches: float, modifiers: int = Qt.NoModifier) -> None:
    event = QWheelEvent(
        QPointF(point), QPointF(point), QPoint(), QPoint(0, round(120 * notches)), Qt.NoButton, modifiers,
        Qt.NoScrollPhase, False,
    )  # fmt: skip
    QApplication.sendEvent(window.canvas, event)


def test_a_run_is_shown_and_followed(open_window: OpenWindow, tmp_path: Path):
    run = write_run(tmp_path / "mine")
    window = open_window(run)
    item = window.header.topLevelItem(0)
    assert item.text(0) == "mine" and item.text(2) == "20 / 100" and item.text(3) == "0.2500"
    assert "mine" in window.windowTitle() and "20" in window.windowTitle()
    curves = picture(window)[0].curves
    np.testing.assert_allclose(curves[0].y, 5 / np.arange(1, 21))
    with open(run / "reslog.jsonl", "a") as file:
        file.write(line("train", step=21, time=1021, loss=3.0))
    until(lambda: picture(window)[0].curves[0].y[-1] == 3.0)
    until(lambda: item.text(2) == "21 / 100")


def test_runs_can_be_hidden(open_window: OpenWindow, tmp_path: Path):
    window = open_window(*(write_run(tmp_path / name) for name in "abc"))
    assert [curve.label for curve in picture(window)[1].curves] == ["a", "b", "c"]
    colours = [curve.colour for curve in picture(window)[1].curves]
    window.header.topLevelItem(1).setCheckState(0, Qt.Unchecked)
    until(lambda: [curve.label for curve in picture(window)[1].curves] == ["a", "c"])
    assert [curve.colour for curve in picture(window)[1].curves] == [colours[0], colours[2]]
    window.refresh()
    assert window.header.topLevelItem(1).checkState(0) == Qt.Unchecked
    window.header.itemDoubleClicked.emit(window.header.topLevelItem(2), 0)
    until(lambda: [curve.label for curve in picture(window)[1].curves] == ["c"])
    window.header.itemDoubleClicked.emit(window.header.topLevelItem(2), 0)
    until(lambda: [curve.label for curve in picture(window)[1].curves] == ["a", "b", "c"])


def test_panels_are_chosen(open_window: OpenWindow, tmp_path: Path):
    run = write_run(tmp_path / "mine")
    window = open_window(run)
    items = {window.panel_list.item(i).data(Qt.UserRole): window.panel_list.item(i) for i in range(3)}
    checked = {key for key, item in items.items() if item.checkState() == Qt.Checked}
    assert items.keys() == {"loss", "lr", "extra"} and checked == {"loss", "lr"}
    items["extra"].setCheckState(Qt.Checked)
    items["lr"].setCheckState(Qt.Unchecked)
    assert [panel.panel.key for panel in picture(window)] == ["loss", "extra"]
    for key in ("loss", "extra"):
        items[key].setCheckState(Qt.Unchecked)
    until(lambda: not window.canvas._picture.panels)
    # A metric that appears later does not bring the usual ones back.
    with open(run / "reslog.jsonl", "a") as file:
        file.write(line("train", step=21, time=1021, later=3.0))
    until(lambda: window.panel_list.count() == 4)
    states = {window.panel_list.item(i).checkState() for i in range(4)}
    assert states == {Qt.Unchecked} and not window.canvas._picture.panels


def test_all_panels(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "mine"), view=View(panels=("all",)))
    assert [panel.panel.key for panel in picture(window)] == ["loss", "lr", "extra"]
    assert {window.panel_list.item(i).checkState() for i in range(3)} == {Qt.Checked}


def test_axes_and_smoothing(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "mine"))
    measured = picture(window)[0].curves[0].y
    window.tools.smoothing.setValue(8)
    assert window._view.smoothing == 0.9 and window.tools.smoothing_label.text().strip() == "0.9"
    assert picture(window)[0].curves[0].y[-1] > measured[-1]
    assert picture(window)[1].curves[0].y.tolist() == list(range(1, 21))
    window.tools.smoothing.setValue(1)
    for index, first in ((1, 10.0), (2, 1.0), (3, 1001 / 86400), (0, 1.0)):
        window.tools.x_box.setCurrentIndex(index)
        assert picture(window)[0].curves[0].x[0] == pytest.approx(first)
    window.tools.log_action.setChecked(True)
    until(lambda: window.canvas._picture.panels[0].log_y)


@pytest.mark.parametrize("log_y", [False, True])
def test_the_mouse_zooms_and_moves(open_window: OpenWindow, tmp_path: Path, log_y: bool):
    view = View(panels=("loss", "lr"), log_y=log_y, x="tokens", dark=True)
    window = open_window(write_run(tmp_path / "mine"), view=view)
    panel = picture(window)[0]
    canvas = window.canvas
    x0, y1 = canvas.place(panel, at(panel, 0.25, 0.25))
    x1, y0 = canvas.place(panel, at(panel, 0.75, 0.75))
    drag(window, at(panel, 0.75, 0.75), at(panel, 0.25, 0.25))
    # Axes that are not zoomed stay as they were.
    assert (window._view.x, window._view.dark, window._view.log_y) == ("tokens", True, log_y)
    assert window._view.x_range == pytest.approx((x0, x1))
    assert dict(window._view.y_ranges)["loss"] == pytest.approx((y0, y1))
    zoomed = picture(window)
    assert [panel.x_range for panel in zoomed] == [window._view.x_range] * 2
    assert zoomed[0].y_range == pytest.approx((y0, y1))
    # The right button moves: the point under the mouse stays there.
    before = canvas.place(panel, at(panel, 0.25, 0.25))
    drag(window, at(panel, 0.25, 0.25), at(panel, 0.5, 0.75), Qt.RightButton)
    assert canvas.place(panel, at(panel, 0.5, 0.75)) == pytest.approx(before, rel=0.02)
    picture(window)
    QTest.mouseDClick(canvas, Qt.LeftButton, Qt.NoModifier, QPoint(2, 2))
    assert window._view.x_range is None and window._view.y_ranges == ()
    assert picture(window)[0].x_range == panel.x_range


def test_a_flat_frame_keeps_the_height(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "mine"))
    panel = picture(window)[1]
    drag(window, at(panel, 0.5, 0.5), at(panel, 0.9, 0.5))
    assert window._view.x_range[0] > panel.x_range[0] and window._view.y_ranges == ()
    before = window._view
    # A click frames nothing, and neither does a drag that begins outside the panels.
    drag(window, at(panel, 0.5, 0.5), at(panel, 0.5, 0.5))
    drag(window, QPoint(1, 1), at(panel, 0.5, 0.5))
    assert window._view == before


def test_the_pan_button(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "mine"))
    window.canvas.pans = True
    panel = picture(window)[0]
    drag(window, at(panel, 0.5, 0.5), at(panel, 0.25, 0.5))
    low, high = window._view.x_range
    assert high - low == pytest.approx(panel.x_range[1] - panel.x_range[0]) and low > panel.x_range[0]


@pytest.mark.parametrize("x", ["step", "time", "clock"])
def test_the_wheel(open_window: OpenWindow, tmp_path: Path, x: str):
    window = open_window(write_run(tmp_path / "mine"), view=View(panels=("loss", "lr"), x=x, log_y=True))
    panel, canvas = picture(window)[0], window.canvas
    point = at(panel, 0.3, 0.4)
    under, width = canvas.place(panel, point), panel.x_range[1] - panel.x_range[0]
    wheel(window, point, 1)
    low, high = window._view.x_range
    assert high - low == pytest.approx(0.8 * width)
    assert canvas.place(panel, point) == pytest.approx(under)
    wheel(window, point, 1, Qt.ShiftModifier)
    assert dict(window._view.y_ranges).keys() == {"loss"}
    assert canvas.place(panel, point) == pytest.approx(under)
    # At the farthest zoom in both directions, the picture can be drawn and the mouse followed.
    for notches in (24, -24):
        for _ in range(40):
            wheel(window, point, notches)
            wheel(window, point, notches, Qt.ShiftModifier)
        move(window, point)
        canvas.grab()
        picture(window)
        canvas.grab()
        assert all(np.isfinite(window._view.x_range)) and window._view.x_range[0] < window._view.x_range[1]


def test_the_crosshair_reads_off_what_was_measured(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "a"), write_run(tmp_path / "b", 10))
    loss, lr = picture(window)
    colour = [curve.colour for curve in loss.curves]
    assert window.canvas.read_off(loss, 9.6) == [
        ("a, training", colour[0], "", 10.0, 0.5, None), ("b, training", colour[1], "", 10.0, 0.5, None)
    ]  # fmt: skip
    # The shorter run has ended by then.
    assert window.canvas.read_off(lr, 17.4) == [("a", colour[0], "", 17.0, 17.0, None)]
    assert window.canvas.read_off(lr, 1e9) == []
    without = window.canvas.grab().toImage()
    move(window, at(loss, 0.5, 0.5))
    assert window.canvas.grab().toImage() != without
    assert window.canvas.panel_at(at(lr, 0.5, 0.5)) is lr and window.canvas.panel_at(QPoint(0, 0)) is None


def test_what_stands_beside_the_cursor_is_of_the_curves(open_window: OpenWindow, tmp_path: Path):
    run = write_run(tmp_path / "a")
    with open(run / "reslog.jsonl", "a") as file:
        file.write(line("valid", step=9, time=1009, loss=7.5))
    window = open_window(run, view=View(panels=("loss",), smoothing=0.5))
    (loss,) = picture(window)
    canvas, smoothed = window.canvas, loss.curves[0].y
    heading, rows = canvas.told(canvas.read_off(loss, 9.7), 9.7)
    # The step is a point's, not the cursor's; values measured elsewhere say where; the highest value comes first.
    assert heading == "step 10   ·   smoothed (measured)"
    assert [(reading.label, text) for reading, text in rows] == [
        ("a, validation", "7.5   at step 9"), ("a, training", f"{smoothed[9]:.5g} (0.5)")
    ]  # fmt: skip
    assert canvas.told([], 9.7) == ("step 10", [])
    # A point is where the cursor reads it off.
    for place, value in ((10.0, float(smoothed[9])), (9.0, 7.5)):
        assert canvas.place(loss, canvas.point(loss, place, value)) == pytest.approx((place, value))
    assert canvas.point(loss, 1e9, 1.0) is None and canvas.point(loss, 10.0, math.nan) is None
    # A panel of other runs, which end sooner or later, has its line at the same step.
    longer = replace(loss, x_range=(0.0, 2 * loss.x_range[1]))
    assert canvas.place(longer, QPointF(canvas.across(longer, 15.0), 0))[0] == pytest.approx(15.0)
    assert canvas.across(replace(loss, x_range=(0.0, 9.0)), 15.0) is None
    # If there are more than fit, those next to the cursor.
    move(window, at(loss, 0.5, 0.5))
    height = canvas.place(loss, at(loss, 0.5, 0.5))[1]
    many = [(rows[0][0]._replace(y=height + 10 - n), "") for n in range(21)]
    shown, more = canvas._nearest(many, 5)
    assert (shown, more) == (many[8:13], 16)


def test_a_panel_has_the_window_for_itself(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "a"))
    loss, lr = picture(window)
    for back in (
        lambda: QTest.mouseDClick(window.canvas, Qt.LeftButton, Qt.NoModifier, QPoint(200, 200)),
        lambda: QTest.keyClick(window, Qt.Key_Escape),
    ):
        assert not window.tools.back_action.isVisible()
        QTest.mouseDClick(window.canvas, Qt.LeftButton, Qt.NoModifier, at(lr, 0.5, 0.5))
        (alone,) = picture(window)
        assert alone.panel.key == "lr" and window.tools.back_action.isVisible()
        assert alone.box[:2] == loss.box[:2] and alone.box[2:] == lr.box[2:]
        back()
        assert [panel.box for panel in picture(window)] == [loss.box, lr.box]
    # Another choice of panels is shown.
    QTest.mouseDClick(window.canvas, Qt.LeftButton, Qt.NoModifier, at(lr, 0.5, 0.5))
    window.panel_list.item(2).setCheckState(Qt.Checked)
    assert [panel.panel.key for panel in picture(window)] == ["loss", "lr", "extra"]


def test_columns_sort(open_window: OpenWindow, tmp_path: Path):
    steps = {"run-2": 30, "run-10": 9, "run-1": 100}
    # The last run has only begun.
    steps["run-3"] = 0
    window = open_window(*(write_run(tmp_path / name, count) for name, count in steps.items()))

    def names() -> list[str]:
        return [window.header.topLevelItem(n).text(0) for n in range(4)]

    def click(column: int) -> list[str]:
        head = window.header.header()
        place = QPoint(head.sectionViewportPosition(column) + 8, head.height() // 2)
        QTest.mouseClick(head.viewport(), Qt.LeftButton, Qt.NoModifier, place)
        return names()

    as_named = names()
    assert as_named == ["run-2", "run-10", "run-1", "run-3"]
    assert click(0) == ["run-1", "run-2", "run-3", "run-10"]
    # Sorted by the number, not by its text; rows without a number come last in both directions.
    assert click(2) == ["run-10", "run-2", "run-1", "run-3"]
    assert click(2) == ["run-1", "run-2", "run-10", "run-3"]
    # Rows that moved still belong to their runs, and so do the colours.
    window.header.topLevelItem(0).setCheckState(0, Qt.Unchecked)
    assert [run.label for run in window.shown_runs()] == ["run-2", "run-10", "run-3"]
    window.remember()
    again = open_window()
    again.restore()
    assert again.header.sorted_by == (2, True)
    assert click(2) == as_named


def test_what_differs(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "a", lr=0.1, seed=1), write_run(tmp_path / "b", lr=0.2, seed=1))
    window.difference_dock.show()
    table = window.difference_table
    until(lambda: table.rowCount() == 1 and table.columnCount() == 3 and table.item(0, 2) is not None)
    assert [table.item(0, column).text() for column in range(3)] == ["lr", "0.1", "0.2"]
    assert [table.horizontalHeaderItem(column).text() for column in (1, 2)] == ["a", "b"]
    # One run differs from nothing: its settings are shown.
    window.header.topLevelItem(0).setCheckState(0, Qt.Unchecked)
    assert [[table.item(row, column).text() for column in (0, 1)] for row in (0, 1)] == [["lr", "0.2"], ["seed", "1"]]
    assert table.columnCount() == 2 and window.difference_dock.windowTitle() == "Settings"
    window.header.topLevelItem(0).setCheckState(0, Qt.Checked)
    assert table.rowCount() == 1 and window.difference_dock.windowTitle() == "What differs"


def test_a_run_without_settings_says_so(open_window: OpenWindow, tmp_path: Path):
    (write_run(tmp_path / "a") / "config.yaml").unlink()
    window = open_window(tmp_path / "a")
    window.difference_dock.show()
    until(lambda: window.difference_table.item(0, 0) is not None)
    assert "config.yaml is missing" in window.difference_table.item(0, 0).text()


@pytest.mark.parametrize("name, begins", [("a.svg", b"<?xml"), ("a.csv", b"run,record"), ("a", b"\x89PNG")])
def test_what_is_shown_is_saved(open_window: OpenWindow, tmp_path: Path, name: str, begins: bytes):
    window = open_window(write_run(tmp_path / "mine"))
    window.save(tmp_path / name)
    until(lambda: "saved" in window.statusBar().currentMessage())
    path = (tmp_path / name).with_suffix((tmp_path / name).suffix or ".png")
    assert path.read_bytes().startswith(begins) and str(path) in window.statusBar().currentMessage()


def test_what_cannot_be_saved(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "mine"))
    for name in ("absent/a.png", "a.exe"):
        window.statusBar().clearMessage()
        window.save(tmp_path / name)
        until(lambda: "cannot be saved" in window.statusBar().currentMessage())


def test_the_layout_is_remembered(open_window: OpenWindow, tmp_path: Path):
    window = open_window(write_run(tmp_path / "mine"), view=View(panels=("lr",), x="tokens", log_y=True, smoothing=0.9,
                                                                  raw=False, dark=True))  # fmt: skip
    window.difference_dock.show()
    window.resize(620, 480)
    window.close()
    args = argparse.Namespace(panels=None, x=None, log=None, smoothing=None, theme=None, language="en")
    settings = QSettings(str(tmp_path / "layout.ini"), QSettings.IniFormat)
    view = remembered_view(args, settings)
    assert view == View(panels=("lr",), x="tokens", log_y=True, smoothing=0.9, raw=False, dark=True)
    again = open_window(view=view)
    again.restore()
    assert again.difference_dock.isVisible() and (again.width(), again.height()) == (620, 480)
    # The command line wins.
    args = argparse.Namespace(panels="loss, mfu", x="step", log=False, smoothing=0.5, theme="light", language="zh")
    view = remembered_view(args, settings)
    assert view == View(panels=("loss", "mfu"), smoothing=0.5, raw=False, language="zh")


@pytest.mark.parametrize("content", [
    b"\xff\xfe\x00", b"[General]\nx=nowhere\nsmoothing=much\nlog_y=\ngeometry=1\ndocks=\"a, b\"\npanels=a, b\ndark=2",
    b"[General]\nsmoothing=nan\ngeometry=@ByteArray(x)\ndocks=@ByteArray()\nx=@Invalid()\npanels=@Variant(\\0\\0)",
])  # fmt: skip
def test_a_damaged_layout(open_window: OpenWindow, tmp_path: Path, content: bytes):
    (tmp_path / "layout.ini").write_bytes(content)
    args = argparse.Namespace(panels=None, x=None, log=None, smoothing=None, theme=None, language="en")
    view = remembered_view(args, QSettings(str(tmp_path / "layout.ini"), QSettings.IniFormat))
    assert (view.x, view.smoothing, view.log_y, view.dark) == ("step", None, False, False)
    window = open_window(view=view)
    window.restore()
    assert window.isVisible()


def answered(window: Window, ask: Callable[[], object], respond: Callable[[object], None]) -> object:
    """Answer that a host's thread gets to a question, while the window goes on."""
    answers, refreshes = queue.Queue(), []
    thread = threading.Thread(target=lambda: answers.put(ask()))
    thread.start()
    timer = window_module.QTimer()

    def look() -> None:
        dialog = QApplication.activeModalWidget()
        window.refresh()
        refreshes.append(dialog)
        if dialog is not None and len([seen for seen in refreshes if seen is not None]) > 2:
            respond(dialog)

    timer.timeout.connect(look)
    timer.start(5)
    until(lambda: not answers.empty())
    timer.stop()
    thread.join()
    return answers.get()


def test_questions(open_window: OpenWindow):
    window = open_window()
    texts = []

    def click(button: int) -> Callable[[QMessageBox], None]:
        def respond(box: QMessageBox) -> None:
            texts.append(box.text())
            assert box.defaultButton() is box.button(QMessageBox.No) and box.textFormat() == Qt.PlainText
            box.button(button).click()

        return respond

    def confirm() -> bool:
        return window.questions.confirm("<b>node1</b>", "ssh-ed25519", "SHA256:abc")

    assert answered(window, confirm, click(QMessageBox.Yes)) is True
    assert answered(window, confirm, click(QMessageBox.No)) is False
    assert "<b>node1</b>" in texts[0] and "SHA256:abc" in texts[0]

    def fill_in(dialog: QInputDialog) -> None:
        assert dialog.textEchoMode() == 2 and dialog.labelText() == "Password of me@x: "
        dialog.setTextValue("secret ")
        dialog.accept()

    def password() -> str | None:
        return window.questions.password("Password of me@x: ")

    assert answered(window, password, fill_in) == "secret "
    assert answered(window, password, lambda dialog: dialog.reject()) is None


def test_closing_while_a_host_waits_for_an_answer(open_window: OpenWindow, monkeypatch: pytest.MonkeyPatch):
    window = open_window()
    asked = threading.Event()
    monkeypatch.setattr(window, "_answer", lambda *_: None)
    window.questions.asked.disconnect()
    window.questions.asked.connect(lambda *_: asked.set(), Qt.DirectConnection)
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(window.questions.password("?"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert asked.wait(30)
    window.close()
    for thread in threads:
        thread.join(30)
    assert answers == [None, None]


def test_a_question_that_comes_after_the_end_is_not_shown(open_window: OpenWindow):
    window = open_window()
    window.close()
    window._answer("confirm", ("a", "b", "c"), queue.Queue(1))
    assert QApplication.activeModalWidget() is None


def test_nothing_is_read_drawn_or_written_in_the_windows_thread(
    open_window: OpenWindow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    threads: dict[str, set] = {}

    def watch(owner: object, name: str) -> None:
        right = getattr(owner, name)

        def watched(*args, **kwargs):
            threads.setdefault(name, set()).add(threading.current_thread())
            return right(*args, **kwargs)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in ((LocalFiles, "read"), (LocalFiles, "state"), (LocalFiles, "folders"), (window_module, "save"),
                        (draughtsman_module, "_draw"), (draughtsman_module, "draw")):  # fmt: skip
        watch(owner, name)
    run = write_run(tmp_path / "out" / "mine")
    window = open_window(run.parent)
    window.tools.x_box.setCurrentIndex(2)
    picture(window)
    window.save(tmp_path / "a.png")
    until(lambda: "saved" in window.statusBar().currentMessage())
    assert threads.keys() == {"read", "state", "folders", "_draw", "draw", "save"}
    assert all(threading.main_thread() not in found for found in threads.values())


def test_a_run_that_is_added(open_window: OpenWindow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    window = open_window(write_run(tmp_path / "a"))
    write_run(tmp_path / "b")
    monkeypatch.setattr(QInputDialog, "getText", lambda *_: (f" {tmp_path / 'b'} ", True))
    window.add()
    until(lambda: len(window.runs) == 2 and window.header.topLevelItemCount() == 2)
    assert len(window._sources) == 1
    monkeypatch.setattr(QInputDialog, "getText", lambda *_: ("$(id):x", True))
    window.add()
    assert "not a host name" in window.statusBar().currentMessage() and len(window._sources) == 1


def test_a_hostile_run_in_the_window(open_window: OpenWindow, tmp_path: Path):
    evil = "<img src='file:///etc/passwd'>\x1b[2J\n\u202e$\\frac{"
    directory = write_run(tmp_path / "$%s_\n<b>中文", evil="0x" + "f" * 100)
    (directory / "config.yaml").write_text("lr: 0x" + "f" * 9000 + "\nname: <b>\n")
    records = [line("train", step=n, time=1000 - n, loss=loss, **{evil: n, "": n}) for n, loss in
               enumerate(["nan", "inf", "-inf", 1e308, -1e308, 10**400, [], True, "x", None])]  # fmt: skip
    (directory / "reslog.jsonl").write_bytes(
        line("start", step=0, max_iters="x").encode() + "".join(records).encode() + b"\xff\xfe\0" * 1000 + b"\n"
        + b"[" * 100_000 + b"\n" + line("end", reason=evil).encode()
    )  # fmt: skip
    window = open_window(directory, write_run(tmp_path / "b"), view=View(panels=("all",), smoothing=0.9))
    window.difference_dock.show()
    until(lambda: window.difference_table.rowCount() > 0)
    item = window.header.topLevelItem(0)
    assert "lines that hold no record (2)" in item.toolTip(0) and "its settings cannot be read: " in item.toolTip(0)
    assert window.header.topLevelItem(1).toolTip(0) == ""
    heads = [window.difference_table.horizontalHeaderItem(column).text() for column in (1, 2)]
    assert ["(settings cannot be read)" in head for head in heads] == [True, False]
    texts = [item.text(column) for column in range(8)] + [window.windowTitle()]
    texts += [window.panel_list.item(i).text() for i in range(window.panel_list.count())]
    assert all(text.isprintable() for text in texts) and any("<img" in text for text in texts)
    tips = [item.toolTip(1)] + [window.panel_list.item(i).toolTip() for i in range(window.panel_list.count())]
    assert any("&lt;img" in tip for tip in tips) and not any("<img" in tip for tip in tips)
    for x in (1, 2, 3):
        window.tools.x_box.setCurrentIndex(x)
        for panel in picture(window):
            move(window, at(panel, 0.5, 0.5))
            window.canvas.grab()
