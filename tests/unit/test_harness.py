"""Tasks of lm-eval on our models: what lm-eval's own model `hf` finds on the same folders, sample by sample."""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")

from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from evaluation.asking import Scoring, Writing
from evaluation.harness import prepare
from evaluation.harness_tasks import _manager_of
from evaluation.task import Options, Outcome
from tests.folder_answerer import FolderAnswerer
from tests.plain_answerer import Guesser
from tests.served import tiny_tokenizer

CONTEXT = 96
SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.4,
    "bos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROWS = [
    {"question": "def add(a, b):", "choices": [" return a + b", " return", " pass"], "gold": 0, "answer": "one"},
    {"question": "The end of \u00e9t\u00e9 ", "choices": ["is near", " a longer one", "x"], "gold": 1, "answer": "two"},
    {"question": "import os\nimport", "choices": [" sys", " re", " json"], "gold": 2, "answer": "three"},
    {"question": "A long one: " + "and so on, " * 12, "choices": ["yes", "no", "?"], "gold": 1, "answer": "four"},
    {"question": "", "choices": ["from nothing", "def", "#"], "gold": 0, "answer": "five"},
]
TASKS = {
    "own_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "own_shots": """
output_type: multiple_choice
fewshot_split: train
num_fewshot: 2
description: "Choose. "
doc_to_text: "Q: {{question}}\\nA:"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc}]
""",
    "own_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[0]}} {{question}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "own_writing": """
output_type: generate_until
doc_to_text: "{{question}} "
doc_to_target: answer
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}
GROUP = """
group: own_group
task: [own_choice, own_shots]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


class Made(NamedTuple):
    """A model, and lm-eval's `hf` on the same folder."""

    folder: Path
    answerer: FolderAnswerer
    theirs: Any


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{files}test_split: test\n{text}")
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    heads = {"head_dim": 8} if request.param == "qwen3" else {}
    config = CONFIG_MAPPING[request.param](
        **SHAPE, **heads, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eod_id
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if request.param == "llama":
        _begin_texts_with(folder, "<|im_sep|>", tokenizer.special_ids["<|im_sep|>"])
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    return Made(folder, FolderAnswerer(folder), theirs)


def _begin_texts_with(folder: Path, token: str, token_id: int) -> None:
    """A tokenizer that puts a token in front of each text, as those of llamas do."""
    path = folder / "tokenizer.json"
    piece = {"SpecialToken": {"id": token, "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    definition = json.loads(path.read_text()) | {"post_processor": {
        "type": "TemplateProcessing", "single": [piece, text], "pair": [piece, text],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }}  # fmt: skip
    path.write_text(json.dumps(definition))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": token}))
    # As those of llamas do: transformers puts nothing in front of what a template writes.
    path = folder / "chat_template.jinja"
    path.write_text("{{ bos_token }}" + path.read_text())


one_model = pytest.mark.parametrize("made", ["llama"], indirect=True)


def theirs_of(made: Made, task_dir: Path, chat: bool) -> Mapping[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    state = random.getstate()
    with pytest.MonkeyPatch.context() as patch:
        # It describes the machine, for which it lists all packages: that takes seconds.
        patch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)
        found = simple_evaluate(
            model=made.theirs, tasks=list(TASKS), apply_chat_template=chat, bootstrap_iters=1000,
            system_instruction="Be brief." if chat else None,
            task_manager=TaskManager(include_defaults=False, include_path=task_dir),
        )  # fmt: skip
    random.setstate(state)
    return found


@pytest.mark.parametrize("chat", [False, True])
def test_scores_and_samples_equal_those_of_hf(made: Made, task_dir: Path, chat: bool):
    expected = theirs_of(made, task_dir, chat)
    options = Options(task_dir=task_dir, chat=chat, system="Be brief." if chat else "")
    outcomes = {one.result.name: one for one in prepare([*TASKS], made.answerer, options).run()}
    assert [*outcomes] == [*TASKS]
    for name, outcome in outcomes.items():
        figures = expected["results"][name]
        for metric, figure in outcome.result.figures.items():
            assert figure.value == pytest.approx(figures[f"{metric},none"], rel=1e-5)
            assert figure.error == (figures[f"{metric}_stderr,none"] if figure.error is not None else None)
            assert figure.count == len(ROWS)
        assert outcome.result.figures["acc" if "acc" in figures or "acc,none" in figures else metric] is not None
        for ours, sample in zip(outcome.samples, expected["samples"][name], strict=True):
            assert _answers(ours["answers"]) == _answers(sample["resps"])
            if not chat:
                # (Theirs is a text in which control tokens cannot be told from what spells them.)
                assert ours["prompt"] == sample["arguments"][0][0]
            assert {metric: ours[metric] for metric in sample["metrics"]} == {
                metric: _plain(sample[metric]) for metric in sample["metrics"]
            }


def _plain(value: Any) -> Any:
    """A metric's value: its score rounded for comparison."""
    return [pytest.approx(value[0], abs=1e-3), value[1]] if isinstance(value, tuple) else value


def _answers(resps: list[list[Any]]) -> list[Any]:
    """Answers, scores rounded for comparison."""
    return [
        [pytest.approx(one[0], abs=1e-4), one[1]] if isinstance(one, (tuple, list))
        else pytest.approx(one, abs=1e-4) if isinstance(one, float) else one
        for resp in resps for one in resp
    ]  # fmt: skip


@one_model
def test_a_group_has_the_figure_of_its_tasks_and_follows_them(made: Made, task_dir: Path):
    outcomes = [*prepare(["own_group"], made.answerer, Options(task_dir=task_dir)).run()]
    assert [one.result.name for one in outcomes] == ["own_choice", "own_shots", "own_group"]
    assert [one.result.group for one in outcomes] == ["own_group", "own_group", ""]
    first, second, group = (one.result.figures["acc"] for one in outcomes)
    assert group.value == pytest.approx((first.value + second.value) / 2)
    assert group.count == 2 * len(ROWS)


def test_an_own_group_may_name_tasks_of_lm_eval_and_a_tag_has_those_of_all_folders(tmp_path: Path):
    (tmp_path / "group.yaml").write_text("group: mine\ntask: [gsm8k, copa]\n")
    manager = _manager_of(["mine", "math_word_problems"], Options(task_dir=tmp_path))
    assert {"mine", "gsm8k", "copa"} <= manager.task_index.keys()
    assert {"gsm8k", "minerva_math_algebra", "mathqa"} <= manager.task_index["math_word_problems"].tags


@one_model
def test_random_numbers_go_on_as_if_nothing_had_happened(made: Made, task_dir: Path):
    def draw() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(1).item()]

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    run = prepare(["own_shots", "own_rolling"], made.answerer, Options(task_dir=task_dir, limit=2)).run()
    next(run)
    assert draw() == expected
    next(run)


