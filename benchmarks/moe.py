"""The layer with experts against transformers' mixtral block of equal weights, and a sparse model against a dense one.

    OMP_NUM_THREADS=2 python -m benchmarks.moe --dtype float32
    OMP_NUM_THREADS=2 python -m benchmarks.moe --dtype bfloat16
    python -m benchmarks.moe --device cuda --dtype bfloat16 --hidden_size 2048 --width 5632 --rows 16 --seq_len 1024

First the layer alone, forward and backward: transformers' block with each of its implementations of experts that fits
into memory (grouped_mm is what its models take by default; batched_mm copies the matrices for each token and does not
fit), ours with each of our kernels. Then a whole training step, AdamW and the router's losses included, of a dense
model and of a sparse one in which as many parameters multiply a token.

Contenders take turns, in a rotating order. Prints median and quartiles, tokens a second, the share of the best matmul
(measured in each round on a CPU, whose speed may change), and the medians over the rounds of the ratio to transformers'
default. --clock cpu counts the process's CPU seconds in place of time, for a machine on which others work.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from benchmarks.ddp import describe
from benchmarks.model_step import VOCAB_SIZE, our_step
from model import Decoder, ModelConfig, flops
from model.moe import SparseMLP
from model.ops import IMPLEMENTATIONS, REFERENCE, build_ops
from utils.machine import cpu_name, keep_freed_memory
from utils.terminal import run_main

Step = Callable[[], object]
THEIR_DEFAULT = "transformers grouped_mm"


def their_blocks(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[str, torch.nn.Module]:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    blocks = {}
    for implementation in ("eager", "grouped_mm"):
        theirs = MixtralConfig(
            hidden_size=config.hidden_size, intermediate_size=config.moe_intermediate_size,
            num_local_experts=config.num_local_experts, num_experts_per_tok=config.num_experts_per_tok,
        )  # fmt: skip
        theirs._experts_implementation = implementation
        block = MixtralSparseMoeBlock(theirs)
        block.load_state_dict({name.replace("router", "gate"): weight for name, weight in weights.items()})
        blocks[f"transformers {implementation}"] = block
    return blocks


def our_blocks(
    config: ModelConfig, weights: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.nn.Module]:
    blocks = {}
    for name, found in IMPLEMENTATIONS["experts"].items():
        if found.why_not(device, dtype) is None:
            block = SparseMLP(config, build_ops(dict(REFERENCE.names) | {"experts": name}))
            block.load_state_dict(weights)
            blocks[f"ours {name}"] = block
    return blocks


def passes(block: torch.nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """Function that runs both passes; returns the output."""
    x = x.clone().requires_grad_()

    def step() -> Tensor:
        # As in training, gradients are added to memory that is there.
        for leaf in (x, *block.parameters()):
            if leaf.grad is not None:
                leaf.grad.zero_()
        y = block(x)
        y = y if isinstance(y, Tensor) else y[0]
        y.backward(dy)
        return y.detach()

    return step


def kept_bytes(block: torch.nn.Module, step: Step) -> int:
    """Bytes that a layer keeps for its backward pass, besides its parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(kept.values())


