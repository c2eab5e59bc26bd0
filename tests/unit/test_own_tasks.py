"""Tasks without downloads: their makers, their figures, and what one who knows, guesses or is small gets."""

import json
import math
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation import sandbox
from evaluation.answering import answerer_of
from evaluation.asking import Score, Written
from evaluation.own import TASKS, arithmetic, bits_per_byte, completion, copying, formats, needle, stopping, template
from evaluation.own.documents import DOMAINS, documents
from evaluation.own.outcomes import fingerprint
from evaluation.own.questions import Asker, fits
from evaluation.own.rolling import windows
from evaluation.running import evaluate
from evaluation.task import Options, Outcome
from model import Decoder, ModelConfig
from model.config import padded_vocab_size
from serving.loading import Served, Speech
from tests.plain_answerer import Guesser, Oracle, PlainAnswerer
from tests.served import tiny_tokenizer
from tests.unit.test_chat_template import BRACKETS, THINKS, TRIMS, WITH_TOOLS, with_template
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of

OPTIONS = Options()
PARTS = ("domain", "length", "share", "digits", "operation", "kind", "form")
GOLDEN = {
    "documents": "886fa0950c220931",
    "completion": "8f043ae5972a4b0b",
    "copying": "f48e1cefea29561c",
    "needle": "af316d9a0e4309f6",
    "arithmetic": "0b1061d33126a375",
    "stopping": "e6fedcc3ee16f23f",
    "format": "e747676b40d96775",
    "template": "756f40e47c7f8d27",
}
"""Digests of the questions. Who changes questions raises the task's version, too."""
SPELLING = template.Spelling("<U>", "<A>", "<E>", "<D>", "<U>Hello.<E>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


def made() -> dict[str, object]:
    """Plain data of all questions that are the same on every machine."""
    needles = [needle.needle(share, number, 600, len) for share in needle.SHARES for number in range(4)]
    return {
        "documents": [list(one) for one in documents() if one.domain not in ("python", "prose")],
        "completion": [list(one) for one in completion.questions()],
        "copying": copying.questions(1, OPTIONS.seed),
        "needle": needles,
        "arithmetic": arithmetic.questions(4, OPTIONS.seed),
        "stopping": stopping.questions(),
        "format": [[one.form.name, one.text, one.answer] for one in formats.questions(2, OPTIONS.seed)],
        "template": [[one.kind, [[m.role, m.text] for m in one.messages]] for one in template.questions(SPELLING)],
    }


def known_texts(name: str, tokenizer: Tokenizer, chat: bool = False) -> list[str]:
    """What one has to know to answer all questions of a task."""
    if name == "zero_copying":
        pairs = [(one.text, f" {one.choices[one.right]}\n") for one in copying.questions(1, OPTIONS.seed)]
        instruction = "Copy the last text. Answer with the copy alone."
    elif name == "zero_arithmetic":
        pairs = [(one.text, f" {one.answer}\n") for one in arithmetic.questions(4, OPTIONS.seed)]
        instruction = "Compute the last line. Answer with the number alone."
    elif name == "zero_format":
        pairs = [(one.text, f"{one.answer}\n\n") for one in formats.questions(2, OPTIONS.seed)]
        instruction = "Answer the last question in the form of the examples, and say nothing else."
    elif name == "zero_completion":
        pairs = [(one.header, one.body) for one in completion.questions()]
        instruction = "Complete this Python function. Answer with its whole source alone."
        if chat:
            pairs = [(header, f"```python\n{header}{body}```") for header, body in pairs]
    else:
        assert name == "zero_stopping"
        if not chat:
            return [f"{one.document}<|endoftext|>" for one in stopping.questions()]
        pairs, instruction = [(one.question, one.answer) for one in stopping.questions()], ""
    if not chat:
        return [question + answer for question, answer in pairs]
    before = f"{instruction}\n\n" if instruction else ""
    talks = [[Message("user", before + question), Message("assistant", answer.strip())] for question, answer in pairs]
    return [tokenizer.decode(template_of(tokenizer).render(talk).ids) for talk in talks]


class KnowsNeedles(Oracle):
    """One who finds the fact in the text itself."""

    def __init__(self, tokenizer: Tokenizer):
        super().__init__(tokenizer, ())

    def score(self, asked):
        for place, one in enumerate(asked):
            text = self.tokenizer.decode(one.context + one.continuation).strip()
            yield place, Score(0.0 if text.count(text.rpartition("\n")[2]) == 2 else -9.0, False)


class SaysTheLast(Oracle):
    """One who says the number that it has read last."""

    def score(self, asked):
        for place, one in enumerate(asked):
            text = self.tokenizer.decode(one.context + one.continuation).strip()
            yield place, Score(float(text.index(text[-3:])) - len(text), False)


def values(outcome: Outcome) -> dict[str, float]:
    return {name: figure.value for name, figure in outcome.result.figures.items()}


def test_questions_are_the_same_on_every_machine():
    assert {name: fingerprint(data) for name, data in made().items()} == GOLDEN


def test_all_tasks_keep_the_contract():
    assert all(name == task.name and name.startswith("zero_") and task.version for name, task in TASKS.items())
    assert [name for name, task in TASKS.items() if task.needs_writing] == [
        "zero_completion", "zero_format", "zero_template"
    ]  # fmt: skip
    assert not any(task.runs_code for task in TASKS.values())
    # Those that show examples, and no others, ask something else with more of them.
    for name, task in TASKS.items():
        assert task.takes_examples == (name in ("zero_copying", "zero_arithmetic", "zero_format"))


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
@pytest.mark.parametrize("name", ["zero_copying", "zero_arithmetic", "zero_format", "zero_completion", "zero_stopping"])
def test_one_who_knows_is_always_right_and_one_who_knows_nothing_never(name: str, chat: bool, tokenizer: Tokenizer):
    options = replace(OPTIONS, chat=chat)
    outcome = TASKS[name].run(Oracle(tokenizer, known_texts(name, tokenizer, chat)), options)
    assert outcome.result.settings["chat"] is chat and "left_out" not in outcome.result.settings
    found = values(outcome)
    low = {one: value for one, value in found.items() if one.split("/")[0] in ("bits", "early_end_probability")}
    assert all(value < 1e-9 for value in low.values()), low
    gain = {one: value for one, value in found.items() if one.split("/")[0] == "gain"}
    assert all(value > 1.0 for value in gain.values()) and bool(gain) == (name == "zero_copying")
    assert all(value == pytest.approx(1.0) for one, value in found.items() if one not in {*low, *gain}), found
    ignorant = values(TASKS[name].run(Oracle(tokenizer, ()), options))
    bad = {one: value for one, value in ignorant.items() if one.startswith(("exact", "format", "parses", "end_p"))}
    assert bad and all(value < 1e-9 for value in bad.values()), bad


def test_one_who_finds_the_fact_and_one_who_says_the_last(tokenizer: Tokenizer):
    found = values(TASKS["zero_needle"].run(KnowsNeedles(tokenizer), OPTIONS))
    assert found == {"acc": 1.0, **{f"acc/{share}": 1.0 for share in needle.SHARES}}
    always_last = values(TASKS["zero_needle"].run(SaysTheLast(tokenizer, ()), OPTIONS))
    assert len(always_last) == 5 and all(abs(value - 0.25) < 0.25 for value in always_last.values())


@pytest.mark.parametrize("name", ["zero_copying", "zero_needle", "zero_stopping"])
def test_one_who_guesses_is_at_chance(name: str, tokenizer: Tokenizer):
    outcomes = [TASKS[name].run(Guesser(tokenizer, 512, seed), OPTIONS) for seed in range(4)]
    found = [outcome.result.figures["acc"] for outcome in outcomes]
    error = statistics.mean(figure.error for figure in found) / math.sqrt(len(found))
    chance = outcomes[0].result.settings["chance"]["acc"]
    assert abs(statistics.mean(figure.value for figure in found) - chance) < 3.5 * error
    if name == "zero_copying":
        assert abs(outcomes[0].result.figures["gain"].value) < 3.5 * outcomes[0].result.figures["gain"].error


@pytest.mark.parametrize("context", [64, 256])
def test_a_small_random_model_is_asked_everything_that_fits(context: int, tokenizer: Tokenizer):
    config = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)
    model = Decoder(config.resolve(padded_vocab_size(tokenizer.vocab_size), context)).eval()
    model.initialize(0)
    served = Served(model, Speech(tokenizer, frozenset([tokenizer.eod_id]), {}))
    limit = 12
    for chat in (False, True):
        options = Options(limit=limit, chat=chat)
        for result, samples in evaluate(["zero"], answerer_of(served), options):
            assert len(samples) == limit and result.settings["limit"] == limit and result.data
            json.dumps([result.settings, samples], allow_nan=False)
            left_out = [sample for sample in samples if "left_out" in sample]
            assert len(left_out) == result.settings.get("left_out", 0)
            assert bool(result.figures) == (len(left_out) < limit) == ("reason" not in result.settings)
            assert all(math.isfinite(figure.value) for figure in result.figures.values())
            if result.name == "zero_bits_per_byte" or (context, result.name) == (256, "zero_arithmetic"):
                assert result.figures, result.name


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_one_by_one_gives_the_same(chat: bool, tokenizer: Tokenizer):
    config = ModelConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.3)
    model = Decoder(config.resolve(padded_vocab_size(tokenizer.vocab_size), 256)).eval()
    model.initialize(0)
    served = Served(model, Speech(tokenizer, frozenset([tokenizer.eod_id]), {}))
    options = Options(limit=2, chat=chat)
    plain = list(evaluate(["zero"], PlainAnswerer(model, tokenizer, 256), options))
    for ours, theirs in zip(evaluate(["zero"], answerer_of(served), options), plain, strict=True):
        assert values(ours) == pytest.approx(values(theirs), rel=1e-4)
        for one, other in zip(ours.samples, theirs.samples, strict=True):
            assert one.get("written") == other.get("written")


