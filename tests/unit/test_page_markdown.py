"""The chat page's Markdown, in a browser: against a table, against markdown-it where both mean the same, and on texts
made to hurt."""

import random
import re
import time
from collections.abc import Iterator

import pytest

from tests.page_browser import a_browser
from tests.page_server import PageServer

# A short form of what is on the page: tags with their texts, and what matters of their attributes.
SHORT = """(roots) => {
    const short = (node) => {
        // markdown-it puts line ends between blocks and after <br>.
        const isText = node.nodeType === Node.TEXT_NODE;
        if (isText && !node.data.trim() && node.data.includes("\\n")) return "";
        if (isText) return node.parentNode.closest("pre") ? node.data : node.data.replace(/\\n/g, "");
        if (node.matches("div.code-head")) return "";
        const name = node.localName;
        let inside = [...node.childNodes].map(short).join("");
        if (name === "div") return inside;
        if (name === "s") return `<del>${inside}</del>`;
        if (name === "br") return "<br>";
        if (name === "pre") inside = inside.replace(/\\n(?=<.code>$)/, "");
        const href = name === "a" ? ` ${node.getAttribute("href")}` : "";
        const start = name === "ol" && node.start !== 1 ? ` ${node.start}` : "";
        const align = `${node.className} ${node.getAttribute("style")}`.match(/align[-:](\\w+)/)?.[1];
        return `<${name}${href}${start}${align ? " " + align : ""}>${inside}</${name}>`;
    };
    return roots.map((root) => [...root.childNodes].map(short).join(""));
}"""
OURS = f"""(texts) => import("/page/markdown.js").then(({{ show }}) => ({SHORT})(texts.map((text) => {{
    const div = document.createElement("div");
    show(div, text);
    return div;
}})))"""
THEIRS = f"""(pages) => ({SHORT})(pages.map((html) => {{
    const div = document.createElement("div");
    div.innerHTML = html;
    return div;
}}))"""

TABLE = [
    ("plain <b>text</b> &amp; more", "<p>plain <b>text</b> &amp; more</p>"),
    ("two\nlines", "<p>two<br>lines</p>"),
    ("**中文。**后面**“引用”**也是", "<p><strong>中文。</strong>后面<strong>“引用”</strong>也是</p>"),
    ("see https://a.b/c_d_e. (https://a.b/x(y)) https://a.b/中",
     "<p>see <a https://a.b/c_d_e>https://a.b/c_d_e</a>. (<a https://a.b/x(y)>https://a.b/x(y)</a>) "
     "<a https://a.b/%E4%B8%AD>https://a.b/中</a></p>"),
    ("见 https://a.b/x，好", "<p>见 <a https://a.b/x>https://a.b/x</a>，好</p>"),
    ("[a](javascript:alert(1)) [b](JAVASCRIPT:x) [c](data:text/html,x) [d](/local) [e](vbscript:x) [f](//h.x)",
     "<p>[a](javascript:alert(1)) [b](JAVASCRIPT:x) [c](data:text/html,x) [d](/local) [e](vbscript:x) [f](//h.x)</p>"),
    ("[a](&#106;avascript:x) [b](java\nscript:x) [c](\x01javascript:x)",
     "<p>[a](&#106;avascript:x) [b](java<br>script:x) [c](\x01javascript:x)</p>"),
    ("![pic](https://a.b/c.png) [![in](https://a.b/i.png)](https://a.b/)",
     "<p><a https://a.b/c.png>pic</a> <a https://a.b/>in</a></p>"),
    ("<https://a.b/> <me@a.b> <javascript:x>",
     "<p><a https://a.b/>https://a.b/</a> <a mailto:me@a.b>me@a.b</a> <javascript:x></p>"),
    ("    not code", "<p>not code</p>"),
    ("```py\nx = 1", "<pre><code>x = 1</code></pre>"),  # as it is while it streams
    ("1999. A year", "<ol 1999><li>A year</li></ol>"),
    ("It was\n1999. A year", "<p>It was<br>1999. A year</p>"),
    ("| a | b |\n|---|--:|\n| `x\\|y` | **1** |\n| only |\n\nend",
     "<table><thead><tr><th>a</th><th right>b</th></tr></thead>"
     "<tbody><tr><td><code>x|y</code></td><td right><strong>1</strong></td></tr>"
     "<tr><td>only</td><td right></td></tr></tbody></table><p>end</p>"),
    # Lines that stand deeper than others keep that, where CommonMark loses it.
    ("Roses\n    are red,\n  *violets*\n blue", "<p>Roses<br><span>    </span>are red,<br><span>  </span>"
     "<em>violets</em><br>blue</p>"),
    ("\u3000\u3000从前有座山", "<p>\u3000\u3000从前有座山</p>"),
    # Code without a fence; "#" is its comment, not a heading.
    ("Try this:\ndef f(_a, b_):\n    return _a * b_ * 2\n\n# Use it\nprint(f(1, 2))\nIt prints 4.",
     "<p>Try this:</p><pre><code>def f(_a, b_):\n    return _a * b_ * 2\n\n# Use it\nprint(f(1, 2))</code></pre>"
     "<p>It prints 4.</p>"),
    ("def f(x):\n    y\n  ```\n  z\n  ```", "<pre><code>def f(x):\n    y</code></pre><pre><code>z</code></pre>"),
    ("- so:\n  import os\n  os.getcwd()\n- or", "<ul><li>so:<pre><code>import os\nos.getcwd()</code></pre></li>"
     "<li>or</li></ul>"),
    ("***both*** ~~gone~~ a~b~c", "<p><em><strong>both</strong></em> <del>gone</del> a~b~c</p>"),
]  # fmt: skip

