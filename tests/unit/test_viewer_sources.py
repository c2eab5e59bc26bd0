"""Sources of the viewer's bytes: growing and replaced files, here and over a real SSH server; logins; places, labels,
configurations and heartbeats."""

import json
import logging
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from runs.reslog import LONGEST_LINE
from tests.logs import text_line as line
from tests.sshd import Sshd, empty_home, fingerprint, make_key, missing
from tests.unit.test_ssh import PASSWORD, server_with_guest
from utils.ssh import SSHTarget
from viewer.sources import following as following_module
from viewer.sources import source as source_module
from viewer.sources.addresses import RunAddress
from viewer.sources.following import FollowedFile
from viewer.sources.labels import labels
from viewer.sources.local import LocalFiles
from viewer.sources.run import Run
from viewer.sources.source import RunSource, open_sources

needs_sshd = pytest.mark.skipif(bool(missing()), reason=missing() or "-")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return empty_home(tmp_path, monkeypatch)


@pytest.fixture(params=["here", "ssh"])
def target(request: pytest.FixtureRequest) -> SSHTarget | None:
    if request.param == "here":
        return None
    if missing():
        pytest.skip(missing())
    return request.getfixturevalue("server").target()


def steps(first: int, last: int, loss: float = 1.0) -> str:
    return "".join(line("train", step=step, loss=loss) for step in range(first, last + 1))


def append(path: Path, text: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(text)


def until(condition: Callable[[], object], what: object = "") -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.005)


@contextmanager
def following(target: SSHTarget | None, *paths: Path, **options) -> Iterator[RunSource]:
    host = RunSource(target, [str(path) for path in paths], lambda: None, interval_s=0.02, **options)
    host.start()
    try:
        assert host.loaded.wait(30)
        yield host
    finally:
        host.stop()
        host.join(30)


def seen(run: Run) -> list[int]:
    return [int(step) for step in run.history.snapshot().tables.get("train", {}).get("step", ())]


def losses(run: Run) -> list[float]:
    return run.history.snapshot().tables["train"]["loss"].tolist()


def logins(server: Sshd) -> int:
    return server.log.read_text(errors="replace").count("Accepted publickey")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "reslog.jsonl"
    path.parent.mkdir()
    return path


def test_a_run_that_is_being_written(target: SSHTarget | None, log: Path):
    log.write_text(line("start", step=0))
    with following(target, log.parent) as host:
        (run,) = host.runs
        assert seen(run) == []
        append(log, steps(1, 2) + '{"name": "train", "time": 1000')
        until(lambda: seen(run) == [1, 2])
        append(log, '.0, "step": 3, "loss": 1.0}\n')
        until(lambda: seen(run) == [1, 2, 3])
        assert run.history.snapshot().skipped_lines == 0
        # A crash leaves a torn line, and the next launch ends it first.
        append(log, '{"name": "tr')
        append(log, "\n" + line("start", step=2) + steps(3, 3, loss=7.0))
        until(lambda: seen(run) == [1, 2, 3] and losses(run)[-1] == 7.0)
        assert run.history.snapshot().skipped_lines == 1


def test_only_new_bytes_are_fetched(target: SSHTarget | None, log: Path):
    log.write_text(line("start", step=0) + steps(1, 3000))
    looked = []
    with following(target, log.parent) as host:
        (run,) = host.runs
        size = log.stat().st_size
        assert seen(run)[-1] == 3000 and run.log.bytes_fetched == size
        host._on_change = lambda: looked.append(run.log.bytes_fetched)
        until(lambda: len(looked) > 5)
        assert set(looked) == {size}
        for step in (3001, 3002):
            append(log, steps(step, step))
            until(lambda: seen(run)[-1] == step)  # noqa: B023
        assert run.log.bytes_fetched <= log.stat().st_size + 2 * 64