@pytest.mark.parametrize("name", TASKS)
def test_figures_are_those_of_the_records(name: str, tokenizer: Tokenizer):
    outcome = TASKS[name].run(Guesser(tokenizer), OPTIONS)
    assert outcome.result.figures and len(outcome.samples) == len({json.dumps(sample) for sample in outcome.samples})
    for metric, figure in outcome.result.figures.items():
        field, _, part = metric.partition("/")
        counted = [one for one in outcome.samples if not part or part in (str(one.get(key)) for key in PARTS)]
        counted = [one for one in counted if "left_out" not in one]
        if name == "zero_bits_per_byte":
            expected = sum(one["bits"] for one in counted) / sum(one["bytes"] for one in counted)
        else:
            expected = statistics.mean(one[field] for one in counted)
            error = statistics.stdev(one[field] for one in counted) / math.sqrt(len(counted))
            assert figure.error == pytest.approx(error)
        assert figure.value == pytest.approx(expected) and figure.count == len(counted), metric


@pytest.mark.parametrize("name", TASKS)
def test_the_order_of_answers_does_not_count(name: str, tokenizer: Tokenizer):
    class Shuffled(Guesser):
        def score(self, asked):
            return mixed(super().score(asked))

        def write(self, asked):
            return mixed(super().write(asked))

    def mixed(answers: Iterator) -> list:
        found = list(answers)
        random.Random(1).shuffle(found)
        return found

    plain, shuffled = (TASKS[name].run(kind(tokenizer), OPTIONS) for kind in (Guesser, Shuffled))
    assert shuffled.samples == plain.samples
    assert replace(shuffled.result, seconds=0.0) == replace(plain.result, seconds=0.0)


