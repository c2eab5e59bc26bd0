"""The report card: figures of made-up runs, computed once more here; damaged files; texts that look like markup."""

import json
import math
import re
import subprocess
import sys
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from dataset.shares import plan, schedule_to_json
from evaluation.report.card import Card, Chart, Facts, Section, Series, Table, Text, Verbatim
from evaluation.report.chart_values import sentence_of, table_of
from evaluation.report.command import main
from evaluation.report.commands import training_command
from evaluation.report.curves import thinned
from evaluation.report.drawing import drawn, tick_label, ticks
from evaluation.report.gather import gather
from evaluation.report.launches import launches_of, repeated_steps, spent_by
from evaluation.report.markdown import escaped, fenced, to_markdown
from evaluation.report.page import to_page
from evaluation.report.run import ancestors_of, read_run
from evaluation.report.scores import compared, paired
from evaluation.results import Figure, Results, TaskResult, mean_figure, write_results, write_samples
from runs.reslog import all_records
from tests.made_run import SHAPE, MadeRun


def a_run(path: Path) -> Path:
    """Stopped once on request; killed once, whereby steps 5 and 6 were done again."""
    run = MadeRun(path)
    run.start()
    run.train([1, 2, 3])
    run.write("valid", 5, step=3, loss=8.5, dt=5)
    run.write("sample", 3, step=3, prompt="Once", text="upon")
    run.write("save", 1, step=3, path="step-3", dt=4, held_up=0.75)
    run.write("end", 0, step=3, reason="stopped on request")
    run.start(3, after=60)
    run.train([4])
    run.train([6], dt=3)  # Of steps 5 and 6.
    run.start(4, after=100, world_size=4)
    run.train([5, 6, 7])
    run.write("eval", 9, step=7, task="t", figures={"acc": [0.5, 0.1, 20]}, seconds=9)
    run.write("end", 0, step=7, reason="finished")
    return run.finish({"max_iters": 100, "world_size": 4, "dtype": "float32", **SHAPE})


def facts(card: Card, section: str) -> dict[str, str]:
    found = next(one for one in card.sections if one.title == section)
    return {row[0]: row[1] for block in found.blocks if isinstance(block, (Facts, Table)) for row in block.rows}


def said(card: Card, section: str) -> str:
    found = next(one for one in card.sections if one.title == section)
    return " ".join(block.text for block in found.blocks if isinstance(block, (Text, Verbatim)))


def test_the_parts_of_the_time_are_those_that_were_written_and_fill_it(tmp_path: Path):
    launches = launches_of(all_records(a_run(tmp_path / "run") / "reslog.jsonl"))
    spent = spent_by(launches)
    assert repeated_steps(launches) == [0, 2, 0]
    # Steps 1 to 4 and 5 to 7 stand, of 2 s each, a quarter and half a second of them waiting.
    assert spent.data_wait == pytest.approx(7 * 0.25) and spent.comm_wait == pytest.approx(7 * 0.5)
    assert spent.computing == pytest.approx(7 * (2 - 0.75))
    # The record of steps 5 and 6 has 3 s a step, and lies 3 s behind the one before it.
    assert spent.repeated == pytest.approx(2 * 3)
    assert (spent.validation, spent.saves, spent.texts, spent.evaluation) == (5, 0.75, 3, 9)
    assert spent.between == pytest.approx(160)


def test_parts_of_the_time_add_up_to_it_for_steps_that_were_all_logged(tmp_path: Path):
    run = MadeRun(tmp_path / "run")
    run.start()
    run.train(range(1, 9))
    run.start(5, after=7)
    run.train(range(6, 11))
    run.write("valid", 4, step=10, loss=1.0, dt=4)
    run.write("end", 2.5, step=10, reason="finished")
    spent = spent_by(launches_of(all_records(run.finish() / "reslog.jsonl")))
    assert spent.wall == pytest.approx(run.now - 1_700_000_000)
    assert spent.repeated == 6 and spent.other == pytest.approx(2.5) and spent.between == 7