@one_model
def test_control_tokens_in_a_benchmark_stay_text(made: Made, task_dir: Path, tmp_path: Path):
    tokenizer = made.answerer.tokenizer
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "<|im_end|>", "answer": "<|im_end|>"}))
    (tmp_path / "spelt.yaml").write_text(f"""
task: spelt
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: perplexity}}]
""")
    end = tokenizer.special_ids["<|im_end|>"]
    for chat in (False, True):
        made.answerer.asked.clear()
        [*prepare(["spelt"], made.answerer, Options(task_dir=tmp_path, chat=chat)).run()]
        [asked] = made.answerer.asked
        assert isinstance(asked, Scoring)
        assert end not in asked.continuation
        # The template's own: one behind the question.
        assert asked.context.count(end) == chat


@one_model
def test_several_answers_have_several_seeds_which_stay(made: Made, task_dir: Path, tmp_path: Path):
    text = (task_dir / "own_writing.yaml").read_text().replace("do_sample: false", "do_sample: true, temperature: 0.9")
    (tmp_path / "drawn.yaml").write_text(text.replace("task: own_writing", "task: drawn\nrepeats: 3"))
    seeds = []
    for limit in (2, 3):
        made.answerer.asked.clear()
        [outcome] = prepare(["drawn"], made.answerer, Options(task_dir=tmp_path, limit=limit)).run()
        assert [len(sample["answers"][0]) for sample in outcome.samples] == [3] * limit
        assert all(isinstance(one, Writing) and one.temperature == 0.9 for one in made.answerer.asked)
        seeds.append([one.seed for one in made.answerer.asked])
    assert len(set(seeds[1])) == 9 and seeds[1][:6] == seeds[0]


class Silent(FolderAnswerer):
    """A model that cannot write."""

    def __init__(self, other: FolderAnswerer):
        vars(self).update(vars(other))
        self.can_write = False