@pytest.mark.parametrize("name", ["zero_copying", "zero_arithmetic", "zero_stopping"])
def test_one_who_cannot_write_is_scored_alike(name: str, tokenizer: Tokenizer):
    writes, does_not = Guesser(tokenizer), Guesser(tokenizer)
    does_not.can_write = False
    whole, part = (TASKS[name].run(one, OPTIONS).result.figures for one in (writes, does_not))
    assert part == {metric: figure for metric, figure in whole.items() if not metric.startswith(("exact", "ends"))}
    assert len(part) < len(whole)


def test_fewshot_and_seed_change_the_examples_alone():
    for questions in (copying.questions, arithmetic.questions, formats.questions):
        two, other, none = questions(2, 1), questions(2, 2), questions(0, 1)
        assert two != other
        for one, another, bare in zip(two, other, none, strict=True):
            assert one.text.endswith(bare.text) and another.text.endswith(bare.text)
    with pytest.raises(ValueError, match="has 32 examples, not --num_fewshot=33"):
        arithmetic.questions(33, 1)


def test_copies_are_four_different_texts_of_one_length():
    for one in copying.questions(1, 5):
        assert len(set(one.choices)) == 4 and len({len(choice.split(", ")) for choice in one.choices}) == 1
    assert {one.right for one in copying.questions(1, 5)} == {0, 1, 2, 3}