def test_the_model_and_its_cost(tmp_path: Path):
    run = MadeRun(tmp_path / "run")
    run.start(flops_per_token=1e6, device="A toy", commit="f" * 40, versions={"torch": "9"})
    run.train(range(1, 11), energy_j=1800.0)
    run.start(8, after=1, flops_per_token=1e6, device="A toy", commit="f" * 40, versions={"torch": "9"})
    run.train([9, 10], energy_j=1800.0)
    card = gather(run.finish(SHAPE))
    # Embedding and head; in each layer queries and output, keys and values, three matrices of the MLP, two norms.
    parameters = 2 * 32 * 8 + 2 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 24 + 2 * 8) + 8
    assert f"llama: {parameters:,} parameters, 2 layers, 8 wide" in facts(card, "What was trained on what")["model"]
    cost = facts(card, "Cost")
    # Ten steps stand, and two were done again.
    assert cost["FLOPs"] == f"{1280 * 1e6 * 12 / 10 / 1e9:.3g} GFLOP"
    assert cost["tokens read"] == "1,280" and cost["device"] == "A toy" and cost["MFU, median"] == "50.0%"
    assert cost["energy"] == f"{12 * 1800 / 1e3:.3g} kJ ({12 * 1800 / 3.6e6:.3g} kWh)"
    assert cost["tokens per second of training"] == f"{1280 / 20:.0f}"
    assert facts(card, "The commands that reproduce it") == {"versions": "torch 9", "commit": "f" * 40}


def test_what_nobody_recorded_is_not_made_up(tmp_path: Path):
    card = gather(a_run(tmp_path / "run"))
    trained, cost = facts(card, "What was trained on what"), facts(card, "Cost")
    assert trained["data"] == "not recorded"
    assert (cost["FLOPs"], cost["device"], cost["energy"]) == ("not recorded", "not recorded", "no counter recorded")
    assert facts(card, "The commands that reproduce it") == {"versions": "not recorded", "commit": "not recorded"}
    assert "The audit cannot be done" in said(card, "Audit")


def test_a_real_run_is_described_and_audited(tiny_run: list[str], data_dir: Path, tmp_path: Path):
    from train_my_ddp import main as train

    assert train(tiny_run) == 0
    card = gather(tmp_path / "run")
    trained = facts(card, "What was trained on what")
    manifest = json.loads((data_dir / "pretokenize.json").read_text())
    documents = int(re.match(r"([\d,]+) documents", trained["its content"])[1].replace(",", ""))
    tokens = int(re.search(r"([\d,]+) tokens", trained["its content"])[1].replace(",", ""))
    assert 0.5 * manifest["documents"] < documents < manifest["documents"] and tokens < manifest["tokens"]
    assert trained["tokenizer"].endswith(manifest["tokenizer_fingerprint"][:12])
    assert trained["mixture"] == "one directory" and trained["decontamination"] == "not recorded"
    assert trained["epochs"].startswith(f"{16 / int(trained['samples'].split()[0].replace(',', '')):.3f} (16 of ")
    assert card.remarks == [] and dict(card.summary.rows)["audit"] == "each sample was taken once"
    assert "every position was taken once, in order" in said(card, "Audit")
    assert facts(card, "Cost")["FLOPs"].endswith("FLOP")
    # What a maker of data records is shown.
    manifest |= {"mixture": {"web": 0.75, "code": 0.25}, "decontamination": "13-grams of GSM8K", "commands": ["make x"]}
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in data_dir.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "pretokenize.json").unlink()
    (copy / "pretokenize.json").write_text(json.dumps(manifest))
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(data_dir), str(copy)))
    card = gather(tmp_path / "run")
    trained = facts(card, "What was trained on what")
    assert trained["mixture"] == "web: 0.75, code: 0.25" and trained["decontamination"] == "13-grams of GSM8K"
    assert "make x" in said(card, "The commands that reproduce it")
    # The command trains the same run again.
    command = training_command(read_run(tmp_path / "run")).replace("\\\n", " ").split()
    assert command[:2] == ["python", "train_my_ddp.py"]
    again = [flag for flag in command[2:] if not flag.startswith("--out_dir=")] + [f"--out_dir={tmp_path / 'again'}"]
    assert train(again) == 0
    losses = [[r["loss"] for r in all_records(tmp_path / name / "reslog.jsonl") if r["name"] == "train"]
              for name in ("run", "again")]  # fmt: skip
    assert losses[0] == losses[1]
    # A digest that is another is a failure.
    log = tmp_path / "run" / "reslog.jsonl"
    log.write_text(re.sub('"digest": "[0-9a-f]{4}', '"digest": "0000', log.read_text()))
    card = gather(tmp_path / "run")
    assert dict(card.summary.rows)["audit"].startswith("FAILED, ") and "WRONG step 1: the digest" in said(card, "Audit")


