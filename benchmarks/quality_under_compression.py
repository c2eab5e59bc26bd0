"""What compression costs in quality: the demo's corpus and model, equal tokens, held-out loss of each hook.

    python -m benchmarks.quality_under_compression --dir out/quality [--max_iters 320] [--ranks 4,8,16,32]

Every run is the real command on two processes with the same seed, order and schedule; only the hook differs. PowerSGD
sends bf16 factors, after a tenth of the steps without compression; one run compresses from the first step on. A plain
run with another seed shows how far apart two equal runs lie. Writes table.md, losses.json and, with matplotlib,
losses.png into --dir; a run that has finished already is not repeated.
"""

import argparse
import json
from pathlib import Path

from demo.run import ROOT, data_stages, run
from utils.reslog import read_reslog


def contenders(ranks: list[int], start: int) -> dict[str, list[str]]:
    """Name -> flags; PowerSGD compresses from step `start` on."""
    chosen = {"plain": [], "plain, other seed": ["--seed=1"], "bf16": ["--use_bf16_compress_hook"]}
    for rank in ranks:
        powersgd = ["--use_powerSGD_hook", "--use_bf16_compress_hook", f"--matrix_approximation_rank={rank}"]
        chosen[f"PowerSGD {rank}"] = [*powersgd, f"--start_powerSGD_iter={start}"]
        if rank == 16:
            chosen["PowerSGD 16, from the first step"] = powersgd
    return chosen


def valid_losses(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, held-out loss, bits per byte) of a run."""
    path = run_dir / "reslog.jsonl"
    records = read_reslog(path) if path.exists() else []
    return [(r["step"], r["loss"], r["bits_per_byte"]) for r in records if r["name"] == "valid"]


def table(results: dict[str, list[tuple[int, float, float]]], home: Path) -> str:
    lines = ["| hook | elements on the wire | held-out loss | bits per byte | against plain |", "|---|---|---|---|---|"]
    plain = results["plain"][-1][1]
    for name, points in results.items():
        records = read_reslog(run_dir_of(home, name) / "reslog.jsonl")
        ratio = [r["ratio"] for r in records if r["name"] == "compression"]
        _, loss, bits = points[-1]
        wire = f"1 : {ratio[-1]:.1f}" if ratio else "1 : 1"
        lines.append(f"| {name} | {wire} | {loss:.4f} | {bits:.4f} | {100 * (loss / plain - 1):+.2f}% |")
    return "\n".join(lines) + "\n"


def run_dir_of(home: Path, name: str) -> Path:
    return home / "runs" / name.replace(",", "").replace(" ", "-")


def plot(results: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, differences) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    plain = {step: loss for step, loss, _ in results["plain"]}
    for name, points in results.items():
        steps = [step for step, _, _ in points]
        curves.plot(steps, [loss for _, loss, _ in points], label=name, linewidth=1.2, marker=".")
        relative = [100 * (loss / plain[step] - 1) for step, loss, _ in points]
        differences.plot(steps, relative, label=name, linewidth=1.2, marker=".")
    curves.set(xlabel="step", ylabel="held-out loss (nats a token)", title="Held-out loss")
    differences.axhspan(-0.5, 0.5, alpha=0.12, color="gray")
    differences.set(xlabel="step", ylabel="difference to plain (%)", title="Difference to plain; grey: within 0.5%")
    differences.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.quality_under_compression", description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default="out/quality")
    parser.add_argument("--max_iters", type=int, default=320)
    parser.add_argument("--ranks", default="4,8,16,32")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--nproc", type=int, default=2)
    args = parser.parse_args()
    home = Path(args.dir)
    data = home / "data"
    if not (ROOT / data / "pretokenize.json").exists():
        for _, command in data_stages(str(home / "corpus"), str(home / "tokenizer"), str(data)):
            run(command)
    results = {}
    ranks = [int(rank) for rank in args.ranks.split(",")]
    for name, flags in contenders(ranks, args.max_iters // 10).items():
        run_dir = run_dir_of(home, name)
        points = valid_losses(ROOT / run_dir)
        if not points or points[-1][0] < args.max_iters:
            run([
                "torchrun", "--standalone", f"--nproc_per_node={args.nproc}", "train_my_ddp.py",
                "configs/demo-cpu.yaml", f"--data_dir={data}", f"--out_dir={run_dir}", f"--max_iters={args.max_iters}",
                f"--dtype={args.dtype}", f"--valid_interval={max(1, args.max_iters // 8)}", "--log_interval=20",
                "--num_threads=1", *flags,
            ])  # fmt: skip
        results[name] = valid_losses(ROOT / run_dir)
    text = table(results, ROOT / home)
    (ROOT / home / "table.md").write_text(text)
    (ROOT / home / "losses.json").write_text(json.dumps(results, indent=1))
    print(text)
    plot(results, ROOT / home / "losses.png")


if __name__ == "__main__":
    main()
