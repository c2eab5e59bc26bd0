"""serve.py as a command, with real clients: what its answers say, how it ends, and how it follows a run."""

import asyncio
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
pytest.importorskip("uvicorn", reason="needs requirements-serve.txt")
pytest.importorskip("prometheus_client", reason="needs requirements-serve.txt")

import serve
from checkpoint.folder import MANIFEST, sealed
from serving import running
from serving.api import new_app
from serving.catalog import Catalog, Offer
from serving.engine import Engine, EngineOptions
from serving.follow import Follower
from serving.generation import generate, load_model
from serving.limits import Gate, Hosts, Keys, Limits
from serving.loading import load
from serving.offers import offers_of
from serving.service import Generation, Service
from tests.asgi import Client
from tests.fake_engine import FakeEngine
from tests.unit.test_chat import folder, tokenizer
from tokenizer import Tokenizer
from tokenizer.chat_template import Message, template_of

__all__ = ["folder", "tokenizer"]

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "a-key-for-tests-only"
QUESTION = [{"role": "user", "content": "hello"}]


class Command:
    """A server in a process of its own, with what it writes."""

    def __init__(self, *flags: str):
        command = [sys.executable, "serve.py", "--port=0", "--dtype=float32", "--device=cpu", *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=environment)
        self.lines: list[str] = []
        self._reading = ThreadPoolExecutor(1)
        self._reading.submit(self._read)
        ready = self.said(r"ready: (http://127.0.0.1:[0-9]+)/ is the chat page")
        self.url = ready[1]
        self.port = int(self.url.rpartition(":")[2])

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def said(self, pattern: str, patience_s: float = 120) -> re.Match[str]:
        """Wait for a line."""
        deadline = time.monotonic() + patience_s
        while True:
            if found := re.search(pattern, "".join(self.lines)):
                return found
            assert self.process.poll() is None and time.monotonic() < deadline, "".join(self.lines)
            time.sleep(0.02)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reading.shutdown()


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    command = Command(f"--model={folder}", f"--api_keys={keys}", "--served_model_name=tiny")
    yield command
    command.end()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Callable[[list[int], int], str]:
    """Text that the plain loop says after a prompt, taking the likeliest tokens."""
    model, tokenizer, stop_ids = load_model(folder, torch.device("cpu"), torch.float32)
    ends = stop_ids | template_of(tokenizer).stop_ids

    def text(prompt: list[int], count: int) -> str:
        return tokenizer.decode(list(generate(model, prompt, count, ends, 0.0, vocab_size=tokenizer.vocab_size)))

    return text


@pytest.fixture
def prompt(tokenizer: Tokenizer) -> list[int]:
    return template_of(tokenizer).prompt([Message("user", "hello")])


def test_openai_client(server: Command, expected: Callable, prompt: list[int], tokenizer: Tokenizer):
    openai = pytest.importorskip("openai", reason="needs openai")
    said = expected(prompt, 20)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        assert [one.id for one in client.models.list()] == ["tiny"]
        asked = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, "temperature": 0}
        answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
        assert answer.choices[0].message.content == said and answer.usage.prompt_tokens == len(prompt)
        for token in answer.choices[0].logprobs.content:
            assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob
        chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert "".join(one.choices[0].delta.content or "" for one in chunks[:-1]) == said
        assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
        # The second time, the prompt was in the cache.
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0
        plain = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0)
        assert plain.choices[0].text == said
        ended = client.completions.create(model="tiny", prompt=prompt, max_tokens=20, temperature=0, stop=said[3:5])
        assert ended.choices[0].text == said[: said.index(said[3:5])] and ended.choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="tools is not supported by this server"):
            client.chat.completions.create(**asked, tools=[{"type": "function", "function": {"name": "f"}}])
        with pytest.raises(openai.NotFoundError, match="there is no model of this name"):
            client.chat.completions.create(**asked | {"model": "gpt-4o"})
        with pytest.raises(openai.BadRequestError, match="makes no embeddings"):
            client.embeddings.create(model="tiny", input="x")
        with pytest.raises(openai.AuthenticationError, match="the API key is wrong"):
            client.with_options(api_key="another-key-for-tests").models.list()
    assert KEY not in "".join(server.lines)


