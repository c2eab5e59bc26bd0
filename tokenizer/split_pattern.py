"""Pattern by which byte-level BPE cuts a text into words, each of which is merged by itself."""

import json
import re

from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as LibraryTokenizer


def split_pattern(max_digits: int = 3, max_han: int = 0, ascii_only: bool = False) -> str:
    """Regular expression whose matches are the words. It follows GPT-2 (Radford et al., 2019), with the changes that
    later models made for code.

    Its alternatives: a word with at most one leading character that does not belong in a word; a group of digits;
    punctuation with its line ends; line ends with the blanks before them; blanks, of which the last stays with the word
    that follows.

    Args:
        max_digits: largest number of digits in a group.
        max_han: largest number of Chinese characters in a group, apart from other letters; 0 for words of any letters
            and any length.
        ascii_only: whether it shall mean the same in ASCII text only, for engines without Unicode properties.
    """
    letter, mark, digit = ("A-Za-z", "", "0-9") if ascii_only else (r"\p{L}", r"\p{M}", r"\p{N}")
    han = ""
    word = rf"[{letter}{mark}]+"
    if max_han and not ascii_only:
        han = rf"\p{{Han}}{{1,{max_han}}}|"
        word = rf"[{letter}{mark}&&[^\p{{Han}}]]+"
    return (
        rf"{han}[^\r\n{letter}{digit}]?{word}|[{digit}]{{1,{max_digits}}}| ?[^\s{letter}{digit}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def untrained(pattern: str) -> LibraryTokenizer:
    """A tokenizer without a vocabulary, whose words are the matches of `pattern`."""
    tokenizer = LibraryTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def own_split_options(definition: dict) -> tuple[int, int] | None:
    """The max_digits and max_han of a tokenizer that `train_hf_bbpe` made; None for other tokenizers."""
    steps = (definition["pre_tokenizer"] or {}).get("pretokenizers") or [{}]
    pattern = steps[0].get("pattern", {}).get("Regex", "")
    max_digits = re.search(r"\[\\p{N}\]{1,(\d)}", pattern)
    max_han = re.search(r"\\p{Han}{1,(\d+)}", pattern)
    if max_digits is None:
        return None
    own = int(max_digits[1]), int(max_han[1]) if max_han else 0
    ordinary_tokens = [token for token in definition["added_tokens"] if not token["special"]]
    made_here = json.loads(untrained(split_pattern(*own)).to_str())
    same = all(made_here[part] == definition[part] for part in ("pre_tokenizer", "normalizer"))
    return own if same and not ordinary_tokens else None
