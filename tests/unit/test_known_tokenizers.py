"""Tokenizers whose control tokens and layouts stand in code: the ids are those of the published classes.

`encoded` is what the slow tokenizers of transformers 4 do, on which those classes are built: a text is cut at its
control tokens, and SentencePiece encodes each part by itself.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor

from serving.chat import Chat
from serving.requests import Piece, Request, Sampling
from serving.text import stream_text, without_lead
from tests.unit import published_tokenizers as published
from tests.unit.test_tokenizer import auto_tokenizer, english, random_text, refusal
from tokenizer import Tokenizer, load_tokenizer
from tokenizer.chat_template import ChatTemplate, Message
from tokenizer.conversion import files_to_convert
from tokenizer.hf_bbpe import HFBBPETokenizer
from tokenizer.sp_foreign import ForeignSPTokenizer

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "chatglm3": lambda folder: published.chatglm(folder, 3),
    "chatglm2": lambda folder: published.chatglm(folder, 2),
    "baichuan": lambda folder: published.baichuan(folder, 1),
    "baichuan2": lambda folder: published.baichuan(folder, 2),
    "internlm": published.internlm,
    "internlm 1.1": lambda folder: published.internlm(folder, "1.1"),
    "yuan2": published.yuan,
    "yuan2, tokenizer alone": lambda folder: published.yuan(folder, with_config=False),
}
_YUAN_BEHIND = ["<mask>", "<predict>", "<FIM_SUFFIX>", "<FIM_PREFIX>", "<FIM_MIDDLE>", "<commit_msg>"]
_YUAN_BEHIND += ["<commit_after>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<empty_output>"]
CONTROLS = {
    "chatglm2": ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"],
    "baichuan": {"<reserved_102>": 195, "<reserved_103>": 196},
    "baichuan2": {"<reserved_106>": 195, "<reserved_107>": 196},
    "internlm": {"<eoh>": 3, "<eoa>": 4},
}
"""Control tokens behind the vocabulary in this order, or with their ids; besides those of SentencePiece."""
CONTROLS["chatglm3"] = [*CONTROLS["chatglm2"], "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
CONTROLS["internlm 1.1"] = CONTROLS["internlm"]


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FOLDERS[request.param](tmp_path_factory.mktemp("published") / request.param)


def controls_of(name: str, vocab_size: int) -> dict[str, int]:
    """Control tokens of a family -> ids, as its code gives them."""
    if name.startswith("yuan2"):
        # Those that are entries of the vocabulary keep their ids.
        first = vocab_size - 6
        entries = {"<eod>": 0, "<sep>": 2, "<pad>": 3, "<commit_before>": 4, "<jupyter_start>": 5}
        entries = {token: first + place for token, place in entries.items()}
        return entries | {token: vocab_size + number for number, token in enumerate(_YUAN_BEHIND)}
    controls = CONTROLS[name]
    return controls if isinstance(controls, dict) else {token: vocab_size + n for n, token in enumerate(controls)}


def processor_of(folder: Path) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def encoded(folder: Path, text: str, controls: dict[str, int]) -> list[int]:
    """Ids of a laid-out text in which control tokens are meant as such."""
    pattern = "|".join(map(re.escape, sorted(controls, key=len, reverse=True)))
    ids, sp = [], processor_of(folder)
    for part in re.split(f"({pattern})", text):
        ids += [controls[part]] if part in controls else sp.encode(part)
    return ids


def texts() -> list[str]:
    rng = random.Random(4)
    made = [random_text(rng, rng.randint(0, 40)) for _ in range(60)] + [english(rng, 30) for _ in range(5)]
    made += ["    x = 1\n\ty", " leading", "trailing  ", "你好，世界！ 天地", "a\r\nb", "", " "]
    made += ["\U0001f9ea\U0001f468\u200d\U0001f469"]
    return [text for text in made if "▁" not in text]


def test_ids_and_control_tokens(folder: Path):
    tokenizer, sp = load_tokenizer(folder), processor_of(folder)
    assert files_to_convert(folder) == ["tokenizer.model"]
    for text in texts():
        assert tokenizer.encode(text) == sp.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    special = {"<unk>": 0, "<s>": 1, "</s>": 2} | controls_of(folder.name, sp.vocab_size())
    assert tokenizer.special_ids == special
    assert tokenizer.vocab_size == max(sp.vocab_size(), *(token_id + 1 for token_id in special.values()))
    end = "<eod>" if folder.name.startswith("yuan2") else "</s>"
    assert tokenizer.eod_id == special[end]
    begins = {"chatglm": ["[gMASK]", "sop"], "internlm": ["<s>"]}
    wanted = next((tokens for name, tokens in begins.items() if folder.name.startswith(name)), [])
    assert tokenizer.begin_ids == [special[token] for token in wanted]
    assert all(tokenizer.token_byte_lengths()[token_id] == 0 for token_id in special.values())


def test_no_text_forges_a_control_token(folder: Path):
    tokenizer = load_tokenizer(folder)
    for token in tokenizer.special_ids:
        text = f"a{token} {token}b"
        ids = tokenizer.encode(text)
        assert not set(ids) & set(tokenizer.special_ids.values()) and tokenizer.decode(ids) == text
    layout = ChatTemplate(tokenizer)
    plain = layout.render([Message("user", "a"), Message("assistant", "b")])
    forged = layout.render([Message("user", "".join(tokenizer.special_ids)), Message("assistant", "b")])
    count = [sum(token_id in tokenizer.special_ids.values() for token_id in one.ids) for one in (plain, forged)]
    assert count[0] == count[1]


def test_saved_folder(folder: Path, tmp_path: Path):
    """It needs no code, here or in transformers."""
    ours = load_tokenizer(folder)
    ours.save_pretrained(tmp_path)
    copy, theirs = load_tokenizer(tmp_path), auto_tokenizer(tmp_path)
    for attribute in ("fingerprint", "special_ids", "begin_ids", "eod_id", "chat_template", "vocab_size"):
        assert getattr(copy, attribute) == getattr(ours, attribute)
    assert copy.encode_batch(texts()) == ours.encode_batch(texts())
    assert theirs(texts(), add_special_tokens=False)["input_ids"] == ours.encode_batch(texts())
    assert theirs("x")["input_ids"] == ours.begin_ids + ours.encode("x")
    assert {token: theirs.convert_tokens_to_ids(token) for token in ours.special_ids} == ours.special_ids
    rendered = ChatTemplate(copy).render(TALK)
    messages = [{"role": message.role, "content": message.text} for message in TALK]
    written = theirs.apply_chat_template(messages)["input_ids"]
    # ChatGLM3's template writes no end behind the last answer.
    assert rendered.ids == written + ([2] if folder.name == "chatglm3" else [])
    asked = theirs.apply_chat_template(messages[:3], add_generation_prompt=True)["input_ids"]
    assert ChatTemplate(copy).prompt(TALK[:3]) == asked


# ---- conversations, by hand

TALK = [
    Message("user", "hello 你好"), Message("assistant", "fine"),
    Message("user", "and\nyou?"), Message("assistant", " good  bye"),
]  # fmt: skip

LAYOUTS = {
    # THUDM's PROMPT.md and build_single_message; finetune_hf.py learns the token after an answer, and ends with </s>.
    "chatglm3": (
        "[gMASK]sop<|user|>\n hello 你好<|assistant|>{\n fine<|user|>}\n and\nyou?<|assistant|>{\n  good  bye</s>}"
    ),
    # build_prompt; ptuning/main.py encodes the last answer by itself, and ends with </s>.
    "chatglm2": (
        "[gMASK]sop[Round 1]\n\n问：hello 你好\n\n答：{fine}\n\n[Round 2]\n\n问：and\nyou?\n\n答：{  good  bye</s>}"
    ),
    # generation_utils.build_chat_input; fine-tune.py ends with </s>.
    "baichuan": "<reserved_102>hello 你好<reserved_103>{fine}<reserved_102>and\nyou?<reserved_103>{ good  bye</s>}",
    "baichuan2": "<reserved_106>hello 你好<reserved_107>{fine}<reserved_106>and\nyou?<reserved_107>{ good  bye</s>}",
    # modeling_internlm.build_inputs
    "internlm": (
        "<s><|User|>:hello 你好<eoh>\n<|Bot|>:{fine<eoa>}\n<s><|User|>:and\nyou?<eoh>\n<|Bot|>:{ good  bye<eoa>}\n"
    ),
    "internlm 1.1": "<s><|User|>:hello 你好\n<|Bot|>:{fine<eoa>}\n<|User|>:and\nyou?\n<|Bot|>:{ good  bye<eoa>}\n",
    # FastChat's SeparatorStyle.YUAN2
    "yuan2": "hello 你好<n>{fine}<n>and\nyou?<sep>{ good  bye<eod>}",
}  # fmt: skip
"""The text of a conversation, with what is learnt in braces."""
LAYOUTS["yuan2, tokenizer alone"] = LAYOUTS["yuan2"]


def test_a_conversation_by_hand(folder: Path):
    tokenizer = load_tokenizer(folder)
    layout, written = ChatTemplate(tokenizer), LAYOUTS[folder.name]
    controls = {"<s>": 1, "</s>": 2} | controls_of(folder.name, processor_of(folder).vocab_size())
    # InternLM's ends are pieces: SentencePiece finds them within a text, which goes on behind them.
    apart = {token: token_id for token, token_id in controls.items() if token not in ("<eoh>", "<eoa>")}
    rendered = layout.render(TALK)
    assert rendered.ids == encoded(folder, re.sub("[{}]", "", written), apart)
    learnt = [token_id for token_id, is_learnt in zip(rendered.ids, rendered.supervised) if is_learnt]
    assert tokenizer.decode(learnt).replace(" ", "") == "".join(re.findall("{(.*?)}", written, re.S)).replace(" ", "")
    prompt = re.sub("[{}]", "", written[: written.rindex("{")])
    assert layout.prompt(TALK[:3]) == encoded(folder, prompt, apart)
    assert rendered.ids[: len(layout.prompt(TALK[:3]))] == layout.prompt(TALK[:3])
    # The last answer is learnt as a whole, and nothing behind its end.
    assert rendered.supervised[len(layout.prompt(TALK[:3])) :].count(False) == (1 if "internlm" in folder.name else 0)


def test_what_the_start_says_of_layouts(folder: Path):
    notes = "\n".join(ChatTemplate(load_tokenizer(folder)).notes)
    whose = {
        "chatglm3": "ChatGLM3's", "chatglm2": "ChatGLM2's", "baichuan": "Baichuan's", "baichuan2": "Baichuan's",
        "internlm": "InternLM's", "internlm 1.1": "InternLM 1.1's",
    }.get(folder.name, "Yuan 2's")  # fmt: skip
    assert f"laid out as {whose} are" in notes
    assert ("is learnt there alone" in notes) == (folder.name[:4] in ("baic", "yuan") or folder.name == "chatglm2")
    assert ("<|user|>, by which it goes on, is learnt as the end" in notes) == (folder.name == "chatglm3")
    assert ("--sft_loss=split" in notes) == folder.name.startswith("yuan2")


def test_system_texts_and_results(tmp_path: Path):
    for name, head in (
        ("chatglm3", "[gMASK]sop<|system|>\n be brief<|user|>"), ("baichuan2", "be brief<reserved_106>"),
        ("internlm 1.1", "<s><|System|>:be brief\n<|User|>"), ("yuan2", "be brief\nhello"),
    ):  # fmt: skip
        tokenizer = load_tokenizer(FOLDERS[name](tmp_path / name))
        ids = ChatTemplate(tokenizer).render([Message("system", "be brief"), *TALK]).ids
        text = "".join(tokenizer.decode([token_id]) or " " for token_id in ids)
        assert text.replace(" ", "").startswith(head.replace(" ", ""))
    for name in ("chatglm2", "internlm"):
        with pytest.raises(ValueError, match="leaves out message 0"):
            ChatTemplate(load_tokenizer(FOLDERS[name](tmp_path / name))).render([Message("system", "x"), *TALK])
    glm = load_tokenizer(tmp_path / "chatglm3")
    ids = ChatTemplate(glm).render([*TALK[:2], Message("tool", "3"), *TALK[3:]]).ids
    assert glm.special_ids["<|observation|>"] in ids


# ---- versions of folders


def test_a_later_folder_of_chatglm3(tmp_path: Path):
    """It lists some of the tokens and has a template, which writes no end behind an answer."""
    template = (
        "{% for message in messages %}{% if loop.first %}[gMASK]sop<|{{ message['role'] }}|>\n {{ message['content'] }}"
        "{% else %}<|{{ message['role'] }}|>\n {{ message['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    form = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    first = load_tokenizer(published.chatglm(tmp_path / "a", 3))
    listed = ("[gMASK]", "sop", "<|user|>", "<|assistant|>")
    decoder = {str(first.special_ids[token]): {"content": token, **form} for token in listed}
    folder = published.chatglm(tmp_path / "b", 3, added_tokens_decoder=decoder, chat_template=template)
    later = load_tokenizer(folder)
    assert later.special_ids == first.special_ids and later.fingerprint == first.fingerprint
    assert later.chat_template == template
    rendered, expected = ChatTemplate(later).render(TALK), ChatTemplate(first).render(TALK)
    assert (rendered.ids, rendered.supervised) == (expected.ids, expected.supervised)
    stops = {"</s>", "<|user|>", "<|observation|>"}
    assert ChatTemplate(first).stop_ids == {first.special_ids[token] for token in stops}
    wrong = {str(first.special_ids["sop"]): {"content": "[gMASK]", **form}}
    message = refusal(published.chatglm(tmp_path / "c", 3, added_tokens_decoder=wrong))
    assert 'give "[gMASK]" the id 423, and the code of its class 421' in message


def test_a_template_of_the_folder_comes_first(tmp_path: Path):
    folder = published.baichuan(tmp_path, 2)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}")
    assert load_tokenizer(folder).chat_template.startswith("{% for m in")


def test_what_baichuans_folder_says(tmp_path: Path):
    """Its class puts <s> in front unless the configuration says otherwise, and its files name the roles' tokens."""
    assert load_tokenizer(published.baichuan(tmp_path / "a", 2, add_bos_token=True)).begin_ids == [1]
    folder = published.baichuan(tmp_path / "b", 2)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["add_bos_token"]
    published.write(folder, tokenizer_config_json=config)
    assert load_tokenizer(folder).begin_ids == [1]
    published.write(folder, generation_config_json={"user_token_id": 194, "assistant_token_id": 197})
    assert "'<reserved_105>' +" in load_tokenizer(folder).chat_template
    published.write(folder, generation_config_json={"user_token_id": 5, "assistant_token_id": 196})
    assert "names the ids 5 and 196, which are no reserved tokens" in refusal(folder)
    (folder / "generation_config.json").unlink()
    assert "'<reserved_106>' +" in load_tokenizer(folder).chat_template


