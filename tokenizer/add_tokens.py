"""Grow a tokenizer by tokens of one's own: names, control words, a domain's signs.

    python -m tokenizer.add_tokens --tokenizer_dir T --tokens FILE --output_dir T2

FILE has one token a line, in UTF-8; blank lines do not count. The tokens get the ids after the tokenizer's last one, in
the order of the file. They are ordinary added tokens (`"special": false`), whatever they look like: text that spells
one becomes its id, before it is cut into words, and they are shown when a text is decoded. A chat template may use them
as control tokens.

Training does the same to raw records with --add_tokens FILE; T2 is for data that is tokenized beforehand. The same
tokenizer and the same FILE give the same fingerprint.
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tokenizer.base import Tokenizer
from tokenizer.loading import has_tokenizer, load_tokenizer
from utils.arguments import Parser
from utils.paths import a_path, absent
from utils.terminal import run_main

MOST_TOKENS = 1 << 16
"""Most tokens that can be added. Whoever needs more wants another vocabulary, which is trained."""


def read_tokens(file: str | Path) -> list[str]:
    """Tokens of a file, in order.

    Raises:
        ValueError: there is no such file, or a line or the whole is not as it should be.
    """
    file = Path(file)
    if not file.exists():
        raise ValueError(absent(file, "write the tokens to add there, one a line"))
    if not file.is_file():
        raise ValueError(f"{file} is not a file: give one with the tokens to add, one a line")
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    tokens = [line for line in lines if line.strip()]
    if not tokens:
        raise ValueError(f"{file} holds no token: write one a line")
    if len(tokens) > MOST_TOKENS:
        raise ValueError(
            f"{file} holds {len(tokens)} tokens, and {MOST_TOKENS} can be added: train a tokenizer for more"
        )
    for token in tokens:
        if token != token.strip():
            raise ValueError(f"{file}: the token {token!r} begins or ends with a blank: take that away")
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{file} holds the token {token!r} {times} times: leave it there once")
    return tokens


def grow(tokenizer: Tokenizer, tokens: Sequence[str]) -> Tokenizer:
    """A tokenizer with tokens added. They have the ids from `tokenizer.vocab_size` on.

    Raises:
        ValueError: it has one of them already, or cannot be grown.
    """
    for token in tokens:
        ids = tokenizer.encode(token)
        if token in tokenizer.special_ids or len(ids) == 1 and tokenizer.decode(ids) == token:
            raise ValueError(f"the tokenizer has the token {token!r} already: leave it out of those to add")
    grown = tokenizer.with_tokens(tokens)
    expected = {token: tokenizer.vocab_size + number for number, token in enumerate(tokens)}
    for token, token_id in expected.items():
        if grown.encode(token)[-1:] != [token_id] or grown.decode([token_id]) != token:
            raise ValueError(f"the tokenizer cannot hold the token {token!r}: leave it out of those to add")
    return grown


def require_grown(tokenizer: Tokenizer, tokens: Sequence[str]) -> None:
    """See that a tokenizer's last entries are these tokens, in order.

    Raises:
        ValueError: they are not.
    """
    first = tokenizer.vocab_size - len(tokens)
    for number, token in enumerate(tokens):
        if tokenizer.added_ids.get(token) != first + number:
            raise ValueError(
                f"the data's tokenizer does not end with the tokens of --add_tokens, of which {token!r} would have the "
                f"id {first + number}: give the file that it was grown by, or none; a resumed run takes no other"
            )


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="add_tokens", description="Grow a tokenizer by tokens of one's own.")
    parser.add_argument("--tokenizer_dir", type=a_path, required=True, help="folder of a tokenizer or of a model")
    parser.add_argument("--tokens", type=a_path, required=True, help="file with one token a line")
    parser.add_argument("--output_dir", type=a_path, required=True, help="new folder for the grown tokenizer")
    args = parser.parse_args(argv)
    output = Path(args.output_dir)
    try:
        if has_tokenizer(output) or (output / "config.json").exists():
            raise ValueError(f"--output_dir {output} holds a tokenizer or a model: give a folder of its own")
        tokens, tokenizer = read_tokens(args.tokens), load_tokenizer(args.tokenizer_dir)
        grow(tokenizer, tokens).save_pretrained(output)
    except (ValueError, OSError) as error:
        print(f"add_tokens: {error}", file=sys.stderr)
        return 2
    print(f"{len(tokens)} tokens have the ids from {tokenizer.vocab_size} on, in {output}")
    return 0


if __name__ == "__main__":
    run_main(main, goes_on=True)