def test_a_replaced_file_is_read_again(target: SSHTarget | None, tmp_path: Path):
    longer, shorter, as_long = steps(31, 70, 2.0), steps(1, 5, 2.0), steps(1, 20, 2.0)
    cases = [(new, in_place) for new in (longer, shorter, as_long, "") for in_place in (True, False)]
    logs = [tmp_path / str(number) / "reslog.jsonl" for number in range(len(cases))]
    for log in logs:
        log.parent.mkdir()
        log.write_text(steps(1, 20, loss=1.0))
    with following(target, *(log.parent for log in logs)) as host:
        assert [seen(run) for run in host.runs] == [list(range(1, 21))] * len(logs)
        for log, (new, in_place) in zip(logs, cases):
            written = log if in_place else log.with_name("new")
            written.write_text(new)
            # Over SFTP, times are whole seconds.
            os.utime(written, (2e9, 2e9))
            os.replace(written, log)
        for log, run, (new, _) in zip(logs, host.runs, cases):
            expected = [json.loads(text)["step"] for text in new.splitlines()]
            until(lambda: seen(run) == expected and (not expected or set(losses(run)) == {2.0}))  # noqa: B023
            append(log, steps(100, 100))
            until(lambda: seen(run) == [*expected, 100])  # noqa: B023


def test_a_file_that_is_deleted_and_comes_back(target: SSHTarget | None, log: Path):
    log.write_text(steps(1, 3))
    rounds = []
    with following(target, log.parent) as host:
        (run,) = host.runs
        log.unlink()
        host._on_change = lambda: rounds.append(host.problem)
        until(lambda: len(rounds) > 2)
        assert seen(run) == [1, 2, 3] and not host.problem
        log.write_text(steps(7, 8))
        os.utime(log, (2e9, 2e9))
        until(lambda: seen(run) == [7, 8])


def test_runs_that_begin_later(target: SSHTarget | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(source_module, "_LOOK_ROUND_S", 0.0)
    folder = tmp_path / "out"
    with following(target, folder) as host:
        assert [run.path for run in host.runs] == [str(folder)] and not host.problem
        (folder / "real").mkdir(parents=True)
        (folder / "real" / "reslog.jsonl").write_text(steps(1, 1))
        (folder / "notes").mkdir()
        (folder / "file").write_text("")
        until(lambda: [run.path for run in host.runs] == [str(folder / "real")])
        (folder / "link").symlink_to(folder / "real")
        (folder / "broken").symlink_to(folder / "nowhere")
        until(lambda: [run.path for run in host.runs] == [str(folder / "link"), str(folder / "real")])
        until(lambda: [seen(run) for run in host.runs] == [[1], [1]])


@needs_sshd
def test_a_lost_connection_is_made_again(server: Sshd, log: Path):
    log.write_text(steps(1, 3))
    with following(server.target(), log.parent) as host:
        (run,) = host.runs
        problems = set()
        host._on_change = lambda: problems.add(host.problem)
        append(log, '{"name": "train", "time": 1, "st')
        assert server.drop_connections()
        until(lambda: any(problems))
        append(log, 'ep": 4, "loss": 1.0}\n' + steps(5, 6))
        until(lambda: seen(run) == [1, 2, 3, 4, 5, 6])
        until(lambda: not host.problem and not run.health.problem)
        assert run.log.bytes_fetched <= log.stat().st_size + 3 * 64
        assert "the connection was lost; tried again in 1 s" in problems


@needs_sshd
def test_one_connection_a_host(server: Sshd, tmp_path: Path):
    places = []
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "reslog.jsonl").write_text(steps(1, 2))
        places.append(RunAddress(server.target(), str(tmp_path / name)))
    before = logins(server)
    (host,) = open_sources([*places, places[0]], on_change=lambda: None, interval_s=0.02)
    host.start()
    assert host.loaded.wait(30)
    assert [seen(run) for run in host.runs] == [[1, 2]] * 3
    host.stop()
    host.join(30)
    until(lambda: logins(server) == before + 1)


class Answers:
    """Gives the answers in turn; `questions` holds the questions."""

    def __init__(self, *answers):
        self.answers, self.questions = list(answers), []

    def confirm(self, *question: str) -> bool:
        return self._answer(question)

    def password(self, prompt: str) -> str | None:
        return self._answer(prompt)

    def _answer(self, question):
        assert threading.current_thread() is not threading.main_thread()
        self.questions.append(question)
        return self.answers.pop(0)


def one_sentence(text: str) -> None:
    assert text and text.isprintable() and "Error" not in text and "Traceback" not in text, text
    assert not text.endswith("."), text