def test_a_mixture_is_told_by_its_sources(tmp_path: Path):
    """A record as a run writes it: three of four samples from the first source."""
    mixture = {
        "sources": [{"name": "web", "dir": "w", "fingerprint": "aa", "samples": 40},
                    {"name": "code", "dir": "c", "fingerprint": "bb", "samples": 100}],
        "schedule": schedule_to_json(plan([(0, [Fraction(3), Fraction(1)])], [None, None], [0, 0])),
        "wished": [],
    }  # fmt: skip
    run = MadeRun(tmp_path / "run")
    run.start(mixture=mixture)
    run.train(range(1, 11))
    trained = facts(gather(run.finish({"train_data": "w:3,c:1", **SHAPE})), "What was trained on what")
    assert trained["mixture"] == (
        "web 60 samples (75.0% of the stream, 1.5 epochs), code 20 samples (25.0% of the stream, 0.2 epochs)"
    )


def test_a_chain_of_runs_is_shown_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its paths are relative to where it was trained, not to where the card is made."""
    chain = (("run", "pretrain", ""), ("sft", "sft", "out/run"), ("dpo", "dpo", "out/sft/ckpt/step-4"))
    for name, task, parent in chain:
        run = MadeRun(tmp_path / "out" / name, task_type=task, init_from=parent)
        run.start(task=task)
        run.train([1, 2], **({"rewards/chosen": 0.5, "rewards/rejected": -0.5} if task == "dpo" else {}))
        run.finish(SHAPE)
    (tmp_path / "out" / "sft" / "ckpt" / "step-4").mkdir(parents=True)
    before, where = ancestors_of(read_run(tmp_path / "out" / "dpo"))
    assert [run.name for run in before] == ["sft", "run"] and where == "the run run began with new weights"
    card = gather(tmp_path / "out" / "dpo")
    assert "run (pretraining) -> sft (SFT on conversations) -> dpo (DPO on preferences)" in said(
        card, "What was trained on what"
    )
    charts = [block.title for block in next(s for s in card.sections if s.title == "Curves").blocks
              if isinstance(block, Chart)]  # fmt: skip
    assert charts.count("Loss") == 3 and charts.count("Rewards") == 1
    # A circle has an end, and a folder that is gone a sentence.
    run = MadeRun(tmp_path / "out" / "circle", init_from=str(tmp_path / "out" / "circle"))
    assert "began with itself" in ancestors_of(read_run(run.finish()))[1]
    run = MadeRun(tmp_path / "out" / "orphan", init_from="out/gone")
    assert "not there any more" in ancestors_of(read_run(run.finish()))[1]


def test_curves_keep_each_spike_and_leave_out_what_was_done_again(tmp_path: Path):
    x, y = np.arange(1000.0), np.sin(np.arange(1000.0) / 50)
    y[617], y[200:300] = 9.0, np.nan
    points = thinned(x, y, most=100)
    assert len(points) <= 100 and (617.0, 9.0) in points and points == sorted(points, key=lambda point: point[0])
    assert any(math.isnan(value) for at, value in points if 200 <= at < 300)
    assert all(y[int(at)] == value or math.isnan(value) for at, value in points)
    loss = next(block for section in gather(a_run(tmp_path / "run")).sections for block in section.blocks
                if isinstance(block, Chart) and block.title == "Loss")  # fmt: skip
    assert [at for at, _ in loss.series[0].points] == [1, 2, 3, 4, 5, 6, 7]
    assert loss.marks == [3.0, 4.0]


class Reader(HTMLParser):
    """Reads a page, and checks that each element is closed in its turn."""

    VOID = {"meta", "br", "link", "img"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


HOSTILE = (
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</pre></svg><iframe>", "`` ``` ```` \n```\n# x",
    "| a | b |\n|---|---|", "[x](http://evil.example) ![y](http://evil.example/z.png) <http://evil.example>",
    "*bold* _it_ ~~no~~ &lt; &#60; \\", "# heading\n- item\n1. one\n===\n> quote", "\x1b[31m\x00\u202e\ud800 end",
    "&nbsp;<b", "$$x$$", "--><!--", "]]>", "---",
)  # fmt: skip


def hostile_card() -> Card:
    blocks = []
    for text in HOSTILE:
        blocks += [
            Text(text, "bad"), Facts([(text, text)]), Table([text, text], [[text, text]], text), Verbatim(text, text),
            Chart(text, text, text, [Series(text, [(1.0, 2.0), (2.0, 3.0)])]),
        ]  # fmt: skip
    return Card("".join(HOSTILE), "now", HOSTILE, Facts([(HOSTILE[0], HOSTILE[1])]), [Section(HOSTILE[0], blocks)])


def test_no_text_becomes_part_of_the_page():
    page = to_page(hostile_card())
    page.encode()
    reader = Reader(page)
    harmless = to_page(Card("t", "now", ["r"] * len(HOSTILE), Facts([("a", "b")]), [Section("s", [
        block for _ in HOSTILE for block in (
            Text("t", "bad"), Facts([("t", "t")]), Table(["t", "t"], [["t", "t"]], "t"), Verbatim("t", "t"),
            Chart("t", "t", "t", [Series("t", [(1.0, 2.0), (2.0, 3.0)])]),
        )
    ])]))  # fmt: skip
    assert reader.tags == Reader(harmless).tags
    assert not {"script", "img", "iframe", "link", "object"} & set(reader.tags)
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    assert all(value.startswith("#") for _, name, value in reader.attributes if name in ("href", "src"))
    assert "<script>alert(1)</script>" in reader.text and "\u202e" not in page and "\x1b" not in page
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style


def test_no_text_becomes_markdown():
    """As a reader for CommonMark with tables sees it."""
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(to_markdown(hostile_card()))
    flat = [inner for token in tokens for inner in (token, *(token.children or ()))]
    kinds = {token.type for token in flat}
    assert not kinds & {"html_inline", "html_block", "link_open", "image", "code_inline", "em_open", "hr",
                        "blockquote_open", "ordered_list_open", "code_block", "hardbreak"}  # fmt: skip
    headings = [token for token in tokens if token.type == "heading_open"]
    assert [token.tag for token in headings] == ["h1", "h2"]
    fences = [token.content for token in tokens if token.type == "fence"]
    assert len(fences) == len(HOSTILE) and "```\n# x" in fences[3]
    assert sum(token.type == "table_open" for token in tokens) == 2 * len(HOSTILE)
    cells = [token.type for token in tokens].count("td_open")
    # A table of two cells, and one of the two points of a chart.
    assert cells == len(HOSTILE) * (2 + 4)
    texts = "".join(token.content for token in flat if token.type == "text")
    assert "<script>alert(1)</script>" in texts and "[x](http://evil.example)" in texts


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a|b", "a\\|b"), ("- x", "\\- x"), ("-0.5", "-0.5"), ("1. x", "1\\. x"), ("6.38", "6.38"), ("a\n\nb", "a b"),
     ("http://a", "http:\\//a"), ("www.a", "www\\.a"), ("---", "\\---"), ("=== x", "\\=== x")],
)  # fmt: skip
def test_markup_is_escaped_and_numbers_are_not(text: str, expected: str):
    assert escaped(text) == expected


def test_a_fence_is_longer_than_any_inside():
    assert fenced("a ````` b").splitlines()[0] == "``````text" and fenced("a").splitlines()[0] == "```text"


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-5, 3e-4), (5900, 12800), (0, 1e12), (6.31, 6.33)])
def test_ticks_are_round_apart_evenly_and_told_apart(low: float, high: float):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6 and low - 1e-9 * abs(low) <= found[0] and found[-1] <= high * (1 + 1e-9)
    step = found[1] - found[0]
    assert np.allclose(np.diff(found), step)
    assert f"{step:e}"[0] in "125"
    labels = [tick_label(value, step) for value in found]
    assert len(set(labels)) == len(labels) and max(map(len, labels)) <= 8


def test_a_curve_lies_where_its_values_are():
    """The corners of the paths, turned back into values by the ticks' places."""
    chart = Chart("t", "step", "y", [Series("a", [(0.0, 10.0), (50.0, math.nan), (100.0, 30.0), (200.0, 20.0)])])
    svg = drawn(chart, 1)
    path = re.search(r'class="curve line c0" d="([^"]+)"', svg)[1]
    corners = [(kind, float(x), float(y)) for kind, x, y in re.findall(r"([ML])([\d.]+) ([\d.]+)", path)]
    assert [kind for kind, *_ in corners] == ["M", "M", "L"]
    x_ticks = [(float(at), float(label)) for at, label in
               re.findall(r'class="tick" x="([\d.]+)" y="237" text-anchor="middle">([\d.]+)<', svg)]  # fmt: skip
    y_ticks = [(float(at) - 4, float(label)) for at, label in
               re.findall(r'class="tick" x="62" y="([\d.]+)" text-anchor="end">([\d.]+)<', svg)]  # fmt: skip
    assert len(x_ticks) >= 3 and len(y_ticks) >= 3
    for known, place, values in ((x_ticks, 1, (0, 100, 200)), (y_ticks, 2, (10, 30, 20))):
        slope, offset = np.polyfit(*np.array(known).T, 1)
        found = [corner[place] * slope + offset for corner in corners]
        assert found == pytest.approx(values, abs=0.005 * max(values))
    assert 'role="img"' in svg and "a: 10 at step 0, 20 at 200, between 10 and 30" in svg
    assert table_of(chart).rows[0] == ["0", "10"] and sentence_of(chart)