def test_openai_client_many_at_once(server: Command):
    """Each seed's answer is the one that it has alone."""
    openai = pytest.importorskip("openai", reason="needs openai")

    async def ask() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            async def one(seed: int) -> str:
                stream = await client.chat.completions.create(
                    model="tiny", messages=QUESTION, max_tokens=12, seed=seed, stream=True
                )
                return "".join([part.choices[0].delta.content or "" async for part in stream])

            together = await asyncio.gather(*(one(seed) for seed in range(16)))
            return together, [await one(seed) for seed in range(3)]

    together, alone = asyncio.run(ask())
    assert len(set(together)) > 8 and together[:3] == alone


def test_langchain(server: Command, expected: Callable, prompt: list[int]):
    chat_models = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    model = chat_models.ChatOpenAI(base_url=f"{server.url}/v1", api_key=KEY, model="tiny", temperature=0, max_tokens=9)
    said = expected(prompt, 9)
    assert model.invoke([("user", "hello")]).content == said
    assert "".join(part.content for part in model.stream([("user", "hello")])) == said


def test_huggingface_client(server: Command, expected: Callable, tokenizer: Tokenizer):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    client = hub.InferenceClient(model=f"{server.url}/generate", headers={"Authorization": f"Bearer {KEY}"})
    said = expected(tokenizer.encode("hello"), 9)
    assert client.text_generation("hello", max_new_tokens=9) == said
    assert "".join(client.text_generation("hello", max_new_tokens=9, stream=True)) == said


def test_curl(server: Command, expected: Callable, prompt: list[int]):
    if shutil.which("curl") is None:
        pytest.skip("needs curl")
    headers = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"]
    body = {"messages": QUESTION, "max_tokens": 4, "temperature": 0, "stream": True}
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", *headers, "-d", json.dumps(body)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    said = "".join(one["choices"][0]["delta"].get("content", "") for one in events)
    assert lines[-2:] == ["data: [DONE]", ""] and said == expected(prompt, 4)
    answer = subprocess.run(["curl", "-s", "-i", f"{server.url}/metrics", "-H", "Host: evil.example"],
                            capture_output=True, text=True, timeout=60).stdout  # fmt: skip
    assert answer.startswith("HTTP/1.1 403") and "\nserver:" not in answer.lower()


def connect(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=60)


def post(connection: http.client.HTTPConnection, body: dict, path: str = "/v1/completions") -> http.client.HTTPResponse:
    """Send a request; returns the answer with its headers read."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    connection.request("POST", path, json.dumps(body), headers)
    return connection.getresponse()


def used_blocks(port: int) -> int:
    connection = connect(port)
    connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
    text = connection.getresponse().read().decode()
    connection.close()
    return int(float(re.search(r"^zero2all_used_blocks (\S+)", text, re.MULTILINE)[1]))


def test_a_client_that_leaves_frees_its_blocks(server: Command):
    connection = connect(server.port)
    answer = post(connection, {"prompt": "x", "max_tokens": 100, "ignore_eos": True, "stream": True, "n": 8})
    answer.readline()
    connection.close()
    answer.close()
    deadline = time.monotonic() + 20
    while used_blocks(server.port):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_end_of_a_server(server: Command):
    """The last test of this one: it finishes what runs, refuses what is new, and ends with 0."""
    running, later = connect(server.port), connect(server.port)
    body = {"prompt": "x", "max_tokens": 120, "ignore_eos": True, "stream": True, "n": 4}
    answer = post(running, body)
    answer.readline()
    server.process.send_signal(signal.SIGTERM)
    server.said("ends when what runs has finished")
    refused = post(later, {"prompt": "x"})
    sentence = refused.read()
    if refused.status != 503:
        # On a fast machine, the first one has ended already.
        assert refused.status == 200
    else:
        assert b"the server is ending" in sentence
    assert answer.read().endswith(b"data: [DONE]\n\n")
    assert server.process.wait(30) == 0


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A run with one checkpoint."""
    save(folder, tmp_path / "run", 10)
    return tmp_path / "run"