def test_sums_are_right_and_new():
    for one in arithmetic.questions(4, 5):
        *examples, asked = one.text.split("\n")
        assert len({asked, *(line.rpartition(" ")[0] for line in examples)}) == 5
        for line in [*examples, f"{asked} {one.answer}"]:
            first, sign, second, _, result = line.split()
            assert sign == one.sign and len(first) == len(second) == one.digits
            assert {"+": int(first) + int(second), "-": int(first) - int(second), "*": int(first) * int(second)}[
                sign
            ] == int(result) >= 0


def test_a_needle_fills_its_share_of_the_context(tokenizer: Tokenizer):
    answerer = Guesser(tokenizer, 512)
    asked = []
    answerer.score = lambda found: (asked.extend(found), Guesser.score(answerer, found))[1]
    outcome = TASKS["zero_needle"].run(answerer, OPTIONS)
    lengths = [len(one.context) + len(one.continuation) for one in asked[::4]]
    shares = [sample["share"] for sample in outcome.samples if "left_out" not in sample]
    assert len(lengths) == len(shares) > 40
    for length, share in zip(lengths, shares):
        most = 512 * int(share[:-1]) // 100
        assert most - 40 < length <= most + 1
    assert outcome.result.settings["distances"]["100%"] > 300


@pytest.mark.parametrize(("length", "context"), [(1, 8), (8, 8), (9, 8), (16, 8), (21, 8), (50, 7)])
def test_windows_are_those_of_lm_eval(length: int, context: int):
    ids = list(range(100, 100 + length))
    found = list(windows(ids, [1], context))
    assert [token for one in found for token in one.continuation] == ids
    assert all(fits(one, context) for one in found)
    utils = pytest.importorskip("lm_eval.utils", reason="needs requirements-eval.txt")
    theirs = map(utils.make_disjoint_window, utils.get_rolling_token_windows(ids, 1, context, 1))
    assert [(list(one.context), list(one.continuation)) for one in found] == list(theirs)


def test_bits_per_byte_of_one_who_knows_the_texts_and_one_who_finds_each_byte_equally_likely(tokenizer: Tokenizer):
    class Uniform(Guesser):
        def score(self, asked):
            for place, one in enumerate(asked):
                length = len(tokenizer.decode(one.continuation).encode("utf-8", "replace"))
                yield place, Score(-math.log(256) * length * self._seed, False)

    task = TASKS["zero_bits_per_byte"]
    assert set(values(task.run(Uniform(tokenizer, seed=0), OPTIONS)).values()) == {0.0}
    outcome = task.run(Uniform(tokenizer, context=100_000, seed=1), OPTIONS)
    assert list(outcome.result.figures) == ["bits_per_byte", *(f"bits_per_byte/{domain}" for domain in DOMAINS)]
    for figure in outcome.result.figures.values():
        assert figure.value == pytest.approx(8.0) and figure.error == pytest.approx(0.0, abs=1e-6)


