"""Fixtures shared by all tests: a small corpus, pretokenized once, and a way to run the training script in-process."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data_preprocess.build_pretrain_sample_index_map import build
from data_preprocess.jobs import process_corpus
from data_preprocess.pretokenize_pretrain_data import PretrainJob
from data_preprocess.readers import Corpus
from demo.corpus import copy_standard_library
from tokenizer.hf_bbpe import train_hf_bbpe

SEQ_LEN = 64
TINY_MODEL = ["--hidden_size=64", "--num_hidden_layers=2", "--num_attention_heads=2", "--tie_word_embeddings"]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pretokenized modules of the standard library: vocabulary 512, index for SEQ_LEN."""
    home = tmp_path_factory.mktemp("data")
    copy_standard_library(home / "all")
    corpus = home / "corpus"
    corpus.mkdir()
    for path in sorted((home / "all").glob("*.py"))[:60]:
        os.replace(path, corpus / path.name)
    tokenizer = train_hf_bbpe((p.read_text("utf-8") for p in sorted(corpus.iterdir())), 512, show_progress=False)
    tokenizer.save_pretrained(home / "tokenizer")
    output = home / "tokens"
    corpus = Corpus(str(corpus))
    process_corpus(
        PretrainJob(corpus, str(output), str(home / "tokenizer"), valid_ratio=0.1, shard_bytes=300_000), num_workers=0
    )
    build(output, SEQ_LEN)
    return output


@pytest.fixture
def tiny_run(data_dir: Path, tmp_path: Path) -> list[str]:
    """Flags of a run that takes a second: a tiny model in float32."""
    return [
        f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'run'}", f"--max_seq_len={SEQ_LEN}", "--dtype=float32",
        "--device=cpu", "--train_batch_size=2", "--gradient_accumulation_steps=2", "--valid_iters=2", "--max_iters=4",
        "--learning_rate=1e-2", "--num_threads=1", "--sample_texts=0", *TINY_MODEL,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _restore_process_state():
    """Undo what an in-process training run sets: signal handlers, log handlers and the thread count."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    root, threads = logging.getLogger(), torch.get_num_threads()
    before = root.handlers[:]
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for handler in root.handlers:
        if handler not in before and isinstance(handler, logging.FileHandler):
            handler.close()
    root.handlers[:] = before
    torch.set_num_threads(threads)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Log of the monitor; `monitor_process.main` may have switched off propagation."""
    logger = logging.getLogger("monitor")
    before, logger.propagate = logger.propagate, True
    caplog.set_level(logging.INFO, "monitor")
    yield caplog
    logger.propagate = before