def test_code_is_read_as_text_only(tmp_path: Path):
    """A missing file of code means the later version of ChatGLM and the usual one of InternLM."""
    (published.chatglm(tmp_path / "glm", 2) / "tokenization_chatglm.py").unlink()
    assert "<|user|>" in load_tokenizer(tmp_path / "glm").special_ids
    (published.internlm(tmp_path / "lm", "1.1") / "modeling_internlm.py").unlink()
    assert "<eoh>" in load_tokenizer(tmp_path / "lm").chat_template


def test_aquila(tmp_path: Path):
    """Byte-level; `<|endoftext|>` is its unknown token, and a document ends with </s>. The layout is AquilaChat2's."""
    from tests.unit.test_tokenizer_conversion import vocabulary

    vocab, merges, first = vocabulary()
    entries = json.loads(vocab) | {"[CLS]": first, "</s>": first + 1, "<|endoftext|>": first + 2}
    config = {
        "add_prefix_space": False, "bos_token": "[CLS]", "eos_token": "</s>", "unk_token": "<|endoftext|>",
        "tokenizer_class": "GPT2Tokenizer",
    }  # fmt: skip
    folder = published.write(
        tmp_path / "aquila", vocab_json=entries, merges_txt=merges, tokenizer_config_json=config,
        config_json={"model_type": "aquila"},
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eod_id, tokenizer.begin_ids) == (first + 1, [])
    rendered, prompt = ChatTemplate(tokenizer).render(TALK), ChatTemplate(tokenizer).prompt(TALK[:1])
    asked = "###Human: hello 你好###Assistant:"
    assert tokenizer.decode(rendered.ids).endswith(f"{asked} fine</s>Human: and\nyou?###Assistant:  good  bye</s>")
    assert tokenizer.decode(prompt).endswith(asked) and rendered.ids[: len(prompt)] == prompt
    learnt = [token_id for token_id, is_learnt in zip(rendered.ids, rendered.supervised) if is_learnt]
    assert tokenizer.decode(learnt) == " fine</s>  good  bye</s>"
    tokenizer.save_pretrained(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").eod_id == first + 1
    # The same with a tokenizer.json.
    published.write(tmp_path / "copy", config_json={"model_type": "aquila"}, tokenizer_config_json=config)
    again = load_tokenizer(tmp_path / "copy")
    assert again.eod_id == first + 1 and again.chat_template == tokenizer.chat_template


def test_another_tokenizer_of_such_a_model(tmp_path: Path):
    """A model that is named like a known one may have been trained with any tokenizer."""
    from tests.unit.test_tokenizer import qwen2

    for model_type in ("aquila", "yuan", "chatglm", "baichuan", "internlm"):
        folder = qwen2(tmp_path / model_type).folder
        before = load_tokenizer(folder)
        published.write(folder, config_json={"model_type": model_type})
        after = load_tokenizer(folder)
        assert (after.fingerprint, after.chat_template) == (before.fingerprint, before.chat_template)


def test_pieces_with_equal_scores(tmp_path: Path):
    """Of equals, SentencePiece joins the leftmost, which no tokenizer.json can say: the model itself decides, as for
    Yuan 2's own class. A folder without such pieces does without it."""
    folder = published.yuan(tmp_path / "yuan2", equal=60)
    tokenizer, sp, rng = load_tokenizer(folder), processor_of(folder), random.Random(5)
    assert isinstance(tokenizer, ForeignSPTokenizer)
    assert not isinstance(load_tokenizer(published.yuan(tmp_path / "other")), ForeignSPTokenizer)
    many = [*texts(), *(english(rng, 20) for _ in range(100)), "".join(rng.choices("abcdefghi ", k=2000))]
    as_json = HFBBPETokenizer.encode_batch(tokenizer, many)
    assert tokenizer.encode_batch(many) == [sp.encode(text) for text in many] != as_json
    assert tokenizer.encode_batch(many, num_threads=1) == tokenizer.encode_batch(many)
    for text in many:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert not set(tokenizer.encode("a<sep>b <eod>")) & set(tokenizer.special_ids.values())
    # Layouts, and which of their tokens end in which piece.
    controls = {"</s>": 2, "<s>": 1} | controls_of("yuan2", sp.vocab_size())
    rendered = ChatTemplate(tokenizer).render(TALK)
    assert rendered.ids == encoded(folder, re.sub("[{}]", "", LAYOUTS["yuan2"]), controls)
    pieces = [("<s>", True), (many[1], False), ("in", True), (many[-1], False), ("<sep>", True), ("漢 ▁", False)]
    ids, counts = tokenizer.encode_pieces(pieces)
    assert ids == encoded(folder, "".join(text for text, _ in pieces), controls) and sum(counts) == len(ids)
    starts = [sum(counts[:number]) for number in range(len(pieces) + 1)]
    for number, (text, _) in enumerate(pieces[:5]):
        said = tokenizer.decode(ids[1 : starts[number + 1]]).removeprefix("<s>")
        whole = "".join(text for text, _ in pieces[1 : number + 1])
        assert whole.startswith(said) and len(whole) - len(said) < 8
    tokenizer.save_pretrained(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.fingerprint == tokenizer.fingerprint and copy.encode_batch(many) == tokenizer.encode_batch(many)
    (tmp_path / "copy" / "tokenizer.model").unlink()
    assert "tokenizer.model" in refusal(tmp_path / "copy")


def test_tokens_that_somebody_added(tmp_path: Path):
    """As a fine-tuned model lists them; those that are not control tokens stay text that anybody may write."""
    folder = published.internlm(tmp_path)
    first = processor_of(folder).vocab_size()
    published.write(folder, added_tokens_json={"<call>": first, "<end>": first + 1})
    published.write(folder, special_tokens_map_json={"additional_special_tokens": ["<end>"]})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.added_ids == {"<call>": first} and tokenizer.special_ids["<end>"] == first + 1
    assert first in tokenizer.encode("a<call>b") and first + 1 not in tokenizer.encode("a<end>b")
    published.write(folder, added_tokens_json=b"{")
    assert "added_tokens.json is not valid JSON" in refusal(folder)


# ---- chat


def test_the_text_before_an_answer_is_not_part_of_it(tmp_path: Path):
    """ChatGLM3's model says a line end before its answer, which the template writes itself in the history."""
    tokenizer: Tokenizer = load_tokenizer(published.chatglm(tmp_path, 3))
    asked: list[list[int]] = []

    def model(request: Request) -> Iterator[Piece]:
        asked.append(list(request.prompt_ids))
        assert tokenizer.special_ids["<|user|>"] in request.sampling.stop_ids
        for text in stream_text(tokenizer, iter(encoded(tmp_path, "\n fine", {"<s>": 1}))):
            yield Piece(request.id, 0, text)

    chat = Chat(tokenizer, model, Sampling(max_new_tokens=20), 500)
    assert "".join(chat.answer("hello 你好")) == "fine"
    assert "".join(chat.answer("and\nyou?")) == "fine"
    assert asked[1] == ChatTemplate(tokenizer).prompt(TALK[:3])


@pytest.mark.parametrize("pieces, text", [
    (["\n", " fi", "ne"], "fine"), (["\n fine"], "fine"), (["fi", "ne"], "fine"), (["\n", "fine"], "\nfine"), ([], ""),
    (["\n"], "\n"), (["\n \n x"], "\n x"),
])  # fmt: skip
def test_leads(pieces: list[str], text: str):
    assert "".join(without_lead(iter(pieces), "\n ")) == text
    assert "".join(without_lead(iter(pieces), "")) == "".join(pieces)


@pytest.mark.parametrize("kind", ["BloomTokenizerFast", "BloomTokenizer"])
def test_blooms_class(tmp_path: Path, kind: str):
    """transformers has none of this name any more, and takes the tokenizer.json as it is."""
    from tests.unit.test_tokenizer import bloom

    folder = bloom(tmp_path / "bloom").folder
    config = json.loads((folder / "tokenizer_config.json").read_text())
    published.write(folder, tokenizer_config_json=config | {"tokenizer_class": kind})
    ours = load_tokenizer(folder)
    ours.save_pretrained(tmp_path / "copy")
    for path in (folder, tmp_path / "copy"):
        assert auto_tokenizer(path)(texts(), add_special_tokens=False)["input_ids"] == ours.encode_batch(texts())
    assert (ours.eod_id, ours.begin_ids) == (ours.special_ids["</s>"], [])
