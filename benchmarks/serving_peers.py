"""Programs that answer the same requests, for benchmarks/serving.py. All in one process, with as many threads each.

    ours           serving/engine.py
    transformers   model.generate of a static batch: prompts padded on the left, until the longest text has ended
    continuous     model.generate_batch, transformers' continuous batching
    llama.cpp      its server's slots, through xllamacpp, on a GGUF of the same folder

Each decodes greedily to a given number of tokens, whatever they are.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from benchmarks import gguf_file


class Job(NamedTuple):
    """A request."""

    prompt_ids: list[int]
    num_new: int


class Answer(NamedTuple):
    """Text of a job."""

    ids: list[int]
    first: float
    """Seconds from the start of all jobs to the first token."""


class Run(NamedTuple):
    """What became of some jobs."""

    answers: list[Answer]
    seconds: float
    """From the first job's arrival to the last token."""


class Contender(Protocol):
    def run(self, jobs: Sequence[Job]) -> Run:
        """Answer all jobs, which come at the same time."""

    def close(self) -> None:
        """Free its memory."""


class Ours:
    """The engine."""

    def __init__(self, folder: Path, dtype: torch.dtype, options: dict[str, Any]):
        from serving.engine import Engine, EngineOptions
        from serving.loading import load

        self.engine = Engine(load(folder, {}, torch.device("cpu"), dtype), EngineOptions(**options))
        self._count = 0

    def run(self, jobs: Sequence[Job]) -> Run:
        from serving.requests import Request, Sampling

        start = time.perf_counter()
        ids: dict[str, list[int]] = {}
        firsts: dict[str, float] = {}
        for job in jobs:
            self._count += 1
            sampling = Sampling(max_new_tokens=job.num_new, temperature=0.0, ignores_eos=True)
            name = str(self._count)
            ids[name] = []
            self.engine.submit(Request(name, tuple(job.prompt_ids), sampling))
        while self.engine.has_work:
            for piece in self.engine.step():
                if piece.tokens:
                    firsts.setdefault(piece.request, time.perf_counter() - start)
                    ids[piece.request] += [token.id for token in piece.tokens]
        return Run([Answer(ids[name], firsts[name]) for name in ids], time.perf_counter() - start)

    def close(self) -> None:
        del self.engine


class _Theirs:
    """A model of transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        self.model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)

    def close(self) -> None:
        del self.model


class Transformers(_Theirs):
    """`generate` of a static batch."""

    def run(self, jobs: Sequence[Job]) -> Run:
        start = time.perf_counter()
        width = max(len(job.prompt_ids) for job in jobs)
        ids_BT = torch.tensor([[0] * (width - len(job.prompt_ids)) + job.prompt_ids for job in jobs])
        mask_BT = torch.tensor([[0] * (width - len(job.prompt_ids)) + [1] * len(job.prompt_ids) for job in jobs])
        watch = _FirstToken(start)
        found_BT = self.model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=max(job.num_new for job in jobs),
            stopping_criteria=[watch],
        )  # fmt: skip
        seconds = time.perf_counter() - start
        answers = (Answer(row[width : width + job.num_new], watch.seconds) for row, job in zip(found_BT.tolist(), jobs))
        return Run(list(answers), seconds)


class _FirstToken:
    """Stops nothing, and takes the time of the first token."""

    def __init__(self, start: float):
        self.start, self.seconds = start, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.seconds = self.seconds or time.perf_counter() - self.start
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Continuous(_Theirs):
    """Continuous batching. Its generation thread lives for a run alone, since it is never idle."""

    PAGE = 64

    def __init__(self, folder: Path, dtype: torch.dtype):
        super().__init__(folder, dtype)
        self.model.generation_config.eos_token_id = -1

    def run(self, jobs: Sequence[Job]) -> Run:
        from transformers import ContinuousBatchingConfig

        # By default, its cache would take nearly all memory of the machine.
        blocks = sum(-(-(len(job.prompt_ids) + job.num_new) // self.PAGE) + 1 for job in jobs)
        config = ContinuousBatchingConfig(page_size=self.PAGE, num_blocks=blocks + 4, max_batch_tokens=512)
        with self.model.continuous_batching_context_manager(
            generation_config=self.model.generation_config, continuous_batching_config=config, block=True, timeout=60
        ) as manager:
            # It takes memory and compiles what it does with the first request.
            self._answers(manager, jobs[:1])
            return self._answers(manager, jobs)

    def _answers(self, manager: Any, jobs: Sequence[Job]) -> Run:
        start = time.perf_counter()
        names = [
            manager.add_request(job.prompt_ids, max_new_tokens=job.num_new, record_timestamps=True) for job in jobs
        ]
        found: dict[str, Any] = {}
        while len(found) < len(names):
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                found[output.request_id] = output
            elif output is None and not manager.is_running():
                raise RuntimeError("transformers' continuous batching has stopped")
        seconds = time.perf_counter() - start
        outputs = [found[name] for name in names]
        return Run([Answer(out.generated_tokens, out.timestamps[0] - start) for out in outputs], seconds)


class LlamaCpp:
    """The server of llama.cpp, in this process."""

    def __init__(self, folder: Path, file: Path, dtype: torch.dtype, threads: int, slots: int, context: int):
        import xllamacpp

        gguf_file.write(folder, file, dtype)
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_parallel, params.n_ctx = slots, slots * context
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.n_gpu_layers = params.verbosity = 0
        if dtype == torch.float32:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self.server = xllamacpp.Server(params)

    def run(self, jobs: Sequence[Job]) -> Run:
        start = time.perf_counter()
        firsts, texts = [0.0] * len(jobs), [""] * len(jobs)

        def ask(number: int, job: Job) -> None:
            def take(chunk: dict) -> bool:
                firsts[number] = firsts[number] or time.perf_counter() - start
                texts[number] += chunk["choices"][0]["text"]
                return False

            self.server.handle_completions(
                {
                    "prompt": job.prompt_ids, "max_tokens": job.num_new, "temperature": 0.0, "ignore_eos": True,
                    "stream": True, "cache_prompt": False,
                }, take,
            )  # fmt: skip

        threads = [Thread(target=ask, args=numbered) for numbered in enumerate(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.perf_counter() - start
        return Run([Answer(gguf_file.ids_of(text), first) for text, first in zip(texts, firsts)], seconds)

    def close(self) -> None:
        del self.server