def layer_steps(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, rows: int, width: int
) -> dict[str, Step]:
    """Contender -> function that runs both passes of its layer, after a check that all give the same."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(parameter.shape, generator=generator) * 0.02
        for name, parameter in SparseMLP(config).named_parameters()
    }
    x, dy = (torch.randn(rows, width, config.hidden_size, generator=generator).to(device, dtype) for _ in range(2))
    blocks = their_blocks(config, weights) | our_blocks(config, weights, device, dtype)
    steps = {name: passes(block.to(device=device, dtype=dtype), x, dy) for name, block in blocks.items()}
    kept = {name: kept_bytes(blocks[name], step) / 1e6 for name, step in steps.items()}
    print("kept for the backward pass: " + ", ".join(f"{name} {size:.1f} MB" for name, size in kept.items()))
    outputs = {name: step() for name, step in steps.items()}
    expected = outputs[THEIR_DEFAULT].float()
    for name, y in outputs.items():
        # In bfloat16 a token may be sent elsewhere: transformers rounds the router's scores.
        differing = ((y.float() - expected).norm(dim=-1) > 0.02 * expected.norm(dim=-1)).float().mean().item()
        assert differing <= (0.0 if dtype == torch.float32 else 0.05), (name, differing)
    return dict(steps)


def take_turns(
    steps: Mapping[str, Step], rounds: int, device: torch.device, dtype: torch.dtype, clock: Callable[[], float]
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each contender in each round, and the best matmul's FLOP/s."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    peaks = []
    orders = itertools.cycle(itertools.islice(itertools.permutations(steps), 0, None, 7))
    for number in range(-1, rounds):
        if number >= 0:
            # nan: the table lacks this GPU.
            peaks.append(flops.device_peak_flops(device, dtype) or math.nan)
        for name in next(orders):
            started = clock()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append(clock() - started)
    return seconds, peaks


def show(
    seconds: dict[str, list[float]], peaks: list[float], tokens: int, operations: Mapping[str, float], against: str
) -> None:
    for name, times in seconds.items():
        median = statistics.median(times)
        share = statistics.median(tokens * operations[name] / t / peak for t, peak in zip(times, peaks))
        ratio = statistics.median(b / a for a, b in zip(times, seconds[against]))
        print(f"{describe(name, times)}   {tokens / median:9,.0f} tokens/s {share:6.1%}   {ratio:.2f}x {against}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moe", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024, help="of an expert")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--chosen", type=int, default=2, help="experts a token")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4, help="of the models")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--step_rounds", type=int, default=5, help="of the models' steps; 0: the layer alone")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    args = parser.parse_args()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]
    if device.type == "cpu":
        keep_freed_memory()
    common = {
        "vocab_size": VOCAB_SIZE, "hidden_size": args.hidden_size, "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 64,
    }  # fmt: skip
    sparse = ModelConfig(
        intermediate_size=args.width, num_local_experts=args.experts, num_experts_per_tok=args.chosen, **common
    ).resolve(max_seq_len=args.seq_len)
    dense = ModelConfig(intermediate_size=args.chosen * args.width, **common).resolve(max_seq_len=args.seq_len)
    tokens = args.rows * args.seq_len
    cpu = f"{torch.get_num_threads()} threads of {cpu_name()}"
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    print(f"{machine}, torch {torch.__version__}, Python {platform.python_version()}, {args.dtype}, {args.clock} clock")

    print(f"\nlayer: {args.experts} experts of width {args.width}, {args.chosen} a token, {args.hidden_size} wide, "
          f"{args.rows} x {args.seq_len} tokens, {args.rounds} rounds")  # fmt: skip
    steps = layer_steps(sparse, device, dtype, args.rows, args.seq_len)
    seconds, peaks = take_turns(steps, args.rounds, device, dtype, clock)
    print(f"best matmul of a round: median {statistics.median(peaks) / 1e9:,.0f} GFLOP/s, "
          f"{min(peaks) / 1e9:,.0f} .. {max(peaks) / 1e9:,.0f}")  # fmt: skip
    of_token = 6.0 * args.hidden_size * (args.experts + 3 * args.chosen * args.width)
    show(seconds, peaks, tokens, dict.fromkeys(steps, of_token), THEIR_DEFAULT)
    if not args.step_rounds:
        return

    del steps
    rows = torch.randint(0, VOCAB_SIZE, (args.rows, args.seq_len + 1), generator=torch.Generator().manual_seed(0))
    configs = {"dense": dense, "sparse": sparse}
    models = {name: our_step(config, dtype, device, rows.to(device), False, "auto") for name, config in configs.items()}
    told = ", ".join(
        f"{name} {sum(p.numel() for p in Decoder(config).parameters()) / 1e6:.1f} M parameters "
        f"({flops.active_parameters(config) / 1e6:.1f} M multiply a token)"
        for name, config in configs.items()
    )
    print(f"\nstep: {args.layers} layers, {told}, {args.step_rounds} rounds")
    seconds, peaks = take_turns(models, args.step_rounds, device, dtype, clock)
    operations = {name: flops.flops_per_token_strict(config, args.seq_len) for name, config in configs.items()}
    show(seconds, peaks, tokens, operations, "dense")


if __name__ == "__main__":
    run_main(main)