def test_the_errors_of_bits_per_byte_are_those_of_redrawn_documents():
    rng = random.Random(3)
    sizes = [rng.randrange(100, 900) for _ in range(40)]
    samples = [{"bytes": size, "bits": size * rng.gauss(2, 0.3)} for size in sizes]
    figure = bits_per_byte.ratio(samples)
    redrawn = [bits_per_byte.ratio(rng.choices(samples, k=40)).value for _ in range(3000)]
    assert figure.value == pytest.approx(statistics.mean(redrawn), rel=0.01)
    assert figure.error == pytest.approx(statistics.stdev(redrawn), rel=0.1)
    # Domains differ, and are never redrawn.
    domains = [samples, [{**one, "bits": one["bits"] * 5} for one in samples[::2]]]
    whole = sum(one["bytes"] for domain in domains for one in domain)
    shares = [sum(one["bytes"] for one in domain) / whole for domain in domains]
    redrawn = [
        sum(share * bits_per_byte.ratio(rng.choices(one, k=len(one))).value for share, one in zip(shares, domains))
        for _ in range(3000)
    ]  # fmt: skip
    figure = bits_per_byte.overall(domains)
    assert figure.value == pytest.approx(bits_per_byte.ratio([*domains[0], *domains[1]]).value) and figure.count == 60
    assert figure.error == pytest.approx(statistics.stdev(redrawn), rel=0.1)


def test_a_users_texts_are_a_domain_and_change_no_other(tokenizer: Tokenizer, tmp_path: Path):
    folder = tmp_path / "mine"
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_bytes(b"\xff")
    (folder / "a.txt").write_text("one two")
    (folder / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    task = TASKS["zero_bits_per_byte"]
    plain = task.run(Guesser(tokenizer), OPTIONS).result
    outcome = task.run(Guesser(tokenizer), replace(OPTIONS, texts={"mine": folder, "one": folder / "a.txt"}))
    mine = [(one["document"], one["begins"], one["bytes"]) for one in outcome.samples if one["domain"] == "mine"]
    assert mine == [("a.txt", "one two", 7), ("b.jsonl line 1", "three", 5), ("b.jsonl line 3", "four", 4)]
    figures = dict(outcome.result.figures)
    assert figures.pop("bits_per_byte/mine").count == 3 and figures.pop("bits_per_byte/one").count == 1
    assert figures == plain.figures and outcome.result.data != plain.data
    few = task.run(Guesser(tokenizer), replace(OPTIONS, limit=2, texts={"mine": folder})).samples
    assert [one["domain"] for one in few] == ["python", "prose", "mine", "mine"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: {"python": path}, "python is a domain of ours"),
        (lambda path: {"mine": path / "missing"}, "missing does not exist"),
        (lambda path: {"mine": path}, "there is no text"),
        (lambda path: {"mine": written(path / "a.bin", b"\xff\x00")}, "a.bin is not text in UTF-8"),
        (lambda path: {"mine": written(path / "a.jsonl", b'{"text": "a"}\n{"texts": 1}\n')}, "a.jsonl line 2 must be"),
        (lambda path: {"mine": written(path / "a.jsonl", b'{"text": "\\ud800"}\n')}, "a.jsonl line 1 must be"),
    ],
)
def test_a_users_text_that_cannot_be_used(
    make: Callable[[Path], dict[str, Path]], sentence: str, tokenizer: Tokenizer, tmp_path: Path
):
    with pytest.raises(ValueError, match=sentence):
        TASKS["zero_bits_per_byte"].run(Guesser(tokenizer), replace(OPTIONS, texts=make(tmp_path)))


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_the_functions_bodies_pass_their_doctests():
    """Without the sandbox: these are ours."""
    import doctest

    from evaluation.own import functions

    done = doctest.testmod(functions)
    assert not done.failed and done.attempted > 50
    names = [one.name for one in completion.questions()]
    assert len(set(names)) == len(names) > 30