SAME = [
    "# One\n## Two ##\n### Three *em*\n####### seven\n#none", "Title\n===\n\nSub\n---\n\n***\n___",
    "a\n\n\nb  \nc\\\nd",
    "*a* _b_ **c** __d__ *a**b**c* **a*b*c** snake_case_name 2*3*4 a * b", "`a` ``b ` c`` `d\ne` `` ` `` `open",
    r"\*not\* \`x\` \[y\] \\ \a", "[t](https://a.b/c \"title\") [*em* `c`](<https://a.b/x>) [no] (x) [a](b c)",
    "- a\n- b\n  - c\n    - d\n- e", "1. a\n2. b\n\n   more\n3. c", "3) a\n4) b", "* a\n\n* b", "+ a\n- b\n* c",
    "- a\n\n  ```py\n  x\n\n  y\n  ```\n- b", "- a\n> q\n- b", "> a\nb\n> - c\n>> d\n\ne", "> ```\n> x\n> ```\n> y",
    "```\na\n```\nb\n~~~js x\nc\n```\n~~~", "````\n```\nx\n```\n````", "  ```\n   x\n  y\n  ```",
    "text\n```\ncode\n```\ntext", "text\n- list\ntext", "- a\nlazy\n- b\n\nend", "a\n# h\nb\n***\nc\n> q",
    "| a | b |\n| :-: | --- |\n| *c* | d |",
    "a | b\n--- | ---\n1 | 2\n\nx | y",
    "- [x] done\n- [ ] open", "~~a~~ ~~b **c**~~", "-\n- a\n-", "10. ten\n11. eleven",
    "* * *\n- - -", "**bold*** *em**", "a**b**c*d*e __f__g", "*(a)* **(b)**c _(d)_e", "1. a\n   - b\n   - c\n2. d",
    "foo__bar__baz my__init__ __init__.py (__name__) _a_b_ a_ _b __ c__d",
    "[a [b](https://a.b/) c](mailto:me@a.b)", "*a [b* c](https://a.b/)", "*a [b* c]", "**a `b** c` d**",
]  # fmt: skip