def refused(server: Sshd, host: RunSource) -> str:
    """Reason of a refusal; nothing is tried again until the user asks for it."""
    until(lambda: host.problem)
    # The end of the attempt in the server's log may lag behind ours.
    until(lambda: not server._connections())
    attempts = server.log.read_text(errors="replace").count("Connection from ")
    waits = threading.Event()
    waits.wait(0.1)
    assert server.log.read_text(errors="replace").count("Connection from ") == attempts
    assert all(run.health.problem == host.problem for run in host.runs)
    one_sentence(host.problem)
    return host.problem


@needs_sshd
def test_an_unknown_host(server: Sshd, log: Path, tmp_path: Path):
    log.write_text(steps(1, 2))
    known_hosts = tmp_path / "known_hosts"
    target, shown = server.target(known_hosts=str(known_hosts)), fingerprint(server.host_key())
    with following(target, log.parent) as host:
        assert shown in refused(server, host) and not known_hosts.exists()
    answers = Answers(False, True)
    with following(target, log.parent, questions=answers) as host:
        assert shown in refused(server, host) and not known_hosts.exists()
        host.retry()
        until(lambda: host.runs and seen(host.runs[0]) == [1, 2])
        assert answers.questions == [(server.known_as, "ssh-ed25519", shown)] * 2
    with following(target, log.parent) as host:
        until(lambda: host.runs and seen(host.runs[0]) == [1, 2])


@needs_sshd
def test_a_changed_key(tmp_path: Path, log: Path):
    log.write_text(steps(1, 2))
    with Sshd(tmp_path / "sshd") as server, following(server.target(), log.parent, questions=Answers()) as host:
        (run,) = host.runs
        server.restart()
        until(lambda: "has changed" in host.problem, lambda: host.problem)
        assert "ssh-keygen -R" in refused(server, host) and seen(run) == [1, 2]
        append(log, steps(3, 3))
        server.known_hosts.write_text(server.known_hosts_line())
        host.retry()
        until(lambda: seen(run) == [1, 2, 3])


@needs_sshd
@pytest.mark.parametrize("key", ["absent", "wrong", "none"])
def test_a_login_that_is_refused(server: Sshd, log: Path, tmp_path: Path, key: str):
    log.write_text(steps(1, 2))
    if key == "wrong":
        make_key(tmp_path / "key")
    target = server.target(key_file=None if key == "none" else str(tmp_path / "key"))
    with following(target, log.parent) as host:
        assert "refuses the login" in refused(server, host)
        host.target = server.target()
        host.retry()
        until(lambda: host.runs and seen(host.runs[0]) == [1, 2])


@needs_sshd
def test_nothing_listens(log: Path):
    server = SSHTarget("127.0.0.1", 1, "ada")
    with following(server, log.parent) as host:
        one_sentence(host.problem)
        assert "refuses connections" in host.problem and "; tried again in " in host.problem


@needs_sshd
def test_a_password_is_asked_for_once(tmp_path: Path, log: Path):
    with server_with_guest(tmp_path) as server:
        log.write_text(steps(1, 2))
        target = server.target(key_file=None)
        answers = Answers("wrong-1", "wrong-2", "wrong-3", "wrong-4", PASSWORD)
        with following(target, log.parent, questions=answers) as host:
            assert "refuses the login" in refused(server, host)
            assert len(answers.questions) == 3
            # None of the wrong passwords is tried again.
            failed = server.log.read_text(errors="replace").count("Failed password")
            host.retry()
            until(lambda: host.runs and seen(host.runs[0]) == [1, 2])
            assert server.log.read_text(errors="replace").count("Failed password") == failed + 1
            (run,) = host.runs
            assert server.drop_connections()
            append(log, steps(3, 3))
            until(lambda: seen(run) == [1, 2, 3])
            assert len(answers.questions) == 5 and not answers.answers
            assert all(PASSWORD not in str(question) for question in answers.questions)


def poll_all(path: Path) -> tuple[FollowedFile, list[bytes]]:
    follower, lines, more = FollowedFile(str(path)), [], True
    while more:
        news = follower.poll(LocalFiles())
        lines, more = [*lines, *news.lines], news.more
    return follower, lines


