"""Takes the pictures of docs/viewing.md: `python docs/screenshots.py` opens the viewer's window in each of its states.

Runs are made up, but for --run, such as the demo's. On a machine without a screen: under Xvfb, or with
QT_QPA_PLATFORM=offscreen. The remote picture needs an OpenSSH server, see tests/sshd.py.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check("requirements-viewer.txt")

import argparse
import json
import math
import os
import random
import subprocess
import tempfile
import time
from pathlib import Path

from PIL import Image

from runs.layout import CONFIG_NAME, RESLOG_NAME
from utils.paths import a_path
from utils.terminal import run_main

ROOT = Path(__file__).resolve().parent.parent


def make_run(
    directory: Path, steps: int, number: int = 0, of: int | None = None, quiet_s: float = 0.0, resumed: bool = False
) -> Path:
    """Directory of a run that has done `steps` of `of` steps and was last heard of `quiet_s` seconds ago."""
    directory.mkdir(parents=True)
    random_, of = random.Random(number), of or steps
    moment = time.time() - quiet_s - 1.2 * steps * (1.2 if resumed else 1) - 2
    rate = 1e-3 / (1 + number % 3)
    with open(directory / RESLOG_NAME, "w") as file:

        def write(name: str, **values: object) -> None:
            file.write(json.dumps({"name": name, "time": round(moment, 3), **values}) + "\n")

        write("start", step=0, attempt=1, max_iters=of, task="pretrain")
        step, lost = 0, resumed
        while step < steps:
            step += 1
            moment += 1.2 * random_.uniform(0.97, 1.03)
            smooth = 2.1 + 6.9 * math.exp(-14 * step / of) + 0.7 * math.exp(-3 * step / of) + 0.05 * (number % 5)
            noise = random_.gauss(0, 0.06)
            rises = min(1.0, 20 * step / of)
            write(
                "train", step=step, loss=smooth + noise, bits_per_byte=(smooth + noise) / 2.9, tokens=step * 65536,
                lr=rate * rises * (0.55 + 0.45 * math.cos(math.pi * step / of)), dt=1.2, grad_norm=0.5
                + 3 * math.exp(-30 * step / of) + abs(random_.gauss(0, 0.1)) + 6 * (random_.random() < 1e-3),
                tokens_per_sec=54000 * random_.uniform(0.97, 1.02), mfu=0.41 * random_.uniform(0.97, 1.02),
                data_wait=4e-4 * random_.uniform(0.5, 2), comm_wait=0.012 * random_.uniform(0.6, 1.6),
            )  # fmt: skip
            if step % max(of // 12, 1) == 0:
                write("valid", step=step, loss=smooth + 0.04, bits_per_byte=(smooth + 0.04) / 2.9, dt=3.0)
                write("save", step=step, path=f"step-{step}", dt=0.4, held_up=0.004)
            if lost and step == int(0.6 * of):
                lost, moment, step = False, moment + 300, int(0.55 * of)
                write("start", step=step, attempt=2, max_iters=of)
        if steps == of:
            write("end", step=step, reason="finished")
    config = [f"learning_rate: {rate}", f"seed: {number}", f"matrix_approximation_rank: {4 << number % 4}"]
    (directory / CONFIG_NAME).write_text("\n".join([*config, f"derived:\n  max_iters: {of}\n"]))
    return directory


def picture(path: Path, home: Path, arguments: list[str], seconds: float = 6.0, does: str = "") -> None:
    """Open the viewer in a process of its own, as a user in the directory `home` would, and save a picture of it."""
    code = (
        "import sys\nfrom PyQt5.QtCore import QPoint, QTimer, Qt\nfrom PyQt5.QtGui import QFont\n"
        "from PyQt5.QtTest import QTest\nfrom PyQt5.QtWidgets import QApplication\n"
        "from viewer import command\n"
        "from viewer.desktop import window\n"
        "app = QApplication(['resplot'])\n"
        "app.setFont(QFont('DejaVu Sans', 9))\n"
        "def end():\n"
        "    shown = [w for w in app.topLevelWidgets() if isinstance(w, window.Window)][0]\n"
        f"    shown.grab().save({str(path)!r})\n    print({str(path.name)!r}, app.platformName())\n"
        "    shown.close()\n    app.quit()\n"
        "def act():\n"
        "    shown = [w for w in app.topLevelWidgets() if isinstance(w, window.Window)][0]\n"
        f"    {does or 'pass'}\n"
        f"QTimer.singleShot({int(600 * seconds)}, act)\nQTimer.singleShot({int(1000 * seconds)}, end)\n"
        f"sys.exit(command.main({['--forget_layout', *arguments]!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=home, env=environment)
    shrink(path)


def shrink(path: Path) -> None:
    """Reduce the shades to fewer than the eye tells apart, which halves the file. White stays white."""
    coarse = Image.open(path).convert("RGB").point(lambda value: round(value / 8.5) * 8.5)
    coarse.save(path, optimize=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run", type=a_path, default="out/demo/run", help="a real run for the first picture (default: the demo's)"
    )
    parser.add_argument("--to", type=a_path, default=str(ROOT / "docs" / "images"))
    parser.add_argument("--only", help="names of pictures, with commas between")
    args = parser.parse_args()
    # The viewer runs in other directories.
    to = Path(args.to).resolve()
    to.mkdir(parents=True, exist_ok=True)
    english = ["--language", "en"]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)

        def one(to: Path) -> None:
            over = "c = shown.canvas; QTest.mouseMove(c, QPoint(int(0.22 * c.width()), int(0.2 * c.height())))"
            picture(to, ROOT, [*english, args.run], does=over)

        def ten(to: Path) -> None:
            for number in range(10):
                make_run(home / "sweep" / f"rank-{4 << number % 4}-seed-{number}", 4000, number, resumed=number == 2)
            picture(to, home, [*english, "sweep"], 12, "shown.difference_dock.show()")

        def stalled(to: Path) -> None:
            make_run(home / "runs" / "stalled", 900, 1, of=2000, quiet_s=1500)
            make_run(home / "runs" / "well", 1100, 2, of=2000)
            picture(to, home, [*english, "--panels", "loss,tokens_per_sec", "runs"])

        def dark(to: Path) -> None:
            make_run(home / "night", 2600, 3, of=3000, resumed=True)
            picture(to, home, [*english, "--theme", "dark", "--x", "time", "--log", "night"])

        def chinese(to: Path) -> None:
            for number, name in enumerate(("基线", "低秩压缩")):
                make_run(home / "实验" / name, 1500, number)
            picture(to, home, ["--language", "zh", "--panels",
                               "loss,lr,grad_norm,tokens_per_sec", "实验"])  # fmt: skip

        def remote(to: Path) -> None:
            from tests.sshd import Sshd

            make_run(home / "local", 1500, 4)
            # What a path without a leading slash begins with, there.
            with tempfile.TemporaryDirectory(dir=Path.home(), prefix="runs-") as there, Sshd(home / "sshd") as sshd:
                make_run(Path(there) / "long", 1300, 5, of=2000)
                (home / "ssh_config").write_text(
                    f"Host server\n  HostName {sshd.listen}\n  Port {sshd.port}\n  User {sshd.user}\n"
                    f"  IdentityFile {sshd.client_key}\n  UserKnownHostsFile {sshd.known_hosts}\n"
                )
                picture(to, home, [
                    *english, "--panels", "loss,lr,tokens_per_sec,comm_wait",
                    "--ssh_config", "ssh_config", f"server:{Path(there).name}/long", "local",
                ])  # fmt: skip

        for draw in (one, ten, remote, stalled, dark, chinese):
            if not args.only or draw.__name__ in args.only.split(","):
                draw(to / f"viewer-{draw.__name__}.png")
    return 0


if __name__ == "__main__":
    run_main(main)