def test_a_function_counts_if_it_parses_and_if_its_examples_pass(tokenizer: Tokenizer):
    try:
        sandbox.run("pass")
    except ValueError as error:
        pytest.skip(str(error))
    known = [one.header + one.body for one in completion.questions()[:4]]
    first, second, third, fourth = known
    known = [
        first, second.replace("a if a > b else b", "a"), third.replace("return number", "return number +"),
        fourth.rpartition("    return")[0] + "    import os\n    os._exit(0)\n",
    ]  # fmt: skip
    options = Options(limit=4, allow_code_execution=True)
    outcome = TASKS["zero_completion"].run(Oracle(tokenizer, known), options)
    assert [one["parses"] for one in outcome.samples] == [1, 1, 0, 1]
    assert [one["doctest"] for one in outcome.samples] == [1, 0, 0, 0]
    assert outcome.samples[1]["reason"] == "AssertionError: 1 of 2 examples fail"
    assert outcome.result.figures["doctest"].value == 0.25
    safe = TASKS["zero_completion"].run(Oracle(tokenizer, known), Options(limit=4))
    assert "doctest" not in safe.result.figures and "--allow_code_execution" in safe.samples[0]["not_run"]


@pytest.mark.parametrize(
    ("answer", "is_found"),
    [
        ("def f(x):\n    return x\n", True),
        ("Here it is:\n```python\ndef f(x):\n    return x\n```\nIt works.", True),
        ("```\nimport math\n\ndef f(x):\n    return x", True),
        ("def g(x):\n    return x\n", False),
        ("Here it is: def f(x)", False),
        ("```python\ndef f(x:\n```", False),
    ],
)
def test_the_function_of_a_chat_models_answer(answer: str, is_found: bool):
    assert completion.function_in(answer, "f").startswith(("def f", "import")) == is_found


@pytest.mark.parametrize(
    ("form", "text", "right", "has_form", "is_right"),
    [
        ("json", ' {"name": "A", "age": 3}', '{"name": "A", "age": 3}', True, True),
        ("json", ' {"age": 4, "name": "A"}', '{"name": "A", "age": 3}', True, False),
        ("json", ' {"name": "A"}', '{"name": "A", "age": 3}', False, False),
        ("json", " [1]", '{"name": "A", "age": 3}', False, False),
        ("json", ' {"name": "A", ', '{"name": "A", "age": 3}', False, False),
        ("bullets", "\n- a\n- b", "- a\n- b", True, True),
        ("bullets", "\n- a\n- c\n", "- a\n- b", True, False),
        ("bullets", "\n- a", "- a\n- b", False, False),
        ("bullets", "\n* a\n* b", "- a\n- b", False, False),
        ("yes_no", " yes", "yes", True, True),
        ("yes_no", " no", "yes", True, False),
        ("yes_no", " Yes, it is", "yes", False, False),
    ],
)
def test_the_form_of_an_answer(form: str, text: str, right: str, has_form: bool, is_right: bool):
    checker = next(one for one in formats.FORMS if one.name == form)
    assert formats.follows(checker, Written(text, True), right) == has_form
    assert not formats.follows(checker, Written(text, False), right)
    if has_form:
        assert checker.equals(text.strip(), right) == is_right


def test_tokens_that_join_text_and_answer_belong_to_the_answer(tokenizer: Tokenizer):
    asked = Asker(Guesser(tokenizer), OPTIONS).scorings("the tok", ["ens", "en"])
    assert [tokenizer.decode(one.context + one.continuation) for one in asked] == ["the tokens", "the token"]
    assert len({one.context for one in asked}) == 1 and all(one.context and one.continuation for one in asked)
    assert [one.context + one.continuation for one in asked] == [
        tuple(tokenizer.encode(text)) for text in ("the tokens", "the token")
    ]  # fmt: skip


