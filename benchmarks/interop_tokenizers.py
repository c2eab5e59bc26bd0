"""Foreign tokenizer folders, saved here and opened by other versions of transformers: the ids must agree.

    python -m benchmarks.interop_tokenizers --python ENV4/bin/python ENV5/bin/python

Each PYTHON is the interpreter of an environment with some version of transformers. The folders imitate the
`tokenizer.json` of thirteen families, `tokenizer.model` and `vocab.json` with `merges.txt`, which are converted when
they are opened, and the folders of seven models whose control tokens stand in code. Each is loaded here and saved; the
other version's AutoTokenizer opens the saved folder and encodes nasty texts, and one text with the tokenizer's prefix.
Characters that this Python's Unicode does not define are left out, because versions of the libraries disagree about
them. The exit code is 1 if ids differ.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
import json
import random
import subprocess
import tempfile
import unicodedata
from pathlib import Path

THERE = """
import json, sys
from pathlib import Path
import transformers
transformers.logging.set_verbosity_error()
wrong = 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    expected = json.loads((path / "expected.json").read_text("utf-8"))
    theirs = transformers.AutoTokenizer.from_pretrained(str(path))
    ids = [theirs(text, add_special_tokens=False)["input_ids"] for text in expected["texts"]]
    differ = sum(one != other for one, other in zip(ids, expected["ids"]))
    begins = theirs("x")["input_ids"][: len(expected["begin"])] == expected["begin"]
    wrong += differ + (not begins)
    if differ or not begins:
        print(f"  {path.name}: {differ} of {len(ids)} texts differ; begins alike: {begins}")
print(f"transformers {transformers.__version__}: {wrong} differences")
sys.exit(wrong > 0)
"""


def folders(home: Path) -> list[Path]:
    """Imitations of published tokenizer folders."""
    from tests.unit.test_known_tokenizers import FOLDERS
    from tests.unit.test_tokenizer import FAMILIES
    from tests.unit.test_tokenizer_conversion import MODELS, NAMED, added_tokens, sentence_piece, vocabulary, write

    made = [make(home / make.__name__).folder for make in FAMILIES]
    for name in MODELS:
        if name != "unigram":
            config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, **NAMED}
            made.append(write(home / name, tokenizer_model=sentence_piece(name), tokenizer_config_json=config))
    made += [make(home / name) for name, make in FOLDERS.items() if "," not in name]
    vocab, merges, _ = vocabulary()
    for kind in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        files = added_tokens("added_tokens_decoder")
        files["tokenizer_config_json"]["tokenizer_class"] = kind
        made.append(write(home / f"{kind}, vocab.json", vocab_json=vocab, merges_txt=merges, **files))
    return made


def nasty_texts() -> list[str]:
    from tests.unit.test_tokenizer import AWKWARD, english, random_text

    rng = random.Random(2)
    texts = [random_text(rng, rng.randint(0, 60)) for _ in range(400)] + [english(rng, 40) for _ in range(40)]
    texts += [text for text in AWKWARD if len(text) < 300]
    texts += ["    x = 12345\n\ty", "\r\na\r\n", " leading", "trailing  ", "über größe ø", "## # ###", "don't I'LL"]
    return ["".join(c for c in text if unicodedata.category(c) != "Cn") for text in texts]


def save_with_ids(folder: Path, target: Path) -> int:
    """Save a folder with the expected ids beside it; returns the number of texts."""
    from tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(target)
    texts = [text for text in nasty_texts() if not any(token in text for token in tokenizer.special_ids)]
    expected = {"texts": texts, "ids": tokenizer.encode_batch(texts), "begin": tokenizer.begin_ids}
    (target / "expected.json").write_text(json.dumps(expected), "utf-8")
    return len(texts)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interop_tokenizers", description=__doc__.split("\n")[0])
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters with transformers")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        sources, saved = Path(home) / "sources", Path(home) / "saved"
        counts = [save_with_ids(folder, saved / folder.name) for folder in folders(sources)]
        print(f"{len(counts)} folders, {sum(counts)} texts")
        codes = [subprocess.run([python, "-W", "ignore", "-c", THERE, str(saved)]).returncode for python in args.python]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