def results(values: dict[str, list[float]], **settings: object) -> Results:
    tasks = {
        name: TaskResult(name, {"acc": mean_figure(found)}, "1", {"limit": None, **settings}, "data")
        for name, found in values.items()
    }
    return Results({"path": "x"}, tasks, {"torch": "9"}, ("python evaluate_model.py --tasks=t",))


def save(folder: Path, values: dict[str, list[float]], **settings: object) -> Path:
    write_results(folder, results(values, **settings))
    for name, found in values.items():
        write_samples(folder, name, ({"doc_id": n, "question": f"Q{n}", "acc": v} for n, v in enumerate(found)))
    return folder


def test_scores_stand_beside_others_and_differences_are_judged(tmp_path: Path):
    ours = [float(n % 3 == 0) for n in range(60)]
    # The other one errs in four more of the same questions.
    theirs = [value if n >= 12 else 0.0 for n, value in enumerate(ours)]
    run = a_run(tmp_path / "run")
    save(run / "eval" / "step-3", {"even": [0.0] * 30 + [1.0] * 30})
    save(run / "eval" / "step-7", {"even": ours, "odd": ours})
    other = save(tmp_path / "other", {"even": theirs})
    section = next(s for s in gather(run, [other]).sections if s.title == "Scores")
    table, differences = (block for block in section.blocks if isinstance(block, Table))
    mean = np.mean(ours)
    # Wilson's interval: the roots of (x - mean)^2 = z^2 x (1 - x) / n.
    square = 1.959964**2 / 60
    low, high = sorted(np.roots([1 + square, -2 * mean - square, mean**2]))
    assert table.header == ["task", "figure", "run, step 7", "other"]
    assert table.rows[0] == [
        "even", "acc ↑", f"{mean:.4g} [{low:.4g}, {high:.4g}], n=60",
        table.rows[0][3],
    ]  # fmt: skip
    assert table.rows[1][0] == "odd" and table.rows[1][3] == "–" and len(table.rows) == 2
    change = np.array(theirs) - np.array(ours)
    half = 1.96 * np.std(change, ddof=1) / math.sqrt(60)
    assert differences.rows == [["even", "acc", f"−{-change.mean():.4g} ± {half:.4g} (60 pairs): worse"]]
    # The intervals of the two overlap: only the pairs tell.
    first, second = mean_figure(ours), mean_figure(theirs)
    assert compared(first, second, []) == f"−{-change.mean():.4g}: not beyond noise, the intervals overlap"
    charts = [b for s in gather(run).sections for b in s.blocks if isinstance(b, Chart) and b.title == "even"]
    assert charts[0].series[0].points == [(3.0, 0.5), (7.0, float(mean))]