def test_a_chat_models_prompt_is_that_of_its_template(tokenizer: Tokenizer):
    options = Options(chat=True, system="Be short.")
    asker, chat = Asker(Guesser(tokenizer), options, "Do it."), template_of(tokenizer)
    talk = [Message("system", "Be short."), Message("user", "Do it.\n\nText")]
    assert list(asker.writing("Text", 5).prompt) == chat.prompt(talk)
    part, whole = asker.scorings("Text", [" yes"])[0], asker.scorings("Text", [" yes"], is_whole=True)[0]
    assert list(whole.context + whole.continuation) == chat.render([*talk, Message("assistant", "yes")]).ids
    assert whole.continuation == (*part.continuation, chat.end_id) and list(part.context) == chat.prompt(talk)


@pytest.mark.parametrize("layout", [WITH_TOOLS, BRACKETS, TRIMS, THINKS], ids=["tools", "brackets", "trims", "thinks"])
def test_other_templates(layout: str, tmp_path: Path):
    tokenizer, _ = with_template(layout, tmp_path)
    spelling = template.spelling_of(tokenizer, template_of(tokenizer))
    assert all(spelling) and spelling.whole.count("Hello") == 2
    found = values(TASKS["zero_template"].run(Says(tokenizer, "I am a model."), OPTIONS))
    assert set(found.values()) == {1.0}
    answer = f"Sure. {spelling.assistant}Yes."
    found = values(TASKS["zero_template"].run(Says(tokenizer, answer), OPTIONS))
    assert found["intact"] == 1.0 and found["clean"] == 0.0
    for name in ("zero_arithmetic", "zero_stopping"):
        found = values(TASKS[name].run(Oracle(tokenizer, known_texts(name, tokenizer, True)), Options(chat=True)))
        assert found["acc"] == 1.0 and found.get("exact", 1.0) == 1.0, name


class Says(Guesser):
    """One who always says the same."""

    def __init__(self, tokenizer: Tokenizer, text: str, ends: bool = True):
        super().__init__(tokenizer)
        self._written = Written(text, ends)

    def write(self, asked):
        return ((place, self._written) for place in range(len(asked)))


def test_a_template_holds_if_prompt_and_answer_do(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    task = TASKS["zero_template"]
    assert set(values(task.run(Says(tokenizer, "I am a model."), OPTIONS)).values()) == {1.0}
    found = values(task.run(Says(tokenizer, "Here: <|im_start|>user"), OPTIONS))
    assert (found["held"], found["intact"], found["clean"], found["ended"]) == (0.0, 1.0, 0.0, 1.0)
    found = values(task.run(Says(tokenizer, "And so on", False), OPTIONS))
    assert (found["held"], found["intact"], found["clean"], found["ended"]) == (0.0, 1.0, 1.0, 0.0)
    # A tokenizer that reads control tokens in people's texts.
    encode = type(tokenizer).encode_pieces
    monkeypatch.setattr(type(tokenizer), "encode_pieces", lambda self, pieces, also=frozenset(): encode(
        self, [(text, True) for text, _ in pieces], also))  # fmt: skip
    found = values(task.run(Says(tokenizer, "I am a model."), OPTIONS))
    assert found["held"] == found["intact"] < 0.2 and found["clean"] == 1.0


def test_a_model_without_a_template_gets_a_sentence(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    def refuse(tokenizer: Tokenizer):
        raise ValueError("the tokenizer has no chat template")

    monkeypatch.setattr(template, "template_of", refuse)
    result, samples = TASKS["zero_template"].run(Guesser(tokenizer), OPTIONS)
    assert not result.figures and not samples
    assert result.settings["reason"] == "it asks chat models, and here the tokenizer has no chat template"