CODE = [
    # A class with blank lines, a text of several lines, and remarks.
    'import os\n\nclass A(B):\n    """A thing\n\nthat is told at length.\n    """\n    def __init__(self, _x):\n'
    '        self._x = _x\n\n    @property\n    def x(self):\n        return self._x  # as it is\n\n\n'
    'if __name__ == "__main__":\n    print(A(3).x, "is what it is")\n# the end',
    # The rest of a function, as a model answers that was given its head.
    "    for i, x in enumerate(xs):\n        if x < least:\n            return True\n    return False",
    "    return a + b",
    "# Adds two numbers\n# and gives their sum\ndef 相加(a, b):\n    return a + b",
    'total = 0\nwhile total < 9:\n    total += 1\n    print(f"现在是 {total} 了")',
    "x = foo(\n    a, b,\n    c\n)\ny = bar(x)",
    "import numpy as np\nx = [1, 2]\ny = np.sum(x)",
    'try:\n    n = int(input("How many are there? "))\nexcept ValueError as problem:\n    print("none", problem)',
    '#include <stdio.h>\n\nint main() {\n    int x = 5;\n    printf("Hello there you\\n");\n    return 0;\n}',
    "const add = (a, b) => {\n  return a + b;\n};\nconsole.log(add(1, 2));",
    "public class Main {\n    public static void main(String[] args) {\n        Tree tree = new Tree();\n    }\n}",
    '{\n  "a b": 1,\n  "c": [\n    2\n  ]\n}',
    ">>> x = 2\n>>> f(x)",
]
NO_CODE = [
    "He said:\n    The woods are lovely,\n    dark and deep;\nBut I have promises to keep;",
    "if only:\n    you knew me\nreturn to me,\nwhile I wait for you;\nreturn home;\nbreak free;",
    "for each in turn:\n   sing\n   dance", "try:\n    harder\nelse:\n    fail", "O night;\nO moon;\n{stars}\n(alas);",
    "import duties were raised.\nfrom here import nothing more.\nclass war; return if possible.",
    "x = 5\ny = 3\nx + y = 8", "f(x) = 2x + 1\ny = f(3)\ny = sin(x)\nz = cos(x)", "sum = 1 + 2 = 3\nmean = sum / 2",
    "Use print(x) to print x.\nThe function foo() returns 3.\nself.x is its value",
    "- def\n- class\n- self.x\n- self.y",
    "第一步：x = foo(3)\n第二步：y = foo(x)\n    我是小明；\n（第一行）",
    "Name: Bob\nAge: 3\n(unknown)\n{}", "> a\n>> b\n>>> c",
    "Dear Sir,\n\n    I write to you (again);\n    yours,\nBob", "# Title\n\nimport os\n\n# Another", "hello", "pass",
    "| x = f(1) | print(2) |\n|---|---|\n| self.x | self.y |",
]  # fmt: skip


@pytest.fixture(scope="module")
def page() -> Iterator["object"]:
    server = PageServer()
    with a_browser() as browser:
        page = browser.new_page()
        page.goto(server.address)
        yield page
    server.close()


def test_table(page):
    shown = page.evaluate(OURS, [text for text, _ in TABLE])
    assert list(zip([text for text, _ in TABLE], shown)) == TABLE


def emphasised(generator: random.Random) -> str:
    pieces = ["*", "**", "***", "_", "__", "a", "b", " ", "(", ".", "`", "~~", "\\*", "[x](https://a.b/)", "é"]
    text = "x" + "".join(generator.choice(pieces) for _ in range(generator.randrange(3, 14)))
    # Longer runs of marks are text here.
    return text if not re.search(r"[*_]{7}", text) else emphasised(generator)


def test_as_markdown_it_where_both_mean_the_same(page):
    markdown_it = pytest.importorskip("markdown_it", reason="needs markdown-it-py")
    reference = markdown_it.MarkdownIt("commonmark", {"html": False, "breaks": True})
    reference.enable(["table", "strikethrough"]).disable(["code", "reference", "entity", "image"])
    generator = random.Random(0)
    texts = SAME + [emphasised(generator) for _ in range(400)]
    ours = page.evaluate(OURS, texts)
    theirs = page.evaluate(THEIRS, [reference.render(text) for text in texts])
    wrong = [(text, mine, other) for text, mine, other in zip(texts, ours, theirs) if mine != other]
    assert not wrong, wrong[:8]


