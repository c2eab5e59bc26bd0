"""Layouts of conversations that published models write in Python code instead of a chat template, each as a program in
Jinja. known_classes.py says whose they are, and where the facts are from."""

import re

RESERVED = re.compile(r"<reserved_\d+>")
"""Pattern of Baichuan's tokens in front of a question and of an answer, whose numbers differ between its models."""

CHATGLM3 = (
    "[gMASK]sop{% for message in messages %}"
    "{{ '<|' + ('observation' if message['role'] == 'tool' else message['role']) + '|>\\n ' + message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# The blank before the last answer is the one that SentencePiece puts in front of a text: the answer is encoded by
# itself for training.
CHATGLM2 = (
    "[gMASK]sop{% set count = namespace(rounds=0) %}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{% set count.rounds = count.rounds + 1 %}"
    "{{ '[Round ' ~ count.rounds ~ ']\\n\\n问：' + message['content'] + '\\n\\n答：' }}"
    "{% elif message['role'] == 'assistant' and loop.last %}{{ ' ' + message['content'] + '</s>' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
)
BAICHUAN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}{{ 'ASSISTANT' + message['content'] }}"
    "{% elif message['role'] == 'system' and loop.first %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT' }}"
    "{% elif messages and messages[-1]['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
)
INTERNLM = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<s><|User|>:' + message['content'] + '<eoh>\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Bot|>:' + message['content'] + '<eoa>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
)
INTERNLM_1_1 = (
    "<s>{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<|System|>:' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '<|User|>:' + message['content'] + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|Bot|>:' + message['content'] + '<eoa>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Bot|>:' }}{% endif %}"
)
# Earlier turns are joined by <n>; only the last question is followed by <sep>, which asks for its answer.
YUAN = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ message['content'] }}"
    "{% if loop.last or loop.index == loop.length - 1 %}{{ '<sep>' }}{% else %}{{ '<n>' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + ('<eod>' if loop.last else '<n>') }}{% endif %}{% endfor %}"
)
AQUILA = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ 'A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human\\'s questions.###' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ message['content'] + '###' }}"
    "{% elif message['role'] == 'user' %}{{ 'Human: ' + message['content'] + '###' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)

_NAMES = {
    CHATGLM3: "ChatGLM3's", CHATGLM2: "ChatGLM2's", BAICHUAN: "Baichuan's", INTERNLM: "InternLM's",
    INTERNLM_1_1: "InternLM 1.1's", YUAN: "Yuan 2's", AQUILA: "Aquila's",
}  # fmt: skip


def with_roles(layout: str, user: str, assistant: str) -> str:
    """Baichuan's layout with the tokens in front of a question and of an answer."""
    return layout.replace("USER", user).replace("ASSISTANT", assistant)


def name_of_layout(template: str) -> str | None:
    """Whose layout a chat template is, in the possessive form; None if it is none of those above."""
    as_written = RESERVED.sub("ASSISTANT", RESERVED.sub("USER", template, count=1))
    return _NAMES.get(template) or _NAMES.get(as_written)
