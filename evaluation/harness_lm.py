"""A model of ours as the `LM` of lm-eval.

lm-eval speaks in texts, and an Answerer in tokens. Here texts become the same tokens as in lm-eval's own model `hf`
(lm_eval/models/huggingface.py), so that the same model has the same score: what is given and what is scored is cut at
the same token, an empty context is the token that begins texts, what is too long loses its beginning, and long texts
are scored in the same windows.

It differs where `hf` is careless: text of a benchmark that spells a control token stays text. Only the chat template
puts control tokens into a prompt; see `Laid`.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evaluation.asking import Answerer, Scoring, Writing
from tokenizer import Tokenizer
from tokenizer.base import any_of
from tokenizer.chat_template import Message, template_of

logger = logging.getLogger(__name__)

UNDERSTOOD = frozenset(
    ("until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks", "max_new_tokens", "max_tokens",
     "max_completion_tokens")
)  # fmt: skip
"""What a task may ask of a text (`generation_kwargs`)."""
_USUAL_MOST = 256
"""New tokens if a task gives no number, as in `hf`."""

Pair = tuple[list[int], list[int]]
"""Tokens that are given, and those that are scored."""


class Laid(str):
    """Text of a prompt that the chat template laid out, with its tokens: lm-eval hands the text back to us, in which a
    control token of the template cannot be told from one that a message spells."""

    tokens: Callable[[str], list[int]]
    """Tokens of the prompt and of the beginning of an answer."""
    begun: str
    """Text that the task itself begins the answer with; often empty."""


def prefix_id(tokenizer: Tokenizer) -> int:
    """Token that stands for an empty context: the one that begins texts, or the one that ends them."""
    for name in ("bos_token", "eos_token"):
        text = tokenizer.template_tokens.get(name, "")
        if text in tokenizer.special_ids:
            return tokenizer.special_ids[text]
    return tokenizer.eod_id


class AnsweringLM(LM):
    """lm-eval's view of an Answerer.

    Args:
        seed: by which answers are drawn.
    """

    def __init__(self, answerer: Answerer, seed: int):
        super().__init__()
        self._answerer, self._seed = answerer, seed
        self._tokenizer, self._context = answerer.tokenizer, answerer.context
        self._prefix, self._control = prefix_id(self._tokenizer), any_of(self._tokenizer.special_ids)
        self._has_noted_system = False
        self.num_shortened = 0
        """Prompts that lost their beginning since it was set to 0."""

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._score([self._pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self._encode(request.args[0]), prefix_token=self._prefix, max_seq_len=self._context,
                context_len=1,
            )  # fmt: skip
            for window in windows:
                pairs.append(make_disjoint_window(window))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._score(pairs)):
            sums[owner] += logprob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        repeats: Counter[int] = Counter()
        asked = []
        for request in requests:
            asked.append(self._writing(request, repeats[id(request)]))
            repeats[id(request)] += 1
        texts = [""] * len(asked)
        for place, written in self._answerer.write(asked):
            # A stop text may spell one; what is left of them counts for nothing, as in `hf`.
            texts[place] = self._control.sub("", written.text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> Laid:
        """Prompt that asks for an answer, or for the rest of one that the last message begins.

        Raises:
            ValueError: the model's folder says nothing about conversations, or its template refuses this one.
        """
        messages = [Message(one["role"], one["content"]) for one in chat_history]
        begun = "" if add_generation_prompt else messages.pop().text
        template = template_of(self._tokenizer)
        try:
            tokens = template.beginnings(messages)
        except ValueError:
            if messages[0].role != "system" or len(messages) < 2:
                raise
            # Some templates have no place for a system text. `hf` drops it, which loses the task's description.
            system, first, *rest = messages
            tokens = template.beginnings([Message(first.role, f"{system.text}\n\n{first.text}"), *rest])
            if not self._has_noted_system:
                logger.warning("the chat template has no place for a system text: it begins the first question")
                self._has_noted_system = True
        laid = Laid(self._tokenizer.decode(tokens("")) + begun)
        laid.tokens, laid.begun = tokens, begun
        return laid

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def _encode(self, text: str) -> list[int]:
        """Tokens of a text that nothing precedes."""
        return [*self._tokenizer.begin_ids, *self._tokenizer.encode(text)]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Tokens of a context and of what follows, cut as in lm-eval's TemplateLM: both are encoded together, and
        blanks at the end of the context count as the beginning of what follows."""
        if isinstance(context, Laid):
            return self._laid_pair(context, continuation)
        if context == "":
            scored = self._tokenizer.encode(continuation)
            return (scored[:1], scored[1:]) if scored[:1] == [self._prefix] else ([self._prefix], scored)
        given = context.rstrip()
        tokens, scored = self._cut(self._encode(given), self._encode(context + continuation))
        return tokens or [self._prefix], scored

    @staticmethod
    def _cut(tokens: list[int], whole: list[int]) -> Pair:
        """Tokens of a context, and those behind it in the whole text. If the last one of the context has swallowed what
        follows, which `hf` does not allow, what is scored begins with the token that did."""
        if len(whole) <= len(tokens) and whole != tokens:
            tokens = commonprefix([tokens, whole[:-1]])
        return tokens, whole[len(tokens) :]

    @staticmethod
    def _is_blank(text: str) -> bool:
        return bool(text) and text.isspace()

    def _laid_pair(self, context: Laid, continuation: str) -> Pair:
        given = context.begun.rstrip()
        tokens, whole = context.tokens(given), context.tokens(context.begun + continuation)
        tokens, _ = self._cut(tokens, whole)
        count = len(tokens)
        while not given and count > 1 and self._is_blank(self._tokenizer.decode(tokens[count - 1 : count])):
            # Blanks that the template writes behind "assistant".
            count -= 1
        return tokens[:count], whole[count:]

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """(Log-likelihood, whether it is the likeliest text) of each pair. No token at all is certain."""
        found = [(0.0, True)] * len(pairs)
        asked, places = [], []
        for place, (given, scored) in enumerate(pairs):
            if not scored:
                continue
            if len(scored) > self._context:
                raise ValueError(
                    f"an answer of {len(scored)} tokens is to be scored, and the model knows {self._context} "
                    f"positions: leave this task out"
                )
            # The last token need not be read.
            asked.append(Scoring(self._shortened(given, self._context + 1 - len(scored)), tuple(scored)))
            places.append(place)
        for number, score in self._answerer.score(asked):
            found[places[number]] = (score.logprob, score.is_greedy)
        return found

    def _shortened(self, tokens: Sequence[int], room: int) -> tuple[int, ...]:
        self.num_shortened += len(tokens) > room
        return tuple(tokens[-room:])

    def _writing(self, request: Instance, repeat: int) -> Writing:
        """
        Args:
            repeat: number of the answer, if a task wants several to the same prompt.
        """
        context, wanted = request.args[:2]
        wanted = normalize_gen_kwargs(wanted, _USUAL_MOST)
        tokens = context.tokens(context.begun) if isinstance(context, Laid) else self._encode(context)
        most = self._room_for(wanted["max_gen_toks"])
        end = self._tokenizer.decode([self._tokenizer.eod_id])
        return Writing(
            self._shortened(tokens or [self._prefix], self._context - most), most,
            stop=tuple(dict.fromkeys([text for text in wanted["until"] if text] + [end])),
            stop_ids=tuple(sorted(template_of(self._tokenizer).stop_ids)) if isinstance(context, Laid) else (),
            temperature=float(wanted.get("temperature", 0.0)) if wanted["do_sample"] else 0.0,
            top_k=int(wanted.get("top_k", 0)), top_p=float(wanted.get("top_p", 1.0)),
            seed=self._seed_of(request, repeat),
        )  # fmt: skip

    def _room_for(self, most: int) -> int:
        """New tokens of an answer. Where as many as the task allows leave no room for the question, `hf` fails; here
        they get half of the context."""
        return most if most < self._context else max(1, self._context // 2)

    def room_for(self, wanted: Mapping[str, Any]) -> int | None:
        """New tokens of a task's answers if they are fewer than it allows.

        Args:
            wanted: its `generation_kwargs`.
        """
        most = normalize_gen_kwargs(dict(wanted), _USUAL_MOST)["max_gen_toks"]
        return None if most < self._context else self._room_for(most)

    def _seed_of(self, request: Instance, repeat: int) -> int:
        """The same for an answer in every evaluation, whatever else is asked."""
        text = f"{self._seed}/{request.task_name}/{request.doc_id}/{request.idx}/{repeat}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