def save(folder: Path, run: Path, step: int, scale: float = 1.0, broken: bool = False) -> Path:
    """A checkpoint with the model's weights times a factor, as training would save it."""
    from safetensors.torch import load_file, save_file

    (run / "ckpt").mkdir(parents=True, exist_ok=True)
    work = shutil.copytree(folder, run / "ckpt" / f"tmp-{step}")
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor * scale for name, tensor in weights.items()}, work / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    files = {path.name: {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
             for path in work.iterdir()}  # fmt: skip
    manifest = sealed({"files": files, "valid_loss": None, "save_id": f"s{step}", "world_size": 1, "ranks": [0]})
    (work / MANIFEST).write_text(json.dumps(manifest))
    if broken:
        (work / "model.safetensors").write_bytes(b"broken")
    return work.rename(run / "ckpt" / f"step-{step}")


def test_a_run_is_followed(folder: Path, run: Path):
    """New requests get the new model, and one under way ends with its own; a second signal ends the server at once."""
    command = Command(f"--model={run}", "--follow", "--max_running=4")
    try:
        slow, quick = connect(command.port), connect(command.port)
        body = {"prompt": "hello", "max_tokens": 100, "temperature": 0, "ignore_eos": True}
        before = json.loads(post(quick, body).read())
        assert before["system_fingerprint"] == "step-10"
        assert json.loads(post(quick, {"prompt": "x"}, "/tokenize").read())["count"] == 1
        save(folder, run, 20, broken=True)
        save(folder, run, 15, scale=0.5)
        command.said("step-20 is skipped: model.safetensors holds 6 bytes")
        command.said("new requests are answered by step 15")
        after = json.loads(post(quick, body).read())
        assert after["system_fingerprint"] == "step-15"
        assert after["choices"][0]["text"] != before["choices"][0]["text"]
        quick.request("GET", "/v1/models")
        assert [one["step"] for one in json.loads(quick.getresponse().read())["data"]] == [15]
        # Many at once take long enough for two signals.
        answer = post(slow, body | {"stream": True, "prompt": ["a", "b"] * 30})
        answer.readline()
        command.process.send_signal(signal.SIGTERM)
        command.said("a second signal ends it at once")
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(20) == 128 + signal.SIGTERM
    finally:
        command.end()


class Follows:
    """A service as the follower sees it."""

    has_old = False

    def __init__(self):
        self.steps: list[str | None] = []

    def replace(self, generation: Generation) -> None:
        self.steps.append(generation.fingerprint)


def test_which_checkpoint_is_taken(folder: Path, run: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture):
    # (serve.py tells more, and other tests run it in this process.)
    caplog.set_level(logging.WARNING, "serving")
    faults: dict[str, Exception] = {}

    def load(path: Path) -> Generation:
        if path.name in faults:
            raise faults[path.name]
        return Generation(FakeEngine(tokenizer), Catalog([]), path.name)

    service = Follows()
    follower = Follower(run / "ckpt", 10, service, load)
    assert not follower.look()
    # The newest one counts, not each; what is being written has no name yet.
    save(folder, run, 11)
    save(folder, run, 12)
    (run / "ckpt" / "step-13.tmp").mkdir()
    assert follower.look() and not follower.look()
    # Those that are broken or cannot be loaded are named once.
    faults["step-30"], faults["step-31"] = ValueError("it has another tokenizer"), MemoryError("none is left")
    for step in (30, 31, 40):
        save(folder, run, step, broken=step == 40)
    (run / "ckpt" / "step-50").mkdir()
    assert not follower.look() and not follower.look()
    assert [message.rpartition("/")[2] for message in caplog.messages] == [
        "step-40 is skipped: model.safetensors holds 6 bytes instead of " + str(_size(folder)),
        "step-31 is skipped: MemoryError: none is left", "step-30 is skipped: it has another tokenizer",
    ]  # fmt: skip
    # A disk may come back.
    save(folder, run, 60)
    faults["step-60"] = OSError("it is away")
    assert not follower.look() and not follower.look() and len(caplog.messages) == 4
    # While an older model still works, there is no room for another.
    del faults["step-60"]
    service.has_old = True
    assert not follower.look()
    service.has_old = False
    assert follower.look() and service.steps == ["step-12", "step-60"]


def _size(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("flags", "sentence"), [
        (["--model=/nowhere"], "does not exist"), (["--port=70000"], "--port must lie between 0 and 65535, got 70000"),
        (["--max_running=0"], "--max_running must be at least 1"),
        (["--max_queue=-1"], "--max_queue must be at least 0"),
        (["--cache_gb=nan"], "--cache_gb must be positive, got nan"), (["--request_timeout=0"], "must be positive"),
        (["--follow"], "--follow needs a run directory"), (["--adapter=a="], "a folder is missing"),
        (["--served_model_name=a b"], "--served_model_name has no blanks"), (["--adapter=/nowhere"], "does not exist"),
        (["--served_model_name=a", "--adapter=a=/x"], "model and adapter are both called a"),
        (["--api_keys=/nowhere"], "--api_keys /nowhere cannot be used: No such file"),
        (["--host=256.0.0.1"], "--host 256.0.0.1 --port 8000 cannot be used"),
        (["--host=192.0.2.1", "--port=0"], "cannot be used: Cannot assign requested address"),
    ],
)  # fmt: skip
def test_mistakes_in_the_command(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], sentence: str):
    assert serve.main([f"--model={folder}", *flags]) == 2
    said = capsys.readouterr()
    assert sentence in said.err and said.err.count("\n") == 1 and not said.out


