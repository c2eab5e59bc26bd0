"""Bodies of every wrong kind against the server's endpoints, in this process, in front of a real engine."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("fastapi", reason="needs requirements-serve.txt")
pytest.importorskip("prometheus_client", reason="needs requirements-serve.txt")

from serving.api import new_app
from serving.catalog import Catalog
from serving.engine import Engine, EngineOptions
from serving.limits import Hosts, Keys, Limits
from serving.loading import load
from serving.offers import offers_of
from serving.service import Generation, Service
from tests.asgi import Client
from tests.chaos.serving_bodies import BASES, bodies, problem
from tests.served import tiny_tokenizer, write_model

SLOWEST_S = 5.0


class Place:
    """A server in this process, with a client."""

    def __init__(self, folder: Path):
        served = load(folder, {}, torch.device("cpu"), torch.float32)
        self.engine = Engine(served, EngineOptions(max_running=8, cache_tokens=512))
        generation = Generation(self.engine, Catalog(offers_of(served, folder, "tiny")))

        def build():
            self.service = Service(generation, 16)
            self.service.start()
            return new_app(self.service, Hosts("127.0.0.1", []), Keys([]), Limits())

        self.client = Client(build)

    def wait_until_idle(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            stats = self.service.stats()
            if not (stats.running or stats.waiting or stats.used_blocks or self.service.open):
                return
            assert time.monotonic() < deadline, stats
            time.sleep(0.01)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(write_model(tmp_path_factory.mktemp("fuzz") / "tiny", tiny_tokenizer(), context=96))
    yield place
    place.service.close()
    place.client.close()


def send_all(place: Place, seed: int, count: int) -> None:
    sound = {path: place.client.post(path, body) for path, body in BASES.items()}
    for path, reply in sound.items():
        assert reply.status == 200, (path, reply.body)
    bad, refused = [], 0
    for one in bodies(seed, count):
        # Of this process, since others may keep the machine busy.
        began = time.process_time()
        try:
            reply = place.client.post(one.path, one.content, dict(one.headers))
        except Exception as error:
            bad.append(f"{one.path}: {one.kind}: raised {error!r}")
            continue
        seconds = time.process_time() - began
        refused += reply.status >= 400
        wrong = problem(reply.status, reply.body) or ("" if reply.is_complete else "the answer has no end")
        if not wrong and seconds > SLOWEST_S:
            wrong = f"took {seconds:.1f} s"
        if wrong:
            bad.append(f"{one.path}: {one.kind}: {wrong}")
    assert not bad, f"{len(bad)} of {count}:\n" + "\n".join(bad[:20])
    # Most are wrong, and some are odd but sound: the generator makes both.
    assert count // 2 < refused < count
    place.wait_until_idle()
    for path, body in BASES.items():
        again = place.client.post(path, body)
        assert again.status == 200 and shape(again.body) == shape(sound[path].body), path


def shape(body: bytes) -> str:
    """An answer without what differs each time: ids and times."""
    return re.sub(rb'"(id|created|first_token_s|total_s|tokens_per_second|cached_tokens)":[^,}]*', b"", body).decode()


def test_500_kinds_of_bodies(place: Place):
    send_all(place, 1, 500)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 6))
def test_thousands_of_bodies(place: Place, seed: int):
    send_all(place, seed, 3000)
