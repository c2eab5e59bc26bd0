"""Cost of compression in quality: held-out loss of each hook on the demo's corpus, after equal tokens.

    python -m benchmarks.quality_under_compression --dir out/quality [--ranks 4,8,16,32] [--more_seeds 1,2]

Every run is the real command on two processes with the same order and schedule; only the hook differs. PowerSGD sends
bf16 factors, after a tenth of the steps without compression; one run compresses from the first step on. Runs that
differ only in their seed end about 1% apart, and so do runs that differ only in the last bit: use several seeds to see
smaller differences. Writes table.md, losses.json and, with matplotlib, losses.png into --dir. A finished run is not
repeated.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import statistics
from pathlib import Path

from demo.run import ROOT, data_stages, run
from runs.layout import RunPaths
from runs.reslog import read_reslog
from utils.paths import a_path
from utils.terminal import run_main

Points = list[tuple[int, float, float]]
"""(step, held-out loss, bits per byte)"""


def contenders(ranks: list[int], start: int) -> dict[str, list[str]]:
    """Name -> flags; PowerSGD compresses from step `start` on."""
    chosen = {"plain": [], "bf16": ["--use_bf16_compress_hook"]}
    for rank in ranks:
        powersgd = ["--use_powerSGD_hook", "--use_bf16_compress_hook", f"--matrix_approximation_rank={rank}"]
        chosen[f"PowerSGD {rank}"] = [*powersgd, f"--start_powerSGD_iter={start}"]
        if rank == 16:
            chosen["PowerSGD 16, from the first step"] = powersgd
    return chosen


def records_of(run_dir: Path, name: str) -> list[dict]:
    path = RunPaths(run_dir).reslog
    return [record for record in read_reslog(path) if record["name"] == name] if path.exists() else []


def valid_losses(run_dir: Path) -> Points:
    return [(r["step"], r["loss"], r["bits_per_byte"]) for r in records_of(run_dir, "valid")]


def run_dir_of(home: Path, name: str, seed: int) -> Path:
    return home / f"seed-{seed}" / name.replace(",", "").replace(" ", "-")


def table(results: dict[str, dict[int, Points]], ratios: dict[str, float]) -> str:
    lines = [
        "| hook | elements on the wire | held-out loss, by seed | bits per byte | against plain, mean (each) |",
        "|---|---|---|---|---|",
    ]
    plain = {seed: points[-1][1] for seed, points in results["plain"].items()}
    for name, by_seed in results.items():
        losses = ", ".join(f"{points[-1][1]:.4f}" for points in by_seed.values())
        bits = statistics.mean(points[-1][2] for points in by_seed.values())
        differences = [100 * (points[-1][1] / plain[seed] - 1) for seed, points in by_seed.items()]
        each = ", ".join(f"{difference:+.2f}" for difference in differences)
        lines.append(
            f"| {name} | 1 : {ratios.get(name, 1.0):.1f} | {losses} | {bits:.4f} | "
            f"{statistics.mean(differences):+.2f}% ({each}) |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, dict[int, Points]], path: Path) -> None:
    """Draw the curves of the first seed, and each hook's difference from plain, averaged over the seeds."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, differences) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, by_seed in results.items():
        first = next(iter(by_seed.values()))
        steps = [step for step, _, _ in first]
        curves.plot(steps, [loss for _, loss, _ in first], label=name, linewidth=1.2, marker=".")
        relative = [
            statistics.mean(100 * (by_seed[seed][i][1] / results["plain"][seed][i][1] - 1) for seed in by_seed)
            for i in range(len(steps))
        ]
        differences.plot(steps, relative, label=f"{name} ({len(by_seed)} seeds)", linewidth=1.2, marker=".")
    curves.set(xlabel="step", ylabel="held-out loss (nats a token)", title="Held-out loss, first seed")
    differences.axhspan(-0.5, 0.5, alpha=0.12, color="gray")
    differences.set(xlabel="step", ylabel="difference to plain (%)", title="Difference to plain; grey: within 0.5%")
    differences.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.quality_under_compression", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", type=a_path, default="out/quality")
    parser.add_argument("--max_iters", type=int, default=320)
    parser.add_argument("--ranks", default="4,8,16,32")
    parser.add_argument("--seeds", default="1337", help="seeds of all hooks")
    parser.add_argument("--more_seeds", default="", help="further seeds, of plain and --more_ranks only")
    parser.add_argument("--more_ranks", default="16")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--nproc", type=int, default=2)
    args = parser.parse_args()
    ranks, seeds, more_seeds, more_ranks = (
        [int(item) for item in text.split(",") if item]
        for text in (args.ranks, args.seeds, args.more_seeds, args.more_ranks)
    )
    home = ROOT / args.dir
    data = home / "data"
    if not (data / "pretokenize.json").exists():
        for _, command in data_stages(str(home / "corpus"), str(home / "tokenizer"), str(data)):
            run(command)
    often_run = {"plain", *(f"PowerSGD {rank}" for rank in more_ranks)}
    results: dict[str, dict[int, Points]] = {}
    ratios: dict[str, float] = {}
    for name, flags in contenders(ranks, args.max_iters // 10).items():
        for seed in seeds + (more_seeds if name in often_run else []):
            run_dir = run_dir_of(home, name, seed)
            points = valid_losses(run_dir)
            if not points or points[-1][0] < args.max_iters:
                run([
                    "python", "-m", "parallel.launch", f"--nproc_per_node={args.nproc}", "train_my_ddp.py",
                    "benchmarks/quality_under_compression.yaml", f"--data_dir={data}", f"--out_dir={run_dir}",
                    f"--seed={seed}", f"--max_iters={args.max_iters}", f"--dtype={args.dtype}",
                    f"--valid_interval={max(1, args.max_iters // 8)}", "--log_interval=20", "--num_threads=1", *flags,
                ])  # fmt: skip
            results.setdefault(name, {})[seed] = valid_losses(run_dir)
            for record in records_of(run_dir, "compression"):
                ratios[name] = record["ratio"]
    text = table(results, ratios)
    (home / "table.md").write_text(text)
    (home / "losses.json").write_text(json.dumps(results, indent=1))
    print(text)
    plot(results, home / "losses.png")


if __name__ == "__main__":
    run_main(main)