def test_lines_that_are_split_between_two_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = b"".join(b"%d" % number * (number % 5) + b"\n" for number in range(300))
    (tmp_path / "a.jsonl").write_bytes(text)
    for chunk in (1, 2, 7, 64, 65, 1000):
        monkeypatch.setattr(following_module, "_CHUNK_BYTES", chunk)
        assert poll_all(tmp_path / "a.jsonl")[1] == text.split(b"\n")[:-1]


def test_a_line_of_ten_megabytes_is_passed_over(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    record = line("train", step=1, loss=1.0, text="x" * 10_000_000)
    a_little = line("train", step=3, text="y" * (LONGEST_LINE - 5))
    path.write_text(steps(1, 1) + record + steps(2, 2) + a_little + steps(4, 4))
    run, files = Run(None, str(path)), LocalFiles()
    while run.update(files):
        pass
    assert seen(run) == [1, 2, 4]
    assert run.history.snapshot().skipped_lines == 2


def test_a_file_without_lines_takes_no_memory(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.truncate(30 << 20)
    run, files = Run(None, str(path)), LocalFiles()
    tracemalloc.start()
    try:
        while run.update(files):
            pass
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20 and kept < 4 << 20
    append(path, "\n" + steps(5, 5))
    run.update(files)
    assert seen(run) == [5] and run.history.snapshot().skipped_lines == 1


@pytest.mark.parametrize("content", [
    bytes(range(256)) * 400, (line("train", step=1) * 3).encode("utf-16"), (line("start", step=0) * 3).encode("utf-32"),
    b"\n" * 5000, b"\r\n\x00\n" * 100, b"\xef\xbb\xbf" + line("train", step=9).encode(), os.urandom(100_000),
    b"\x7fELF" + b"\0" * 10_000, b"\x80\x05\x95cos\nsystem\n(S'touch owned'\ntR.\n",
], ids=["bytes", "utf-16", "utf-32", "newlines", "nul", "bom", "random", "binary", "pickle"])  # fmt: skip
def test_a_file_that_is_not_a_log(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "reslog.jsonl"
    path.write_bytes(content + b"\n")
    append(path, steps(1, 2))
    run, files = Run(None, str(path)), LocalFiles()
    while run.update(files):
        pass
    assert seen(run)[-2:] == [1, 2] or seen(run) == [1, 2, 9]
    assert not (tmp_path / "owned").exists()


def test_something_else_under_the_name_of_a_log(tmp_path: Path):
    for name, make in (("folder", Path.mkdir), ("pipe", os.mkfifo), ("loop", lambda path: path.symlink_to(path))):
        (tmp_path / name).mkdir()
        make(tmp_path / name / "reslog.jsonl")
    (tmp_path / "good").mkdir()
    (tmp_path / "good" / "reslog.jsonl").write_text(steps(1, 2))
    names = ("folder", "pipe", "loop", "x" * 300, "good", "absent/x", "good/reslog.jsonl/x")
    with following(None, *(tmp_path / name for name in names)) as host:
        assert [seen(run) for run in host.runs] == [[], [], [], [], [1, 2], [], []]
        assert not host.problem
        for run in host.runs[2:4]:
            one_sentence(run.health.problem)
        assert not host.runs[4].health.problem


def test_a_run_that_may_not_be_read_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("secret\x1b[2J", "open"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reslog.jsonl").write_text(steps(1, 2))
    allowed = LocalFiles.state

    def state(self, path: str):
        if "secret" in path:
            raise PermissionError(13, "Permission denied", path)
        return allowed(self, path)

    monkeypatch.setattr(LocalFiles, "state", state)
    with following(None, tmp_path / "secret\x1b[2J", tmp_path / "open") as host:
        assert seen(host.runs[1]) == [1, 2] and not host.runs[1].health.problem
        assert "may not be read" in host.runs[0].health.problem
        one_sentence(host.runs[0].health.problem)


@needs_sshd
def test_over_ssh_too_a_strange_file_does_not_hide_the_others(server: Sshd, tmp_path: Path):
    folder = tmp_path / "out"
    for name in ("good", "café 中文 $x %s\n_", b"\xff\xfe"):
        directory = os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else name.encode())
        os.makedirs(directory)
        Path(os.fsdecode(directory), "reslog.jsonl").write_text(steps(1, 2))
    before = logins(server)
    with following(server.target(), folder, folder / ("x" * 300)) as host:
        found = {run.path.rpartition("/")[2]: seen(run) for run in host.runs}
        assert found["good"] == found["café 中文 $x %s\n_"] == [1, 2]
        assert found["x" * 300] == [] and not host.problem
        assert logins(server) == before + 1


def test_a_mistake_of_ours_is_logged_and_does_not_end_the_thread(
    log: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    log.write_text(steps(1, 1))
    with following(None, log.parent) as host, caplog.at_level(logging.ERROR):
        (run,) = host.runs
        right = run.history.feed
        monkeypatch.setattr(run.history, "feed", lambda lines: 1 / 0)
        append(log, steps(2, 2))
        until(lambda: "tried again" in host.problem)
        monkeypatch.setattr(run.history, "feed", right)
        append(log, steps(3, 3))
        host.retry()
        until(lambda: seen(run)[-1] == 3)
    assert "ZeroDivisionError" in caplog.text


def bomb(first: str, others: str) -> str:
    names = "abcdefghij"
    grown = (f"{new}: &{new} {others % ', '.join([f'*{old}'] * 10)}\n" for old, new in zip(names, names[1:]))
    return f"a: &a {first}\n" + "".join(grown)


@pytest.mark.parametrize("text", [
    bomb("[x, x]", "[%s]"), bomb("{k: 1}", "{<<: [%s]}"), "[" * 1000, "a: " + "{a: " * 1000, "a: 0x" + "f" * 9000,
    "0x" + "f" * 9000 + ": 1", 'a: !!int ""', "a: !!bool x", "a: !!timestamp x", "a: \0", "? [a]\n: b", "- a", "7",
    "a: !!python/object/apply:os.system [touch owned]", "!!python/object/new:os.system [touch owned]", "a: &a [*a]",
    "derived: [1]", "derived: {0x" + "f" * 9000 + ": 1}", "a: " + "x" * 200_000, "\xff\xfe", "a: 2024-99-99", "",
], ids=lambda text: text[:24])  # fmt: skip
def test_a_hostile_configuration(text: str, log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (log.parent / "config.yaml").write_bytes(text.encode("latin-1"))
    run = Run(None, str(log.parent))
    run.look_round(LocalFiles())
    assert run.health.config == {} and not (tmp_path / "owned").exists()
    # Either nothing in it could be shown, or the reason is given.
    is_read = text.startswith(("a: &a", "derived: ["))
    assert bool(run.health.config_problem) != is_read and run.health.config_problem.isprintable()


def test_a_configuration(log: Path):
    text = 'lr: 0.1\nname: 中文\nlayers: [1, 2]\nseed: null\n"a\\e": 1\n'
    (log.parent / "config.yaml").write_text(text + "derived:\n  lr: 0.1\n  world_size: 2\n  all: {}\n")
    run, files = Run(None, str(log)), LocalFiles()
    run.look_round(files)
    assert run.health.config == {
        "lr": 0.1, "name": "中文", "seed": None, "a\N{REPLACEMENT CHARACTER}": 1, "derived.world_size": 2,
    }  # fmt: skip
    (log.parent / "config.yaml").write_text("lr: 0.25\nlr: 0.5\n")
    run.look_round(files)
    assert (run.health.config, run.health.config_problem) == ({}, "'lr' is given twice, line 2")
    (log.parent / "config.yaml").write_text("lr: 0.25\n")
    run.look_round(files)
    assert (run.health.config, run.health.config_problem) == ({"lr": 0.25}, "")


def test_a_heartbeat(log: Path, target: SSHTarget | None):
    beat = log.parent / "heartbeat" / "rank-0.json"
    beat.parent.mkdir()
    log.write_text(steps(1, 1))
    beat.write_text('{"rank": 0, "phase": "validate"}')
    os.utime(beat, (12345, 12345))
    with following(target, log) as host:
        (run,) = host.runs
        assert (run.health.phase, run.health.heartbeat_at) == ("validate", 12345.0)
        assert abs(run.health.clock_ahead) < 30
    for text in (b'{"phase": "\x1b[2J"}', b"\xff" * 100_000, b'{"phase": ["step"]}', b""):
        beat.write_bytes(text)
        run.look_round(LocalFiles())
        assert run.health.phase == ""


@pytest.mark.parametrize("text, expected", [
    ("out/a", RunAddress(None, "out/a")),
    ("node1:runs/a", RunAddress(SSHTarget("node1"), "runs/a")),
    ("ada@node1:/runs/a b", RunAddress(SSHTarget("node1", None, "ada"), "/runs/a b")),
    ("ada@node1:~/a", RunAddress(SSHTarget("node1", None, "ada"), "a")),
    ("node1:", RunAddress(SSHTarget("node1"), ".")),
    ("node1:~", RunAddress(SSHTarget("node1"), ".")),
    ("node1:a$$b", RunAddress(SSHTarget("node1"), "a$b")),
    ("ssh://ada@node1:2222/runs/a", RunAddress(SSHTarget("node1", 2222, "ada"), "/runs/a")),
    ("ssh://node1:2222/~/runs/a", RunAddress(SSHTarget("node1", 2222), "runs/a")),
    ("ssh://node1", RunAddress(SSHTarget("node1"), ".")),
    ("ssh://node1/~", RunAddress(SSHTarget("node1"), ".")),
    ("ssh://[::1]:2222/a", RunAddress(SSHTarget("::1", 2222), "/a")),
    ("[::1]:a", RunAddress(SSHTarget("::1"), "a")),
    ("ada@[fe80::1%eth0]:a:b", RunAddress(SSHTarget("fe80::1%eth0", None, "ada"), "a:b")),
    (r"C:\runs\a", RunAddress(None, r"C:\runs\a")),
    ("./a:b", RunAddress(None, "./a:b")),
    ("out/a:b", RunAddress(None, "out/a:b")),
    ("node1:" + "x" * 5000, RunAddress(SSHTarget("node1"), "x" * 5000)),
])  # fmt: skip
def test_places(text: str, expected: RunAddress):
    assert RunAddress.parse(text) == expected


def test_a_local_name_with_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "node1:a").mkdir()
    assert RunAddress.parse("node1:a") == RunAddress(None, "node1:a")
    assert RunAddress.parse("node1:b").target == SSHTarget("node1")


def test_a_local_name_at_home():
    assert RunAddress.parse("~/a") == RunAddress(None, f"{Path.home()}/a")


@pytest.mark.parametrize("text", [
    ":a", "node1:2222/a", "node1:2222:a", "a b:c", "$(id):a", "-oProxyCommand=id:a", "ssh:///a", "@h:a",
    "ssh://node1:0/a", "ssh://node1:x/a", "ssh://-l@node1/a", "a\x1b[2J:b", "[]:a", "::1:a", "a;b:c",
    "node1:~bob/a", "ssh://node1/~bob/a", "node1:$SCRATCH/a", "ssh://node1/$HOME/a", "$NO_SUCH_VARIABLE/a",
])  # fmt: skip
def test_text_that_is_not_an_address(text: str):
    with pytest.raises(ValueError) as problem:
        RunAddress.parse(text)
    one_sentence(str(problem.value))


def test_labels_tell_runs_apart():
    a, b = SSHTarget("a"), SSHTarget("b")
    runs = [Run(None, "/x/one"), Run(None, "/x/two/reslog.jsonl"), Run(None, "/y/two")]
    assert labels(runs) == ["one", "x/two", "y/two"]
    assert labels([Run(a, "runs/one"), Run(a, "runs/two")]) == ["one", "two"]
    assert labels([Run(a, "one"), Run(b, "one"), Run(None, "/one")]) == ["a: one", "b: one", "one"]
    same = [Run(SSHTarget("a", 1), "one"), Run(SSHTarget("a", 2), "one"), Run(SSHTarget("b"), "one"), Run(None, "/")]
    same += [Run(None, "/p/run"), Run(None, "/p/run/reslog.jsonl"), Run(None, "/p/\x1b\n"), Run(None, "/p/\n\x1b")]
    same += [Run(None, "/" + "x" * 200 + end) for end in "yz"]
    found = labels(same)
    assert len(set(found)) == len(found) and all(name and name.isprintable() and len(name) < 90 for name in found)
    assert labels([]) == []
