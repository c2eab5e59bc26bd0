"""Programs that a model wrote: which count as right, and that nothing runs them outside the sandbox."""

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="needs requirements-eval.txt")

from evaluation import code_tasks, sandbox
from evaluation.asking import Written
from evaluation.harness import prepare
from evaluation.task import Options
from tests.plain_answerer import Oracle
from tests.served import tiny_tokenizer

ROWS = [
    {"task_id": f"HumanEval/{number}", "prompt": f"def f(a):\n    '''Add {number}.'''\n", "entry_point": "f",
     "canonical_solution": f"    return a + {number}\n",
     "test": f"def check(candidate):\n    assert candidate(1) == {number + 1}\n"}
    for number in range(3)
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def contained() -> None:
    try:
        sandbox.run("pass")
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval/HumanEval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


@pytest.mark.parametrize("count, correct, k", [(1, 0, 1), (1, 1, 1), (5, 2, 3), (6, 1, 4), (4, 4, 2), (5, 3, 3)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_program(count: int, correct: int, k: int):
    programs = [True] * correct + [False] * (count - correct)
    draws = [any(draw) for draw in itertools.combinations(programs, k)]
    assert code_tasks.pass_at_k(count, correct, k) == pytest.approx(sum(draws) / len(draws))


def test_the_scorer_has_the_form_of_the_hubs():
    scores, details = code_tasks.CodeEval().compute(
        references=["assert f() == 1", "assert f() == 2"],
        predictions=[["def f(): return 1", "def f(): return 2"], ["def f(): return 1", "import os; os._exit(0)"]],
        k=[1, 2, 4],
    )
    assert scores == {"pass@1": 0.25, "pass@2": 0.5}
    assert [[one["passed"] for _, one in found] for found in details.values()] == [[True, False], [False, False]]
    assert details[1][1][1]["reason"] == "it left before its end"


def test_humaneval_keeps_its_prompts_and_is_scored_in_the_sandbox(data_dir: Path):
    asked = []

    class Coder(Oracle):
        def write(self, writings):
            asked.extend(writings)
            answers = [ROWS[0]["canonical_solution"], "    return a\n", "    raise SystemExit(0)\n"]
            yield from ((place, Written(answers[place], True)) for place in range(len(writings)))

    answerer = Coder(tiny_tokenizer(), [], context=2048)
    [outcome] = prepare(["humaneval"], answerer, Options(data_dir=data_dir, allow_code_execution=True)).run()
    assert outcome.result.figures["pass@1,create_test"][:3] == (pytest.approx(1 / 3), pytest.approx(1 / 3), 3)
    assert [one["programs"][0]["passed"] for one in outcome.samples] == [True, False, False]
    assert [one["programs"][0]["reason"] for one in outcome.samples] == ["", "AssertionError", "it left before its end"]
    assert [one["prompt"] for one in outcome.samples] == [row["prompt"] for row in ROWS]
    assert "\ndef" in asked[0].stop and asked[0].most == 1024


def test_programs_need_to_be_allowed_and_tasks_to_use_the_sandbox(data_dir: Path):
    answerer = Oracle(tiny_tokenizer(), [])
    with pytest.raises(ValueError, match="humaneval runs programs that the model writes: allow it by --allow_code_exe"):
        prepare(["humaneval"], answerer, Options(data_dir=data_dir))
    task = data_dir / "own.yaml"
    task.write_text(f"""
task: own_code
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data_dir}/humaneval/HumanEval.jsonl}}}}
test_split: test
output_type: generate_until
unsafe_code: true
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{test}}}}"
metric_list: [{{metric: exact_match}}]
""")
    with pytest.raises(ValueError, match="own_code runs programs by code of its own, outside the sandbox"):
        prepare(["own_code"], answerer, Options(task_dir=data_dir, allow_code_execution=True))
