"""Questions of our own tasks as a model's tokens.

    text to continue      begin ids, text                    | answer
    conversation (chat)   template(system, user's message)   | answer, end of the message
"""

from collections.abc import Sequence
from os.path import commonprefix

from evaluation.asking import Answerer, Score, Scoring, Writing, Written
from evaluation.task import Options
from tokenizer.chat_template import ChatTemplate, Message, template_of


class Asker:
    """What turns questions into tokens of one model.

    Args:
        instruction: what a chat model is told before the text. A text to continue shows it by examples.
    Raises:
        ValueError: questions are to be put by a chat template, and the model has none.
    """

    def __init__(self, answerer: Answerer, options: Options, instruction: str = ""):
        self.tokenizer, self.context = answerer.tokenizer, answerer.context
        self._template = template_of(self.tokenizer) if options.chat else None
        self._system = (Message("system", options.system),) if options.system else ()
        self._instruction = instruction

    @property
    def is_chat(self) -> bool:
        return self._template is not None

    def scorings(self, text: str, answers: Sequence[str], is_whole: bool = False) -> list[Scoring]:
        """How likely is each answer?

        Args:
            text: ends without a blank.
            answers: each as it continues the text, such as " 7".
            is_whole: whether its end counts: a line end, or the end of the message.
        Returns:
            Nothing if one of them does not fit into the model's context.
        """
        if self._template is not None:
            asked = [self._answered(text, answer.strip(), is_whole) for answer in answers]
        else:
            asked = self._continued(text, [answer + "\n" * is_whole for answer in answers])
        return asked if all(fits(one, self.context) for one in asked) else []

    def writing(self, text: str, most: int, stop: tuple[str, ...] = ()) -> Writing | None:
        """What does the model write?

        Args:
            most: new tokens.
            stop: texts that end what continues a text. In a conversation, the model ends its message itself.
        Returns:
            None if it does not fit into the model's context.
        """
        if self._template is not None:
            asked = answering(self._template, self._conversation(text), most)
        else:
            asked = Writing((*self.tokenizer.begin_ids, *self.tokenizer.encode(text)), most, stop)
        return asked if len(asked.prompt) + most <= self.context else None

    def _conversation(self, text: str) -> list[Message]:
        return [*self._system, Message("user", f"{self._instruction}\n\n{text}" if self._instruction else text)]

    def _answered(self, text: str, answer: str, is_whole: bool) -> Scoring:
        assert self._template is not None
        rendered = self._template.render([*self._conversation(text), Message("assistant", answer)])
        begin = rendered.supervised.index(True)
        end = len(rendered.supervised) - rendered.supervised[::-1].index(True)
        return Scoring(tuple(rendered.ids[:begin]), tuple(rendered.ids[begin : end if is_whole else end - 1]))

    def _continued(self, text: str, answers: Sequence[str]) -> list[Scoring]:
        """Tokens may join the text's end and the answer's beginning. So what is scored begins where the tokens of text
        and whole differ, in the same place for all answers."""
        context, *wholes = self.tokenizer.encode_batch([text, *(text + answer for answer in answers)], num_threads=1)
        kept = len(commonprefix([context, *(whole[:-1] for whole in wholes)]))
        begin = tuple(self.tokenizer.begin_ids) or (self.tokenizer.eod_id,) * (not kept)
        return [Scoring((*begin, *whole[:kept]), tuple(whole[kept:])) for whole in wholes]


def answering(template: ChatTemplate, messages: Sequence[Message], most: int) -> Writing:
    """What does the model answer? It ends its message itself.

    Args:
        most: new tokens.
    Raises:
        ValueError: the template has no place for something.
    """
    return Writing(tuple(template.prompt(messages)), most, stop_ids=tuple(sorted(template.stop_ids)))


def fits(asked: Scoring, context: int) -> bool:
    """Whether a context of so many positions holds it. The last token need not be read."""
    return len(asked.context) + len(asked.continuation) - 1 <= context


def scores_of(answerer: Answerer, asked: Sequence[Scoring]) -> list[Score]:
    """Answers in the order of what was asked."""
    found = dict(answerer.score(asked)) if asked else {}
    return [found[place] for place in range(len(asked))]


def texts_of(answerer: Answerer, asked: Sequence[Writing]) -> list[Written]:
    """Answers in the order of what was asked."""
    found = dict(answerer.write(asked)) if asked else {}
    return [found[place] for place in range(len(asked))]


def said(text: str) -> str:
    """What a text says, without blanks around it, and without the thoughts that a chat model may put before it."""
    return text.rpartition("</think>")[2].strip()


def likeliest(logprobs: Sequence[float]) -> int:
    """Place of the choice that the model finds likeliest; the first of several."""
    return max(range(len(logprobs)), key=logprobs.__getitem__)
