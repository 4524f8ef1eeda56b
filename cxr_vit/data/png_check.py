"""What Pillow leaves unchecked in a PNG: most checksums, and whether all rows are there.

Imports no torch.
"""

from __future__ import annotations

import struct
import zlib
from typing import List, NamedTuple, Set

__all__ = ["SIGNATURE", "PngChunks", "has_all_rows", "read_chunks"]

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
# Adam7: first column and row, and the steps between columns and rows.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
    (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip


class PngChunks(NamedTuple):
    """The kinds of chunks in a PNG, and what its pixels are packed in."""

    kinds: Set[bytes]
    header: bytes
    packed: List[memoryview]


def read_chunks(data: bytes) -> PngChunks:
    """Walk a PNG to its end and check every checksum.

    Raises
    ------
    ValueError
        What is wrong, in words.
    """
    view, at = memoryview(data), len(SIGNATURE)
    chunks = PngChunks(set(), data[16:29], [])
    while b"IEND" not in chunks.kinds:
        if at + 12 > len(data):
            raise ValueError("it ends too early")
        length, kind = struct.unpack_from(">I4s", data, at)
        body = view[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            raise ValueError("it ends too early")
        if zlib.crc32(body) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            raise ValueError("a checksum is wrong")
        chunks.kinds.add(kind)
        if kind == b"IDAT":
            chunks.packed.append(body[4:])
        at += 12 + length
    if data[12:16] != b"IHDR" or len(chunks.header) != 13:
        raise ValueError("it does not begin with a header")
    return chunks


def has_all_rows(chunks: PngChunks) -> bool:
    """Whether as many bytes are packed as the header promises: Pillow leaves other rows black."""
    width, height, bits, colour, _, _, is_interlaced = struct.unpack(">IIBBBBB", chunks.header)
    promised = 0
    for left, top, right, down in _PASSES if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            promised += rows * (1 + -(-columns * bits * _CHANNELS[colour] // 8))
    return len(zlib.decompressobj().decompress(b"".join(chunks.packed), promised)) == promised
