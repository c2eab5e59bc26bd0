"""A chat model trained here, run in other programs: same prompt ids, same answer, and it stops.

    python -m benchmarks.interop_chat --python ENV4/bin/python ENV5/bin/python ENV_TRL/bin/python \\
        --converter llama.cpp/convert_hf_to_gguf.py --converter_python ENV4/bin/python

Each PYTHON is the interpreter of an environment; those of transformers, TRL with its chat (until 0.18) and xllamacpp
that it has are tested. `--converter` is llama.cpp's own and runs in the environment of `--converter_python` (torch,
transformers, sentencepiece, gguf). A model with each kind of tokenizer is fine-tuned on a few conversations until it
knows them, which takes two minutes on a CPU. Each reader gets only the folder, or the GGUF file made from it, and must
find the end token there. The exit code is 1 if an answer differs or does not stop.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from runs.layout import RunPaths

ROOT = Path(__file__).resolve().parent.parent
KINDS = ("hf_bbpe", "sp_bbpe")
MOST = 48
"""New tokens to allow: more than any answer has."""
TALKS = [
    [("user", "sky?"), ("assistant", "Blue.")],
    [("system", "Be brief."), ("user", "How many legs has a spider?"), ("assistant", "8")],
    [("user", " two  blanks\n"), ("assistant", "  kept\n\tas they are")],
    [("user", "Größe von 東京?"), ("assistant", "13 960 000 人 \U0001f5fc")],
    [("user", "def f(x):"), ("assistant", "    return x ** 2 + 10.5\n")],
    [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")],
]
LINES = ("docs/*.md", "docs/*/*.md", "tests/unit/test_tokenizer.py", "utils/*.py")
"""Files of this repository whose lines are tokenized, too; the second has text in many scripts."""


class Answer(NamedTuple):
    """A reader's tokens and answer for a conversation up to its last answer."""

    prompt_ids: list[int] | None
    """None if the reader does not show them."""
    text: str
    stopped: bool


def train(kind: str, home: Path) -> Path:
    """Checkpoint of a model that knows TALKS."""

    def run(*command: object) -> None:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    home.mkdir()
    (home / "talks").mkdir()
    records = [json.dumps({"messages": [{"role": r, "content": c} for r, c in talk]}) for talk in TALKS]
    (home / "talks" / "a.jsonl").write_text("\n".join(records * 4) + "\n")
    run("-m", "tokenizer.train_tokenizer", "--kind", kind, "--data_dir", ROOT / "utils", "--output_dir", home / "T",
        "--vocab_size", 700)  # fmt: skip
    run("train_my_ddp.py", "--task_type=sft", f"--tokenizer_dir={home / 'T'}", f"--data_dir={home / 'talks'}",
        f"--out_dir={home / 'run'}", "--max_seq_len=192", "--hidden_size=64", "--num_hidden_layers=2",
        "--num_attention_heads=4", "--dtype=float32", "--train_batch_size=4", "--gradient_accumulation_steps=1",
        "--max_iters=200", "--learning_rate=6e-3", "--weight_decay=0")  # fmt: skip
    return next(RunPaths(home / "run").ckpt_dir.glob("step-*"))


def lines() -> list[str]:
    """Lines of LINES, except those with text that other programs treat specially: control strings, and SentencePiece's
    sign for a blank."""
    files = [path for pattern in LINES for path in sorted(ROOT.glob(pattern))]
    found = [line for path in files for line in path.read_text("utf-8").splitlines(True)]
    return [line for line in found if not any(sign in line for sign in ("<|", "<unk>", "\u2581"))]


def ours(folder: Path) -> tuple[list[Answer], list[tuple[str, list[int]]]]:
    import torch

    from serving.generation import generate, load_model
    from tokenizer.chat_template import ChatTemplate, Message

    model, tokenizer, stop_ids = load_model(folder, torch.device("cpu"), torch.float32)
    template, answers = ChatTemplate(tokenizer), []
    for talk in TALKS:
        ids = template.prompt([Message(*turn) for turn in talk[:-1]])
        new = list(generate(model, ids, MOST, stop_ids | template.stop_ids, 0.0, vocab_size=tokenizer.vocab_size))
        answers.append(Answer(ids, tokenizer.decode(new), len(new) < MOST))
    return answers, [(text, tokenizer.encode(text)) for text in lines()]


def with_transformers(folder: Path, texts: list[str]) -> tuple[list[Answer], list[list[int]] | None]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for talk in TALKS:
        messages = [{"role": role, "content": text} for role, text in talk[:-1]]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = inputs["input_ids"][0].tolist()
        new = model.generate(**inputs, max_new_tokens=MOST, do_sample=False)[0, len(ids) :]
        answers.append(Answer(ids, tokenizer.decode(new, skip_special_tokens=True), len(new) < MOST))
    return answers, [tokenizer(text)["input_ids"] for text in texts]


def with_trl_chat(folder: Path, texts: list[str]) -> tuple[list[Answer], list[list[int]] | None]:
    """TRL's own chat, with typed questions. The tokenizer's `eos_token` is the only end that it knows."""
    return [_typed_into_trl(folder, talk) for talk in TALKS], None


