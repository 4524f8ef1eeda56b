"""Hostile input for readers: valid files with changes that keep most of their structure.

A change is drawn as a few numbers and applied to a seed, so that hypothesis finds a small one that
still fails.
"""

from __future__ import annotations

import copy
import json
import struct
import zlib
from typing import Any, Dict, List, Sequence, Tuple, Union

import yaml
from hypothesis import strategies as st

Strategy = st.SearchStrategy
Tree = Union[Dict[str, Any], List[Any]]

#: Position of a change, taken modulo what there is.
PLACES = st.integers(0, 2**16)
#: Bytes at the edges of integer types, and those that begin formats.
_EDGES = [
    *(b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b'"', b",", b"\xef\xbb\xbf", b"\xff\xfe"),
    *(struct.pack(">I", number) for number in (0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1)),
    *(struct.pack("<Q", number) for number in (0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1)),
]


# Bytes


def damaged_bytes(seeds: Sequence[bytes]) -> Strategy:
    """Seeds with bits flipped, pieces cut, doubled, exchanged or overwritten; also noise."""
    piece = st.one_of(st.sampled_from(_EDGES), st.binary(max_size=8))
    change = st.tuples(
        st.sampled_from(["flip", "flip", "cut", "end", "double", "insert", "overwrite", "splice"]),
        PLACES,
        PLACES,
        piece,
    )
    changed = st.builds(
        lambda seed, other, changes: _change_bytes(seed, other, changes),
        st.sampled_from(seeds),
        st.sampled_from(seeds),
        st.lists(change, min_size=1, max_size=5),
    )
    noise = st.binary(max_size=300)
    begun = st.builds(lambda seed, end, at: seed[:at] + end, st.sampled_from(seeds), noise, PLACES)
    return st.one_of(changed, changed, changed, begun, noise)


def _change_bytes(
    seed: bytes, other: bytes, changes: Sequence[Tuple[str, int, int, bytes]]
) -> bytes:
    data = bytearray(seed)
    for kind, first, second, piece in changes:
        at = first % (len(data) + 1)
        end = min(len(data), at + 1 + second % 64)
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << second % 8
        elif kind == "cut":
            del data[at:end]
        elif kind == "end":
            del data[at:]
        elif kind == "double":
            data[at:at] = data[at:end]
        elif kind == "insert":
            data[at:at] = piece
        elif kind == "overwrite":
            data[at : at + len(piece)] = piece
        elif kind == "splice":
            data[at:] = other[second % (len(other) + 1) :]
    return bytes(data)


# Trees of JSON and YAML

