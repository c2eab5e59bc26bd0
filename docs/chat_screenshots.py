"""Takes the pictures of the chat page: `python docs/chat_screenshots.py` opens it in Chromium in each of its states.

The server is a made-up one (tests/page_server.py); what it says is made up, too, probabilities included. Needs
Playwright and a Chromium.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check("requirements-dev.txt")

import argparse
import random
from pathlib import Path

from PIL import Image

from tests.page_browser import a_browser
from tests.page_server import PageServer, Reply, model
from utils.paths import a_path
from utils.terminal import run_main

ROOT = Path(__file__).resolve().parent.parent
LESSON = """The optimizer moves each weight a little against its gradient. One step has four parts:

1. **Forward**: the batch goes through the model, which gives a loss
2. **Backward**: autograd gives the gradient of each weight
3. **Reduce**: the ranks add their gradients, bucket by bucket
4. **Step**: AdamW changes the weights

```python
for batch in loader:
    loss = model.loss(batch.ids, batch.targets)
    loss.backward()
    ddp.finish_grad_sync()
    optimizer.step()
```

With `accumulate = 4`, the third part waits for the fourth micro-batch:

| micro-batch | forward | backward | reduce |
|:------------|--------:|---------:|-------:|
| 1 to 3      |  31 ms  |   62 ms  |     –  |
| 4           |  31 ms  |   62 ms  |  18 ms |
"""
STORY = (
    "Once there was a small fox who lived by the river. Every morning she counted the stones in the water, and every "
    "morning there was one more. “Who brings them?” she asked the heron. The heron looked at the moon."
)
CHINESE = """注意力让每个词元**回看前文**，按相关程度取用信息：

1. 每个词元算出查询 `q`、键 `k` 和值 `v`
2. `q` 与所有前面的 `k` 比较，得到权重
3. 用权重把 `v` 加起来

> 因果掩码保证模型看不到后面的词元。

于是“它”可以在前文中找到所指的名词。
"""
WORDS = "the a and of to was in her by his old young river stone night fox moon sun one two came went said saw".split()


def drawn(seed: int) -> Reply:
    """An answer whose tokens are as likely as those of a small model."""
    numbers = random.Random(seed)
    own = [0.999 if numbers.random() < 0.35 else numbers.betavariate(1.5, 1.2) for _ in range(400)]

    def others(token: str, number: int) -> list[tuple[str, float]]:
        draw, left = random.Random(number), 1 - own[number]
        rest = []
        for word in draw.sample(WORDS, 6):
            left *= 0.45
            rest.append((f" {word}", left))
        return sorted([(token, own[number]), *[one for one in rest if one[0] != token]], key=lambda one: -one[1])[:5]

    return Reply(STORY, probability=lambda number: own[number], others=others, rate=148.2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--to", type=a_path, default=str(ROOT / "docs" / "images"))
    parser.add_argument("--only", help="names of pictures, with commas between")
    args = parser.parse_args()
    to = Path(args.to)
    to.mkdir(parents=True, exist_ok=True)
    server = PageServer([
        model("llama-125M-sft", step=12000, recommended={"temperature": 0.7}, max_model_len=2048),
        model("llama-125M-sft-fables", parent="llama-125M-sft", max_model_len=2048),
    ])  # fmt: skip
    with a_browser() as browser:

        def opened(width: int, height: int, **options):
            usual = {"device_scale_factor": 1.5, "locale": "en-GB", "reduced_motion": "reduce"}
            context = browser.new_context(viewport={"width": width, "height": height}, **usual | options)
            page = context.new_page()
            page.goto(server.address)
            page.wait_for_function("document.getElementById('model').value")
            return page

        def say(page, text: str, reply: Reply) -> None:
            server.replies.append(reply)
            page.fill("#message", text)
            page.press("#message", "Enter")
            page.wait_for_selector(".message:last-child .buttons")

        def show_top(page) -> None:
            page.mouse.move(0, 400)
            page.evaluate("document.getElementById('scroller').scrollTop = 0")

        def light(path: Path) -> None:
            page = opened(1180, 760)
            for text in ("Why is the loss of a fresh model ln(V)?", "Explain warm-up to a child"):
                say(page, text, Reply("Because it knows nothing yet.", rate=96.4))
                page.click("#new")
            say(page, "What happens in one training step?", Reply(LESSON, rate=96.4))
            show_top(page)
            page.screenshot(path=path)

        def tokens(path: Path) -> None:
            page = opened(1180, 640)
            say(page, "Tell me a story about a fox.", drawn(5))
            page.click("#tokens")
            page.get_by_role("button", name="Show the prompt as the model sees it").click()
            page.locator(".token", has_text="counte").hover()
            page.screenshot(path=path)

        def dark(path: Path) -> None:
            page = opened(1180, 760, color_scheme="dark")
            say(page, "What happens in one training step?", Reply(LESSON, rate=96.4))
            page.click("#open-settings")
            page.fill("#system", "Explain as to a new colleague, with one example.")
            page.fill("#field-top_p", "0.95")
            show_top(page)
            page.screenshot(path=path)

        def chinese(path: Path) -> None:
            page = opened(390, 844, locale="zh-CN", has_touch=True, is_mobile=True, device_scale_factor=2)
            say(page, "注意力是怎么工作的？", Reply(CHINESE, rate=96.4))
            show_top(page)
            page.screenshot(path=path)

        for draw in (light, tokens, dark, chinese):
            if not args.only or draw.__name__ in args.only.split(","):
                path = to / f"chat-{draw.__name__}.png"
                draw(path)
                shrink(path)
                print(path.name, path.stat().st_size)
    server.close()
    return 0


def shrink(path: Path) -> None:
    """Reduce the picture to the 255 colours that it needs most: its letters stay smooth."""
    Image.open(path).convert("RGB").quantize(255, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    run_main(main)