def test_figures_by_kinds_of_samples_stand_apart(tmp_path: Path):
    run = a_run(tmp_path / "run")
    figures = {"acc": Figure(0.5, 0.1, 9), "acc/8": Figure(0.25, 0.1, 4), "rate/s": Figure(7.0, None, 9)}
    write_results(run / "eval" / "step-7", Results({}, {"t": TaskResult("t", figures)}))
    section = next(s for s in gather(run).sections if s.title == "Scores")
    whole, parts = (block for block in section.blocks if isinstance(block, Table))
    assert [row[1] for row in whole.rows] == ["acc ↑", "rate/s ↑"] and not whole.folded
    assert [row[1] for row in parts.rows] == ["acc/8 ↑"] and parts.folded


def test_commands_do_not_tell_where_somebody_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path / "someone"))
    run = MadeRun(tmp_path / "someone" / "out" / "run", out_dir=str(tmp_path / "someone" / "out" / "run"))
    path = run.finish()
    results = Results({}, {}, {}, (f"python evaluate_model.py --model {path} --tasks zero",))
    write_results(path / "eval" / "step-1", results)
    card = gather(path)
    assert "--out_dir='~/out/run'" in training_command(read_run(path))
    assert "--model ~/out/run " in said(card, "The commands that reproduce it")
    assert "someone" not in to_page(card) and "someone" not in to_markdown(card)