#: Written as these texts, which no Python value gives.
_RAW = {
    "@huge@": "9" * 5000,
    "@exponent@": "1e999",
    "@deep@": "[" * 3000 + "]" * 3000,
    "@deeper@": '{"a":' * 100_000,
    "@nothing@": "",
}
_VALUES = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, 1.5, -0.5, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf"), "", " ", "a", "1", "NaN", "\ud800", "\0", "é"),
    *("a" * 5000, "../../../etc/passwd", "/dev/zero", "vit", "=1+1", "a/b/c", "0x10", "1e3"),
    *([], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [1, "a", None], [0] * 300),
    *_RAW,
]
_values = st.one_of(
    st.sampled_from(_VALUES),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.recursive(
        st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab01.", max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
_TREE_CHANGES = st.lists(
    st.tuples(
        st.sampled_from(
            ["replace", "replace", "delete", "copy", "nest", "text", "number", "rename", "add"]
        ),
        PLACES,
        PLACES,
        _values,
    ),
    min_size=1,
    max_size=4,
)


def damaged_trees(seeds: Sequence[Tree], *, root: bool = False) -> Strategy:
    """Seeds with values replaced, deleted, nested, retyped or moved; with `root` any value."""
    changed = st.builds(_change_tree, st.sampled_from(seeds), _TREE_CHANGES)
    return st.one_of(changed, changed, changed, _values) if root else changed


def _change_tree(seed: Tree, changes: Sequence[Tuple[str, int, int, Any]]) -> Tree:
    tree = copy.deepcopy(seed)
    for kind, first, second, value in changes:
        places = list(_places(tree))
        if not places:
            return tree
        value = copy.deepcopy(value)
        holder, key = places[first % len(places)]
        other_holder, other_key = places[second % len(places)]
        if kind == "delete":
            del holder[key]
        elif kind == "copy":
            holder[key] = copy.deepcopy(other_holder[other_key])
        elif kind == "add":
            new = value if isinstance(value, str) else "added"
            holder.update({new: value}) if isinstance(holder, dict) else holder.append(value)
        elif kind == "rename" and isinstance(holder, dict):
            holder[value if isinstance(value, str) else f"{key}2"] = holder.pop(key)
        else:
            holder[key] = _retyped(kind, holder[key], value, second)
    return tree


def _retyped(kind: str, old: Any, value: Any, number: int) -> Any:
    if kind == "nest":
        return [old] if number % 2 else {"a": old}
    if kind == "text":
        return str(old)
    if kind == "number":
        return number if number % 3 else -number / 7
    return value


def _places(tree: Any) -> Any:
    """Yield every value as its holder and its key or index."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    for key in keys:
        yield tree, key
        if isinstance(tree[key], (dict, list)):
            yield from _places(tree[key])


def as_json(tree: Any) -> bytes:
    """Return JSON, with NaN, lone surrogates and numbers that Python would not write."""
    text = json.dumps(tree)
    for word, raw in _RAW.items():
        text = text.replace(f'"{word}"', raw)
    return text.encode()


def damaged_json(seeds: Sequence[Tree]) -> Strategy:
    """JSON files, most of them well formed."""
    trees = damaged_trees(seeds, root=True).map(as_json)
    return st.one_of(trees, trees, trees, damaged_bytes([as_json(seed) for seed in seeds]))


# YAML

#: Texts that mean more to YAML than they say.
YAML_TEXTS = [
    *("&a [*a]", "*a", "&a x", "!!python/object:os.system x", "!!python/name:os.system"),
    *("!!int a", "!!float x", "!!binary x", "!!timestamp 2020-99-99", "!!set {a, b}", "! x"),
    *("<<: {a: 1}", "? a", "? [a, b]\n: c", "{a: 1, a: 2}", "|\n  a\n", ">-\n a", "- - - a"),
    *("[1, 2", "{a: b", "'a", '"a', '"\\U00110000"', '"\\UFFFFFFFF"', '"\\ud800"', '"\\x"'),
    *("1e-3", "1_000", "0o17", "010", "1:30", ".inf", "-.INF", ".nan", "~", "no", "=", "@a", "`a"),
    *("\t", "\x07", "\x7f", "\ufeff", "\u2028", "---\na: 1\n---\nb: 2", "%YAML 9.9\n---\na: 1"),
    *("[" * 2000, "{" * 2000, "[" * 500 + "]" * 500, "{a: " * 500 + "}" * 500, "- " * 1000),
    *("9" * 5000, "a" * 5000, "${HOME}", "${NOT_SET_ANYWHERE}", "${A:-${B}}", "~/x", "~nobody_x"),
]


def alias_bomb(levels: int, width: int) -> str:
    """A few hundred bytes that stand for width ** levels values."""
    lines = ["a0: &a0 [x, x]"]
    lines += [
        f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * width)}]"
        for level in range(1, levels)
    ]
    return "\n".join([*lines, f"run: {{name: *a{levels - 1}}}", ""])


def yaml_text() -> Strategy:
    """A value as it stands in a YAML file or an override."""
    plain = st.text(max_size=20)
    return st.one_of(st.sampled_from(YAML_TEXTS), plain, _values.map(as_json).map(bytes.decode))


def damaged_yaml(seeds: Sequence[Tree]) -> Strategy:
    """Configuration files: changed trees, lines with YAML's own features, bombs, and bytes."""
    texts = [yaml.safe_dump(seed, sort_keys=False) for seed in seeds]
    trees = damaged_trees(seeds).map(as_json)  # JSON is YAML
    change = st.tuples(st.sampled_from(["value", "value", "insert", "delete"]), PLACES, yaml_text())
    lines = st.builds(
        _change_lines, st.sampled_from(texts), st.lists(change, min_size=1, max_size=4)
    )
    bombs = st.builds(alias_bomb, st.integers(1, 12), st.integers(1, 12))
    raw = damaged_bytes([text.encode() for text in texts])
    encoded = st.one_of(lines, lines, lines, bombs).map(_encoded)
    return st.one_of(encoded, encoded, trees, raw)


def _change_lines(text: str, changes: Sequence[Tuple[str, int, str]]) -> str:
    lines = text.splitlines()
    for kind, place, value in changes:
        at = place % (len(lines) + 1)
        if kind == "insert" or at == len(lines):
            lines.insert(at, value)
        elif kind == "delete":
            del lines[at]
        else:
            lines[at] = f"{lines[at].partition(':')[0]}: {value}"
    return "\n".join(lines)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


# Tables and lists of text

_CELLS = [
    *("", " ", '"', '""', ",", ";", "\t", "\r", "\n", "\x0b", "\x1c", "\u2028", "NA", "nan", "inf"),
    *("-1", "0", "1e400", "9" * 40, "9" * 5000, "1e5", "0x10", "\u0661", "½", "-0", "1.5", "058Y"),
    *("a/b.png", "..\\b.png", "C:b.png", "/etc/passwd", ".", "..", "=1.png", "@SUM(1)", "a" * 9999),
    *("No Finding|Mass", "Mass|Mass", "mass", "|", "Infiltrate", "YES", "yes ", "MAYBE", "\ufeff"),
]


def regular_expressions() -> Strategy:
    """Expressions of repetitions, groups and alternatives, also wrong ones."""
    repeats = ["a?", "a+", "a*", ".*?", "{2}", "{1,3}", "*", "+", "?"]
    others = ["a", "b", "ab", ".", "(", "(?:", "(?=", ")", "|", "[ab]", "^", "$", r"\w", r"\1"]
    return st.lists(st.sampled_from([*repeats, *others]), max_size=14).map("".join)


def damaged_table(seeds: Sequence[str]) -> Strategy:
    """Comma-separated files with cells replaced, and lines and columns cut, doubled or moved."""
    change = st.tuples(
        st.sampled_from(["cell", "cell", "cell", "drop", "line", "double", "swap", "column"]),
        PLACES,
        PLACES,
        st.one_of(st.sampled_from(_CELLS), st.text(max_size=8), st.integers().map(str)),
    )
    tables = st.builds(
        _change_table, st.sampled_from(seeds), st.lists(change, min_size=1, max_size=5)
    )
    raw = damaged_bytes([seed.encode() for seed in seeds])
    text = st.text(max_size=200).map(_encoded)
    return st.one_of(*[tables.map(_encoded)] * 4, raw, text)


def _change_table(seed: str, changes: Sequence[Tuple[str, int, int, str]]) -> str:
    rows = [line.split(",") for line in seed.splitlines()]
    for kind, first, second, value in changes:
        if not rows:
            break
        row = rows[first % len(rows)]
        column = second % max(len(row), 1)
        if kind == "cell" and row:
            row[column] = value
        elif kind == "drop" and row:
            del row[column]
        elif kind == "line":
            del rows[first % len(rows)]
        elif kind == "double":
            rows.insert(second % len(rows), list(row))
        elif kind == "swap":
            other = second % len(rows)
            rows[first % len(rows)], rows[other] = rows[other], row
        elif kind == "column":
            rows = [[*line[:column], value, *line[column:]] for line in rows]
    return "\n".join(",".join(row) for row in rows) + "\n"


# Images

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Offset of the header's 13 bytes in a PNG.
_PNG_HEADER = 16


def with_checksums(data: bytes) -> bytes:
    """Correct the checksums of a PNG's chunks as far as it can be walked."""
    fixed, at = bytearray(data), len(_PNG_SIGNATURE)
    while fixed.startswith(_PNG_SIGNATURE) and at + 12 <= len(fixed):
        length = struct.unpack_from(">I", fixed, at)[0]
        end = at + 8 + length
        if end + 4 > len(fixed):
            break
        fixed[end : end + 4] = struct.pack(">I", zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


def damaged_images(seeds: Sequence[bytes]) -> Strategy:
    """Images with changed bytes, and PNGs with another header and right checksums."""
    raw = damaged_bytes(seeds)
    pngs = [seed for seed in seeds if seed.startswith(_PNG_SIGNATURE)]
    sides = st.one_of(
        st.integers(0, 64), st.sampled_from([2**14, 2**16, 64 * 10**6, 2**31 - 1, 2**31, 2**32 - 1])
    )
    header = st.builds(
        lambda width, height, rest: struct.pack(">II5B", width, height, *rest),
        sides,
        sides,
        st.tuples(
            st.sampled_from([1, 2, 4, 8, 16, 0, 3, 255]),
            st.sampled_from([0, 2, 3, 4, 6, 1, 255]),
            st.sampled_from([0, 0, 0, 1]),
            st.sampled_from([0, 0, 0, 1]),
            st.integers(0, 2),
        ),
    )
    headed = st.builds(
        lambda seed, new: seed[:_PNG_HEADER] + new + seed[_PNG_HEADER + len(new) :],
        st.sampled_from(pngs),
        header,
    )
    return st.one_of(raw, raw, raw.map(with_checksums), headed.map(with_checksums))


# safetensors


def damaged_tensors(seeds: Sequence[bytes]) -> Strategy:
    """safetensors files whose header, a JSON object after its length, is changed as a tree."""
    split = [_split_tensors(seed) for seed in seeds]
    headers = [json.loads(header) for header, _ in split]
    trees = st.builds(
        lambda header, data: _joined(as_json(header), data),
        damaged_trees(headers),
        st.sampled_from([data for _, data in split]),
    )
    return st.one_of(trees, trees, damaged_bytes(seeds))


def _split_tensors(data: bytes) -> Tuple[bytes, bytes]:
    end = 8 + struct.unpack_from("<Q", data)[0]
    return data[8:end], data[end:]


def _joined(header: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + data
