"""Memory of each rank while a model gets its first weights: from a folder of 8 files, and drawn anew.

    python -m benchmarks.sharded_start [--layers 15] [--ranks 2 4] [--folder FOLDER]

Writes a llama with random float32 weights (1 GB by default) into FOLDER, or a temporary one, and builds it on gloo
ranks as a run does: whole on each rank (DDP), and cut by FSDP. Each row is a group of processes of its own; the figures
are those of the rank that needed most, beyond what it needed before, when it had all code:

    allocated   peak of the anonymous memory (RssAnon, read every 2 ms); what lies in mapped files does not count
    resident    peak of the resident memory (VmHWM), with pages of mapped files that the system may drop at any time
    formula     the rank's own rows, and with FSDP the largest parameter
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import gc
import json
import platform
import subprocess
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.step_memory import give_back_freed_memory, status_bytes
from model import ModelConfig, hf
from model.families.llama import LLAMA
from model.hf_files import INDEX
from parallel import ParallelConfig, destroy_context, init_context
from parallel.engines import model_cutter
from parallel.mesh import plan_mesh
from training.build_model import build_model
from training.config import SystemConfig
from utils.machine import cpu_name
from utils.terminal import run_main

MB, FILES, DTYPE = 1e6, 8, torch.float32
MODES = {"DDP": ParallelConfig(), "FSDP": ParallelConfig(data_parallel="fsdp")}
BEGINS = ("folder", "new")


def config_of(layers: int, hidden_size: int = 1024, vocab_size: int = 32000) -> ModelConfig:
    return ModelConfig(
        model_type="llama", vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers,
        num_attention_heads=16, max_position_embeddings=2048,
    ).resolve()  # fmt: skip


def write_folder(directory: Path, config: ModelConfig) -> None:
    """Random weights in 8 files of about the same size, without the whole model in memory."""
    named = hf.named_weights(hf.outline(config))
    share, index, files = sum(t.numel() for t in named.values()) / FILES, {}, [{} for _ in range(FILES)]
    done = 0
    for name, tensor in named.items():
        files[min(int(done / share), FILES - 1)][name] = tensor.shape
        done += tensor.numel()
    for number, shapes in enumerate(files, 1):
        file = f"model-{number:05d}-of-{FILES:05d}.safetensors"
        tensors = {name: torch.randn(shape, generator=torch.Generator().manual_seed(number)) * 0.02
                   for name, shape in shapes.items()}  # fmt: skip
        save_file(tensors, directory / file, {"format": "pt"})
        index |= dict.fromkeys(shapes, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(hf.to_hf_config(config, DTYPE, family=LLAMA)))


class Peak:
    """Largest anonymous memory, read by a thread."""

    def __init__(self):
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._ended.wait(0.002):
            self.bytes = max(self.bytes, status_bytes("RssAnon"))

    @contextmanager
    def watched(self):
        Path("/proc/self/clear_refs").write_text("5")
        self._thread.start()
        try:
            yield
        finally:
            self._ended.set()
            self._thread.join()


def measure(mode: str, begins: str, folder: Path, config: ModelConfig) -> None:
    """Program of a row, on each of its ranks: the first prints a line of JSON."""
    give_back_freed_memory()
    torch.set_num_threads(1)
    context = init_context("cpu")
    mesh = plan_mesh(MODES[mode], context)
    cutter = model_cutter(MODES[mode], context, mesh, DTYPE)

    def build(shape: ModelConfig, weights: Path | None) -> torch.nn.Module:
        return build_model(shape, SystemConfig(), 0, context.device, DTYPE, weights, cutter=cutter)

    # A small model first, which loads all code.
    small = config_of(1, 64, 64)
    build(small, None)
    hf.outline_in(small, context.device, DTYPE)
    hf.check_weights(config, folder)
    gc.collect()
    before, resident, peak = status_bytes("RssAnon"), status_bytes("VmRSS"), Peak()
    context.barrier()
    with peak.watched():
        started = time.perf_counter()
        model = build(config, folder if begins == "folder" else None)
        seconds = time.perf_counter() - started
    kept = status_bytes("RssAnon") - before
    rows = [memory for parameter in model.parameters() for memory, _ in model.filling.held(parameter).parts]
    found = {
        "own": sum(tensor.numel() for tensor in rows) * 4, "kept": kept, "allocated": peak.bytes - before,
        "resident": status_bytes("VmHWM") - resident, "seconds": seconds,
    }  # fmt: skip
    everyone = context.gather(found)
    if context.is_main:
        print(json.dumps({name: max(each[name] for each in everyone) for name in found}))
    destroy_context(context)


def line_of(mode: str, begins: str, ranks: int, found: dict[str, float], largest: int) -> str:
    formula = found["own"] + (largest if mode == "FSDP" else 0)
    cells = [f"{value / MB:,.0f}" for value in (formula, found["allocated"], found["kept"], found["resident"])]
    return f"| {mode} | {begins} | {ranks} | {' | '.join(cells)} | {found['seconds']:.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.sharded_start", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = config_of(args.layers)
    if args.row:
        return measure(*args.row, args.folder, config)
    sizes = [parameter.numel() * 4 for parameter in hf.outline(config).parameters()]
    print(f"{cpu_name()}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"{sum(sizes) / MB:,.0f} MB of float32 weights, the largest parameter {max(sizes) / MB:,.0f} MB; MB a rank\n")
    print("| | weights | ranks | formula | allocated, peak | then kept | resident, peak | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made)
        if not (folder / INDEX).exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_folder(folder, config)
        for ranks in args.ranks:
            for mode in MODES:
                for begins in BEGINS:
                    command = [
                        sys.executable, "-m", "parallel.launch", "--standalone", f"--nproc_per_node={ranks}", "-m",
                        "benchmarks.sharded_start", "--row", mode, begins, f"--folder={folder}",
                        f"--layers={args.layers}",
                    ]  # fmt: skip
                    done = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    found = json.loads(next(line for line in done.splitlines() if line.startswith("{")))
                    print(line_of(mode, begins, ranks, found, max(sizes)), flush=True)


if __name__ == "__main__":
    run_main(main)