def test_code_without_a_fence_is_code_and_nothing_else_is(page):
    shown = page.evaluate(OURS, CODE)
    plain = [one.replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">") for one in shown]
    assert plain == [f"<pre><code>{text}</code></pre>" for text in CODE]
    taken = [text for text, one in zip(NO_CODE, page.evaluate(OURS, NO_CODE)) if "<pre>" in one]
    assert not taken


def test_code_that_streams_changes_its_form_seldom(page):
    forms = page.evaluate("""(texts) => import("/page/markdown.js").then(({ show }) => texts.map((text) => {
        const seen = [];
        for (let end = 1; end <= text.length; end += 1) {
            const div = document.createElement("div");
            show(div, text.slice(0, end));
            const form = [...div.children].map((one) => one.localName).join(" ");
            if (form !== seen.at(-1)) seen.push(form);
        }
        return seen;
    }))""", CODE)  # fmt: skip
    for text, seen in zip(CODE, forms):
        # Once code, a line at its end may look like prose for a while, never all of it.
        begun = seen[seen.index("div") :]
        assert len(seen) <= 6 and all(one.startswith("div") for one in begun), (text, seen)


def test_each_beginning_of_a_text_shows_as_if_it_came_at_once(page):
    text = "\n\n".join([text for text, _ in TABLE] + SAME[:20] + CODE[:3])
    assert page.evaluate("""(text) => import("/page/markdown.js").then(({ show }) => {
        const grown = document.createElement("div");
        for (let end = 1; end <= text.length; end += 3) {
            const fresh = document.createElement("div");
            show(grown, text.slice(0, end));
            show(fresh, text.slice(0, end));
            if (grown.innerHTML !== fresh.innerHTML) return text.slice(0, end);
        }
        return null;
    })""", text) is None  # fmt: skip


def test_texts_made_to_hurt_take_little_time_and_depth(page):
    n = 10_000
    parts = [
        "*a ", "**a* ", "[", "![", "[a](", "[a](b ", "`", "<", "> ", "- ", "* ", "1. ", "|", "| a ", "~~a", "\\",
        "_a", "](", "***a_b",
        "https://", '[a](https://a.b/ "', "``` ", "#", "a*_", "(", "<https://", "`` ` ", " " * 9, "\t- ",
        "x = 1\n", "# a\n", '"""\n', "a(b)\n  c d\n\n", "import a\n\n", "x = " + "(" * 900 + "\n", '"\\',
    ]  # fmt: skip
    texts = [part * (n // len(part)) for part in parts]
    texts += [">" * n + "x", "a\n" * n, "| a | b |\n|---|---|\n" + "| c " * n]
    texts += ["".join(f"{'  ' * i}- x\n" for i in range(300))]
    texts += ["".join("`" * i + " " for i in range(1, 200))]
    texts += ["*a **b " * (n // 8) + "c** d* " * (n // 8)]
    began = time.monotonic()
    seconds, depth = page.evaluate("""(texts) => import("/page/markdown.js").then(({ show }) => {
        let worst = [0, ""], depth = 0;
        for (const text of texts) {
            const div = document.createElement("div"), began = performance.now();
            show(div, text);
            worst = performance.now() - began > worst[0] ? [performance.now() - began, text.slice(0, 20)] : worst;
            for (const one of div.querySelectorAll(":not(:has(*))")) {
                let height = 0;
                for (let node = one; node !== div; node = node.parentNode) height += 1;
                depth = Math.max(depth, height);
            }
        }
        return [worst, depth];
    })""", texts)  # fmt: skip
    # Quadratic time would take minutes.
    assert time.monotonic() - began < 15 and depth < 200, (seconds, depth)