def test_figures_that_cannot_be_compared_are_marked(tmp_path: Path):
    run = a_run(tmp_path / "run")
    save(run / "eval" / "step-7", {"even": [0.0, 1.0] * 9}, num_fewshot=0)
    other = save(tmp_path / "other", {"even": [0.0, 1.0] * 9}, num_fewshot=5)
    card = gather(run, [other])
    warning = next(remark for remark in card.remarks if "even" in remark)
    assert "cannot be compared" in warning and "num_fewshot=0" in warning and "num_fewshot=5" in warning
    section = next(s for s in card.sections if s.title == "Scores")
    assert [b.rows for b in section.blocks if isinstance(b, Table)][1] == [["even", "acc", "not measured alike"]]


@pytest.mark.parametrize(
    ("own", "other", "is_higher_better", "expected"),
    [((0.5, 0.01), (0.6, 0.01), True, "better"), ((0.5, 0.01), (0.6, 0.01), False, "worse"),
     ((0.5, 0.1), (0.6, 0.1), True, "not beyond noise"), ((0.5, None), (0.6, 0.1), True, "error unknown")],
)  # fmt: skip
def test_intervals_that_do_not_overlap_count(own: tuple, other: tuple, is_higher_better: bool, expected: str):
    figures = [Figure(*one, 100, is_higher_better) for one in (own, other)]
    assert expected in compared(*figures, [])


def test_a_mean_of_other_values_is_not_compared_by_pairs():
    pairs = [(0.0, 1.0), (1.0, 1.0), (0.0, 0.0)]
    assert "pairs" not in compared(Figure(2.0, 0.1, 3), Figure(3.0, 0.1, 3), pairs)
    assert paired([{"doc_id": 1, "acc": 1}], [{"doc_id": 2, "acc": 1}], "acc") == []
    both = [{"doc_id": 1, "filter": "a", "em": 1.0}, {"doc_id": 1, "filter": "b", "em": 0.0}]
    assert paired(both, both, "em,b") == [(0.0, 0.0)]


def test_good_and_bad_samples_are_shown_cut(tmp_path: Path):
    run = a_run(tmp_path / "run")
    folder = save(run / "eval" / "step-7", {"even": [0.0, 1.0]})
    records = [{"doc_id": 0, "acc": 1.0, "text": "right"}, {"doc_id": 1, "acc": 0.0, "text": "x" * 5000}]
    write_samples(folder, "even", records)
    section = next(s for s in gather(run).sections if s.title == "Samples")
    shown = {block.title: block for block in section.blocks if isinstance(block, Verbatim)}
    assert shown["step 3, after: Once"].text == "upon"
    assert "right" in shown["best by acc: 1"].text and shown["best by acc: 1"].tone == "good"
    assert "more characters" in shown["worst by acc: 0"].text and len(shown["worst by acc: 0"].text) < 3000