def _typed_into_trl(folder: Path, talk: list[tuple[str, str]]) -> Answer:
    from trl.scripts import chat

    questions = [*(text for role, text in talk if role == "user"), "exit"]
    said: list[str] = []
    made: list[int] = []

    class Typist:
        def __init__(self, **_: object):
            pass

        def clear(self) -> None:
            pass

        def input(self) -> str:
            return questions.pop(0)

        def stream_output(self, stream: object) -> str:
            said.append("".join(stream))
            return said[-1]

    def load_and_count(arguments: object) -> tuple:
        model, tokenizer = load(arguments)
        generate = model.generate

        def counted(**settings: object) -> object:
            out = generate(**settings)
            made.append(out.shape[1] - settings["inputs"].shape[1])
            return out

        model.generate = counted
        return model, tokenizer

    load, interface = chat.load_model_and_tokenizer, chat.RichInterface
    chat.load_model_and_tokenizer, chat.RichInterface = load_and_count, Typist
    system = next((text for role, text in talk if role == "system"), None)
    arguments = chat.ChatArguments(
        model_name_or_path=str(folder), system_prompt=system, do_sample=False, temperature=1.0, top_k=50, top_p=1.0,
        max_new_tokens=MOST, device="cpu", torch_dtype="float32",
    )  # fmt: skip
    chat.main(arguments)
    chat.load_model_and_tokenizer, chat.RichInterface = load, interface
    return Answer(None, said[-1], made[-1] < MOST)


def with_llama_cpp(gguf: Path, texts: list[str]) -> tuple[list[Answer], list[list[int]] | None]:
    """llama.cpp's server, with its own template engine, tokenizer and end tokens."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(gguf)
    parameters.n_ctx, parameters.port, parameters.warmup = 192, 0, False
    parameters.cpuparams.n_threads = 1
    server, answers = xllamacpp.Server(parameters), []

    def post(path: str, **body: object) -> dict:
        request = urllib.request.Request(
            f"{server.listening_address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        return json.load(urllib.request.urlopen(request, timeout=60))

    for talk in TALKS:
        messages = [{"role": role, "content": text} for role, text in talk[:-1]]
        prompt = post("/apply-template", messages=messages)["prompt"]
        ids = post("/tokenize", content=prompt, add_special=True, parse_special=True)["tokens"]
        done = post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=MOST)
        choice = done["choices"][0]
        assert done["usage"]["prompt_tokens"] == len(ids), (done["usage"], len(ids))
        answers.append(Answer(ids, choice["message"]["content"], choice["finish_reason"] == "stop"))
    return answers, [post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"] for text in texts]


def read(root: Path) -> int:
    """Test the installed programs, and print a line for each reader and kind. Imports nothing of this project."""
    import importlib.util
    from importlib.metadata import version

    readers: list[tuple[str, str, Callable[[Path, list[str]], tuple]]] = []
    if importlib.util.find_spec("transformers"):
        readers.append((f"transformers {version('transformers')}", "", with_transformers))
    if importlib.util.find_spec("trl") and importlib.util.find_spec("trl.scripts.chat"):
        readers.append((f"TRL {version('trl')}, chat", "", with_trl_chat))
    if importlib.util.find_spec("xllamacpp"):
        readers.append((f"llama.cpp (xllamacpp {version('xllamacpp')})", ".gguf", with_llama_cpp))
    failed = 0
    for kind in KINDS:
        expected = json.loads((root / f"{kind}.json").read_text())
        answers, texts = [Answer(*one) for one in expected["answers"]], expected["lines"]
        for name, suffix, ask in readers:
            path = root / f"{kind}{suffix}"
            if not path.exists():
                print(f"{name:36} {kind}: not converted")
                continue
            found, ids = ask(path, [text for text, _ in texts])
            counts = {
                "prompts": [one.prompt_ids == other.prompt_ids for one, other in zip(found, answers)],
                "answers": [one.text == other.text for one, other in zip(found, answers)],
                "stops": [one.stopped for one in found],
                "lines": [one == other for one, (_, other) in zip(ids or [], texts)],
            }
            if found[0].prompt_ids is None:
                counts["prompts"] = []
            failed += not all(map(all, counts.values()))
            shown = [f"{what} {sum(of)}/{len(of)}" if of else f"{what} not shown" for what, of in counts.items()]
            print(f"{name:36} {kind}: {', '.join(shown)}", flush=True)
            for one, other in zip(found, answers):
                if one.text != other.text:
                    print(f"    {one.text!r} instead of {other.text!r}")
    return failed > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters of the readers")
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--converter_python", default=sys.executable, help="interpreter that runs the converter")
    parser.add_argument("--keep", type=Path, help="new folder in which models and GGUF files are kept")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        return read(options.read)
    failed = 0
    with tempfile.TemporaryDirectory() as temporary:
        root = options.keep or Path(temporary)
        root.mkdir(exist_ok=True)
        for kind in KINDS:
            checkpoint = train(kind, root / f"{kind}-training")
            answers, texts = ours(checkpoint)
            known = sum(a.text == talk[-1][1] and a.stopped for a, talk in zip(answers, TALKS))
            print(f"{'here':36} {kind}: {known} of {len(TALKS)} answers are what was taught, and end")
            failed += known < len(TALKS)
            (root / f"{kind}.json").write_text(json.dumps({"answers": answers, "lines": texts}))
            (root / kind).symlink_to(checkpoint.resolve())
            if options.converter is not None:
                gguf = root / f"{kind}.gguf"
                command = [
                    options.converter_python,
                    options.converter,
                    checkpoint,
                    "--outfile",
                    gguf,
                    "--outtype",
                    "f32",
                ]
                done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
                if done.returncode:
                    print(f"{'convert_hf_to_gguf.py':36} {kind}: {done.stderr.strip().splitlines()[-1]}")
        # -I keeps this file's folder, with its kernels.py, off the import path.
        for python in options.python:
            done = subprocess.run([python, "-I", __file__, "--read", root], stderr=subprocess.PIPE, text=True)
            failed += done.returncode
            if done.returncode:
                print(done.stderr[-3000:], file=sys.stderr)
    return failed > 0


if __name__ == "__main__":
    raise SystemExit(main())