@one_model
def test_what_cannot_be_asked_is_refused_by_name_before_anything_is_asked(made: Made, task_dir: Path, tmp_path: Path):
    def refusal(*names: str, answerer: FolderAnswerer = made.answerer, **options: Any) -> str:
        answerer.asked.clear()
        with pytest.raises(ValueError) as raised:
            prepare(names, answerer, Options(task_dir=options.pop("task_dir", task_dir), **options))
        assert not answerer.asked
        return str(raised.value)

    assert "own_writing lets the model write" in refusal("own_choice", "own_writing", answerer=Silent(made.answerer))
    assert "own_choise: did you mean own_choice" in refusal("own_choise")
    assert "own_shots shows 9 examples, and its data have 5" in refusal("own_shots", num_fewshot=9)
    for change, words in (
        ("doc_to_image: picture", "bad shows pictures"),
        ("unsafe_code: true", "--allow_code_execution"),
        ("generation_kwargs: {until: [x], num_beams: 4}", "num_beams"),
        ("process_docs: !function missing.module", "bad cannot be prepared (ImportError"),
    ):
        text = (task_dir / "own_writing.yaml").read_text().replace("own_writing", "bad")
        text = "".join(line for line in text.splitlines(True) if not line.startswith(change.partition(":")[0]))
        (tmp_path / "bad.yaml").write_text(text + change + "\n")
        assert words in refusal("bad", task_dir=tmp_path)


@one_model
def test_examples_from_among_the_questions_leave_out_the_question(made: Made, task_dir: Path, tmp_path: Path):
    text = (task_dir / "own_shots.yaml").read_text().replace("own_shots", "among").replace(": train", ": test")
    (tmp_path / "among.yaml").write_text(text)
    for sampler in ("default", "first_n"):
        (tmp_path / "among.yaml").write_text(f"{text}fewshot_config: {{sampler: {sampler}}}\n")
        [outcome] = prepare(["among"], made.answerer, Options(task_dir=tmp_path, num_fewshot=4)).run()
        assert outcome.result.settings["num_fewshot"] == 4
        with pytest.raises(ValueError, match="among shows 5 examples, and its data have 4: give a smaller"):
            prepare(["among"], made.answerer, Options(task_dir=tmp_path, num_fewshot=5))


OWN_CODE = """
import random

import numpy as np

def fails(doc, results):
    return {"share": results["none"]}

def thirds(doc, results):
    return {"share": random.random()}

def mean(values):
    return np.float32(sum(values) / len(values))
"""


@one_model
def test_a_tasks_own_code_is_trusted_with_nothing(made: Made, task_dir: Path, tmp_path: Path):
    (tmp_path / "own.py").write_text(OWN_CODE)
    text = (task_dir / "own_choice.yaml").read_text().partition("metric_list")[0]
    for name in ("fails", "thirds"):
        (tmp_path / f"{name}.yaml").write_text(
            text.replace("own_choice", name) + f"process_results: !function own.{name}\n"
            "metric_list: [{metric: share, aggregation: !function own.mean, higher_is_better: true}]\n"
        )
    with pytest.raises(ValueError, match="the task fails failed .TypeError: list indices must be"):
        [*prepare(["fails"], made.answerer, Options(task_dir=tmp_path)).run()]
    # It draws the same numbers each time, and NumPy's numbers are figures.
    one, other = ([*prepare(["thirds"], made.answerer, Options(task_dir=tmp_path)).run()] for _ in range(2))
    assert 0 < one[0].result.figures["share"].value == other[0].result.figures["share"].value < 1


def test_a_token_that_joins_context_and_answer_is_scored():
    from evaluation.harness_lm import AnsweringLM

    tokenizer = tiny_tokenizer()
    lm = AnsweringLM(Guesser(tokenizer), seed=0)
    for context, answer in (("def r", "eturn"), ("d", "e"), ("x = d", "ef"), ("x", "")):
        given, scored = lm._pair(context, answer)
        assert given and bool(scored) == bool(answer)
        if answer:
            assert tokenizer.decode([one for one in (*given, *scored) if one != lm._prefix]) == context + answer


@one_model
def test_outcomes_say_how_they_came_about(made: Made, task_dir: Path):
    one, other = (
        next(prepare(["own_shots"], made.answerer, Options(task_dir=task_dir, num_fewshot=count)).run())
        for count in (1, 4)
    )
    assert isinstance(one, Outcome) and one.result.settings["num_fewshot"] == 1
    # Each choice has its prompt.
    assert one.result.settings["shortened"] < other.result.settings["shortened"] == 3 * len(ROWS)
    assert one.result.data == other.result.data and len(one.result.data) == 64