def test_faults_are_told(tmp_path: Path):
    path = a_run(tmp_path / "run")
    (path / "exit").mkdir()
    ended = {"rank": 1, "code": 1, "reason": "no memory", "step": 6, "time": 1.0}
    (path / "exit" / "rank-1.json").write_text(json.dumps(ended))
    (path / "ckpt" / "abandoned-step-6-1700000000").mkdir(parents=True)
    card = gather(path)
    section = next(s for s in card.sections if s.title == "Faults survived")
    (table,) = (block for block in section.blocks if isinstance(block, Table))
    assert [row[2:5] for row in table.rows] == [["0", "3", "0"], ["3", "6", "2"], ["4", "7", "0"]]
    assert [row[6] for row in table.rows] == [
        "stopped on request", "no end recorded: killed, or a crash", "finished"
    ]  # fmt: skip
    words = said(card, "Faults survived")
    assert "3 launches, of which 1 ended without saying why; 2 steps done again" in words
    assert "Rank 1 of the last launch ended with code 1: no memory" in words and "abandoned-step-6-1700000000" in words


def break_config(path: Path) -> str:
    (path / "config.yaml").write_text("a: [")
    return "config.yaml cannot be read"


def drop_config(path: Path) -> str:
    (path / "config.yaml").unlink()
    return "config.yaml is missing"


def drop_log(path: Path) -> str:
    (path / "reslog.jsonl").unlink()
    return "reslog.jsonl is missing"


def tear_log(path: Path) -> str:
    with (path / "reslog.jsonl").open("ab") as file:
        file.write(b'{"name": "train", "ti')
    return "lines that hold no record (1)"


def empty_log(path: Path) -> str:
    (path / "reslog.jsonl").write_text("")
    return "records no step yet"


def strange_log(path: Path) -> str:
    values = [None, "x", -1, 1e308, [], {}, True, "nan", 10**400]
    with (path / "reslog.jsonl").open("a") as file:
        for value in values:
            strange = {key: value for key in ("loss", "dt", "data_wait", "tokens", "mfu", "energy_j", "lr", "samples")}
            file.write(json.dumps({"name": "train", "time": 1.8e9, "step": 9} | strange) + "\n")
            for name in ("valid", "eval", "sample", "save", "save_failed", "eval_failed", "end"):
                more = {"dt": value, "figures": {"a": value}, "task": value, "prompt": value, "text": value,
                        "reason": value, "problem": value, "held_up": value, "seconds": value}  # fmt: skip
                file.write(json.dumps({"name": name, "time": 1.8e9, "step": 9} | more) + "\n")
            names = ("version", "world_size", "max_iters", "global_batch_size", "changed", "device", "commit", "data",
                     "samples_consumed", "flops_per_token", "versions")  # fmt: skip
            start = dict.fromkeys(names, value)
            file.write(json.dumps({"name": "start", "time": 1.8e9, "step": 9} | start) + "\n")
    return "format version"


def break_results(path: Path) -> str:
    (path / "eval" / "step-7").mkdir(parents=True)
    (path / "eval" / "step-7" / "results.json").write_text("{")
    return "holds no results of this version"


def break_monitor(path: Path) -> str:
    (path / "monitor").mkdir()
    (path / "monitor" / "status.json").write_text("[]")
    return ""


@pytest.mark.parametrize(
    "damage", [break_config, drop_config, drop_log, tear_log, empty_log, strange_log, break_results, break_monitor]
)
def test_what_is_damaged_is_told_and_the_rest_comes(damage, tmp_path: Path, capsys: pytest.CaptureFixture):
    path = a_run(tmp_path / "run")
    sentence = damage(path)
    assert main([str(path), "--output", str(tmp_path / "card")]) == 0
    said = capsys.readouterr()
    assert sentence in said.err and "Traceback" not in said.err
    page = (tmp_path / "card" / "report.html").read_text()
    assert sentence in Reader(page).text and len(page) > 4000


def test_a_run_that_goes_on_is_told(tmp_path: Path):
    run = MadeRun(tmp_path / "run")
    run.start()
    run.train([1])
    card = gather(run.finish())
    assert "going on, or killed; last sign of life 2023-11-14" in dict(card.summary.rows)["state"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nothing"], "nothing does not exist"),
        (["folder"], "folder is not a run directory"),
        (["run", "--beside", "folder"], "folder holds no results.json"),
        (["run", "--beside", "gone"], "gone does not exist"),
    ],
)
def test_no_run_is_one_sentence(
    arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    a_run(Path("run"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not Path("run/report.md").exists()


def test_a_card_needs_no_torch():
    code = "import sys, evaluation.report.command; print('torch' in sys.modules)"
    root = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
