"""Small files from anybody: their content, or one sentence. Whatever they hold, reading takes time and memory in
proportion to their size."""

import json
import math
import os
from pathlib import Path

import pytest
import yaml

from utils.small_files import is_number, is_whole, parse_json, parse_yaml, read_small


def bomb(last: int, line: str = "a{0}: &a{0} [{1}]\n") -> str:
    """Nine times nine times nine ... references."""
    return "a0: &a0 {x: 1}\n" + "".join(line.format(n, ", ".join([f"*a{n - 1}"] * 9)) for n in range(1, last))


@pytest.mark.parametrize("text", [
    "", "a", "[1, 2.5, x, null, true, 2001-02-03]", "{a: {b: [c]}}", "a: 0\nb: -12\nc: +3", "a: &x [1]\nb: *x",
    "d: &d {x: 1, y: 2}\ne: {<<: *d, y: 3}", "e: {<<: [{x: 1}, {x: 2, y: 2}], z: 3}", "'1:30': a", "a: '007'",
    "a: 1.5e3", "a: 1_000_000", "!!set {a, b}", "!!omap [a: 1, b: 2]", "\ufeffa: 1",
])  # fmt: skip
def test_plain_yaml_is_what_yamls_own_loader_reads(text: str):
    assert parse_yaml(text.encode()) == yaml.safe_load(text)


BAD_YAML = {
    "[": "expected the node content", "a: b: c": "not allowed here, line 1", "a: 1\na: 2": "'a' is given twice, line 2",
    "{a: 1, 'a': 2}": "given twice", "- 1\n- {b: {c: 1, c: 2}}": "'c' is given twice, line 2",
    "<<: {a: 1}\n<<: {b: 1}": "'<<' is given twice", "<<: 3": "`<<:` wants a mapping", "? [a]\n: b": "a key is a list",
    "a: 0022": "'0022' is not a decimal number", "a: 22:22": "not a decimal number", "a: 0x1f": "not a decimal number",
    "a: 1_00": "not a decimal number", "a: 0_000": "not a decimal number",
    "a: " + "9" * 5000: "a number of more than", "a: 1" + ":1" * 200_000: "more than",
    "a: 1" + ":1" * 200_000 + ".5": "more than", "!!int ''": "not a decimal number", "!!float .": "impossible value",
    "!!bool x": "impossible", "!!timestamp x": "impossible", "2000-99-99": "impossible", "!!map [a]": "a mapping",
    "!!seq {a: 1}": "expected a sequence", "!!binary é": "base64", "!!python/object:os.system x": "constructor",
    "a: *b": "undefined alias", "a: 1\n---\nb: 2": "document", "\0": "special characters", "\x1b[2J": "characters",
    "[" * 600: "nested too deeply", "{a: " * 600: "nested too deeply", "- " * 20_000: "nested too deeply",
    bomb(60, "a{0}: &a{0} {{<<: [{1}], k{0}: 1}}\n"): "copies too much",
}  # fmt: skip


@pytest.mark.parametrize("text", BAD_YAML, ids=lambda text: text[:40])
def test_bad_yaml_is_one_sentence(text: str):
    with pytest.raises(ValueError) as caught:
        parse_yaml(text.encode())
    assert BAD_YAML[text] in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 400


@pytest.mark.parametrize("text", [b"\xff\xfe\xff", b"a: \xff", b"\xff\xff"])
def test_bytes_that_are_no_text(text: bytes):
    for parse in (parse_yaml, parse_json):
        with pytest.raises(ValueError) as caught:
            parse(text)
        assert str(caught.value).isprintable()


def test_references_to_references_cost_nothing():
    """Written out, there would be 9 to the 39th."""
    found = parse_yaml(bomb(40).encode())
    assert len(found) == 40 and found["a39"][0] is found["a39"][8]


@pytest.mark.parametrize("text", [
    "", "{", '{"a": 1', "[1,]", "nan", "[" * 100_000, '{"a":' * 100_000, "9" * 5000, "{} x", "\0", "'a'",
], ids=lambda text: text[:10])  # fmt: skip
def test_bad_json_is_one_sentence(text: str):
    with pytest.raises(ValueError) as caught:
        parse_json(text.encode())
    assert str(caught.value).isprintable() and str(caught.value).startswith("it is n")


def test_good_json():
    value = {"a": [1, 2.5, "é", None, True], "b": {}}
    assert parse_json(json.dumps(value).encode()) == value
    assert math.isnan(parse_json(b"NaN"))


def test_what_is_no_small_file(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    assert read_small(tmp_path / "file", 3) == b"abc"
    with pytest.raises(ValueError, match="larger than"):
        read_small(tmp_path / "file", 2)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ValueError, match="it is not a file"):
            read_small(path, 3)
    with pytest.raises(FileNotFoundError):
        read_small(tmp_path / "absent", 3)


def test_numbers():
    right = [0, -1, 1.5, 10**300, -1e307]
    wrong = [True, None, "1", math.nan, math.inf, -math.inf, 10**400, -(10**309), [], {}]
    assert all(map(is_number, right)) and not any(map(is_number, wrong))
    assert is_number(2, 1, 3) and not is_number(0, 1) and not is_number(4, 1, 3)
    assert is_whole(0) and is_whole(1 << 53) and not any(map(is_whole, [-1, 1.0, True, (1 << 53) + 1, "1", None]))
    assert is_whole(-3, -5) and not is_whole(-6, -5)