def test_mistakes_are_found_without_torch(folder: Path, tmp_path: Path):
    """Also a missing package, which is named with the file that lists it."""
    (tmp_path / "keys").write_text("short\n")
    code = "import sys, serve; n = serve.main(sys.argv[1:]); print(n, 'torch' in sys.modules)"
    flags = [f"--model={folder}", f"--api_keys={tmp_path / 'keys'}"]
    done = subprocess.run([sys.executable, "-c", code, *flags], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "2 False\n" and "a key has at least 16 characters" in done.stderr, done.stderr
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['fastapi'] = None\n")
    done = subprocess.run([sys.executable, "serve.py", f"--model={folder}"], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=120)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "the package fastapi is missing" in done.stderr


def test_a_connection_without_a_request_is_closed(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    """Whether it brings nothing or a part; one whose answer takes longer stays."""
    monkeypatch.setattr(running, "_REQUEST_WITHIN_S", 0.2)
    servers, is_ready = [], threading.Event()

    class Seen(running._Server):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            servers.append(self)

    monkeypatch.setattr(running, "_Server", Seen)
    engine, bound = FakeEngine(tokenizer), running.listening_socket("127.0.0.1", 0)
    offer = Offer("tiny", None, None, tokenizer, frozenset(), 128, None)
    service = Service(Generation(engine, Catalog([offer])), 8)
    app = new_app(service, Hosts("127.0.0.1"), Keys([]), Limits())
    thread = threading.Thread(target=running.run, args=(app, service, bound, is_ready.set))
    thread.start()
    assert is_ready.wait(60)
    address = bound.getsockname()
    for part in (b"", b"GET /health HT"):
        with socket.create_connection(address, timeout=30) as idle:
            idle.sendall(part)
            assert idle.recv(100) == b""
    engine.gate.clear()
    connection = connect(address[1])
    answer = post(connection, {"prompt": "ab", "max_tokens": 2, "stream": True})
    time.sleep(0.7)
    engine.gate.set()
    assert answer.read().endswith(b"[DONE]\n\n")
    assert service._loop is not None
    service._loop.call_soon_threadsafe(servers[0].let_finish)
    thread.join(60)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def real(folder: Path) -> Iterator[Client]:
    """The application on the engine itself."""
    served = load(folder, {}, torch.device("cpu"), torch.float32)
    engine = Engine(served, EngineOptions(max_running=8))
    service = Service(Generation(engine, Catalog(offers_of(served, folder, "tiny"))), 64)
    client = Client(partial(started, service))
    yield client
    service.close()
    client.close()


@torch.no_grad()
def test_a_text_is_scored_as_evaluation_programs_ask(real: Client, folder: Path, tokenizer: Tokenizer):
    """By the body that lm-eval's local-completions sends, against the model's own scores."""
    model = load_model(folder, torch.device("cpu"), torch.float32).model
    texts = [tokenizer.encode("a text, 漢字 and more"), tokenizer.encode("another")]
    body = {"prompt": texts, "model": "tiny", "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True,
            "temperature": 0}  # fmt: skip
    reply = real.post("/v1/completions", body).json
    for ids, choice in zip(texts, sorted(reply["choices"], key=lambda one: one["index"])):
        scores = model.logits(model(torch.tensor([ids])))[0, :, : tokenizer.vocab_size].log_softmax(-1)
        told = choice["logprobs"]
        assert len(told["tokens"]) == len(ids) + 1
        expected = scores[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(told["token_logprobs"][1:-1]), expected, rtol=1e-4, atol=1e-4)
        is_greedy = [max(top, key=top.get) == token for token, top in zip(told["tokens"], told["top_logprobs"]) if top]
        assert is_greedy == [*(scores[:-1].argmax(-1) == torch.tensor(ids[1:])).tolist(), True]


@pytest.mark.parametrize("more", [
    {"temperature": 1e-300}, {"temperature": 100}, {"top_p": 1e-300}, {"top_k": 1 << 24}, {"min_p": 1},
    {"repetition_penalty": 0.01}, {"repetition_penalty": 100}, {"logit_bias": {str(n): -100 for n in range(400)}},
    {"logit_bias": {"5": 100}}, {"presence_penalty": 2, "frequency_penalty": -2}, {"seed": -(1 << 63)},
    {"stop": ["\x00", "\ufffd", "e"], "include_stop_str_in_output": True}, {"min_tokens": 20, "ignore_eos": False},
    {"min_tokens": 500}, {"num_beams": 4, "n": 4}, {"num_beams": 8, "temperature": 0, "early_stopping": True},
    {"num_beams": 16}, {"n": 8, "logprobs": 20}, {"n": 9}, {"stop_token_ids": list(range(400))},
    {"temperature": 0, "top_p": 1e-300, "min_p": 1, "top_k": 1}, {"num_beams": 2, "logprobs": 2},
    {"num_beams": 2, "length_penalty": -100}, {"prompt_logprobs": 20, "logprobs": 20}, {"max_tokens": 0},
    {"max_tokens": 0, "num_beams": 2}, {"max_tokens": 0, "prompt_logprobs": 1, "n": 2},
])  # fmt: skip
def test_extreme_values_are_no_fault(real: Client, more: dict):
    """Either an answer or a sentence."""
    for stream in (False, True):
        if stream and "prompt_logprobs" in more:
            continue
        reply = real.post("/v1/completions", {"prompt": "x", "max_tokens": 6, "stream": stream} | more)
        assert reply.status in (200, 400) and reply.is_complete, reply.body
        if reply.status == 400:
            assert reply.error["message"]
        elif stream:
            assert reply.events[-1] == "[DONE]" and not [one for one in reply.events[:-1] if "error" in one]
            finishes = [one["choices"][0]["finish_reason"] for one in reply.events[:-1]]
            assert sum(one in ("stop", "length") for one in finishes) == more.get("n", 1)
        else:
            assert all(one["finish_reason"] in ("stop", "length") for one in reply.json["choices"])


def started(service: Service) -> Gate:
    service.start()
    return new_app(service, Hosts("localhost"), Keys([]), Limits())


def adapter(path: Path, base: Path, seed: int) -> Path:
    """Folder of an adapter that changes a model's attention a lot, as PEFT would save it."""
    from safetensors.torch import save_file

    path.mkdir()
    size, rank = json.loads((base / "config.json").read_text())["hidden_size"], 8
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.model.layers.0.self_attn.{layer}.lora_{half}.weight":
            torch.randn((rank, size) if half == "A" else (size, rank), generator=generator)
        for layer in ("q_proj", "v_proj") for half in "AB"
    }  # fmt: skip
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
              "lora_alpha": rank, "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_adapters_are_chosen_by_name(folder: Path, tmp_path: Path, tokenizer: Tokenizer):
    """Each says what it says alone, whoever else is served. One that the command names is what is meant without a name.
    """
    one, two = (adapter(tmp_path / name, folder, seed) for seed, name in enumerate(["one", "two"]))
    where = torch.device("cpu"), torch.float32
    plain = {path.name: load_model(path, *where) for path in (folder, one, two)}
    prompt = tokenizer.encode("hello")
    wanted = {}
    for name, (model, _, stop_ids) in plain.items():
        ids = generate(model, prompt, 9, stop_ids, 0.0, vocab_size=tokenizer.vocab_size)
        wanted[name] = tokenizer.decode(list(ids))
    assert len(set(wanted.values())) == 3
    for path, adapters, names in (
        (folder, {"one": one, "two": two}, {"tiny": folder.name, "one": "one", "two": "two"}),
        (two, {"one": one}, {"tiny": "two", "tiny-base": folder.name, "one": "one"}),
    ):
        served = load(path, adapters, *where)
        offers = offers_of(served, path, "tiny")
        assert [offer.name for offer in offers] == list(names)
        service = Service(Generation(Engine(served, EngineOptions(max_running=8)), Catalog(offers)), 64)
        client = Client(partial(started, service))
        body = {"prompt": "hello", "max_tokens": 9, "temperature": 0}
        begun = [client.begin("POST", "/v1/completions", body | {"model": name}) for name in names]
        said = [exchange.wait().json for exchange in begun]
        assert [one["choices"][0]["text"] for one in said] == [wanted[name] for name in names.values()]
        assert client.post("/v1/completions", body).json["model"] == "tiny"
        assert client.post("/generate", {"inputs": "hello", "parameters": {"max_new_tokens": 9, "adapter_id": "one"}}
                           ).json == {"generated_text": wanted["one"]}  # fmt: skip
        service.close()
        client.close()
