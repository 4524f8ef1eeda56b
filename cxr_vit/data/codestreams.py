"""Check the structure of PNG and JPEG files before a decoder sees them.

Decoders allocate and loop as a file says: what a stranger's file may ask for is limited here.
"""

from __future__ import annotations

import re
import struct
import zlib
from typing import Iterator, List, NamedTuple, Set, Tuple

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
JPEG_SIGNATURE = b"\xff\xd8\xff"

#: Longest side of an image: a row costs memory however short it is. X-ray images are below 10,000.
MAX_SIDE = 32_768
#: Bytes of everything in a file but the compressed pixels. Colour profiles have a few at most.
_MAX_METADATA = 16_000_000
#: Pieces of a file; each takes microseconds. PNGs of 64 megapixels in 16-bit colour have 50,000.
_MAX_CHUNKS = 200_000
_MAX_SEGMENTS = 10_000
#: A progressive JPEG has about 10, each of which takes as long as the whole image.
_MAX_SCANS = 50
#: EXIF of a JPEG is at most one segment. Its entries may overlap, so that more would add up.
MAX_EXIF = 2**16
#: Bytes between the segments of a JPEG, which Pillow skips one by one.
_MAX_PADDING = 10_000

_MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
_START, _END, _SCAN, _APP1 = 0xD8, 0xD9, 0xDA, 0xE1
#: Markers with the size of the picture; the last is that of JPEG-LS.
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}

#: Channels by PNG colour type.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

#: Adam7 interlacing: first column and row of each pass, and the steps between columns and rows.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
    (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip

#: Bytes that are decompressed at a time, and those that are given for it.
_UNPACKED, _PACKED = 2**20, 2**16


class Unusable(Exception):
    """Why an image is unusable."""


def damaged(what: object) -> Unusable:
    """Return the error for damage of any kind."""
    return Unusable(f"a damaged image ({str(what)[:100]}). Fetch the file again.")


def overloaded(what: str) -> Unusable:
    """Return the error for a file that holds more than an image needs."""
    return Unusable(f"{what}. Export the image as a plain PNG.")


class PngChunks(NamedTuple):
    """The kinds of chunks in a PNG, its header, and its compressed pixels."""

    kinds: Set[bytes]
    header: bytes
    pixels: List[memoryview]


def read_chunks(data: bytes) -> PngChunks:
    """Walk a PNG to its end and verify every checksum, of which Pillow verifies only some."""
    view, offset = memoryview(data), len(PNG_SIGNATURE)
    chunks = PngChunks(set(), data[16:29], [])
    count = metadata = 0
    while b"IEND" not in chunks.kinds:
        if offset + 12 > len(data):
            raise damaged("it ends too early")
        length, kind = struct.unpack_from(">I4s", data, offset)
        body = view[offset + 4 : offset + 8 + length]
        if offset + 12 + length > len(data):
            raise damaged("it ends too early")
        if zlib.crc32(body) != struct.unpack_from(">I", data, offset + 8 + length)[0]:
            raise damaged("a checksum is wrong")
        chunks.kinds.add(kind)
        if kind == b"IDAT":
            chunks.pixels.append(body[4:])
        else:
            metadata += length
        offset, count = offset + 12 + length, count + 1
        if metadata > _MAX_METADATA or count > _MAX_CHUNKS:
            raise overloaded("a PNG with too much beside the image")
    if data[12:16] != b"IHDR" or len(chunks.header) != 13:
        raise damaged("it does not begin with a header")
    return chunks


def has_all_rows(chunks: PngChunks) -> bool:
    """Whether a PNG holds the pixels its header promises; Pillow leaves missing rows black."""
    width, height, bits, colour, _, _, is_interlaced = struct.unpack(">IIBBBBB", chunks.header)
    promised = 0
    for left, top, right, down in _PASSES if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            promised += rows * (1 + -(-columns * bits * _CHANNELS[colour] // 8))
    decompressor = zlib.decompressobj()
    for chunk in chunks.pixels:
        for start in range(0, len(chunk), _PACKED):
            packed, has_more = bytes(chunk[start : start + _PACKED]), True
            while has_more and promised > 0 and not decompressor.eof:
                unpacked = len(decompressor.decompress(packed, min(promised, _UNPACKED)))
                packed = decompressor.unconsumed_tail
                promised -= unpacked
                has_more = bool(packed) or unpacked == _UNPACKED
    return promised <= 0


def _segments(data: bytes) -> Iterator[Tuple[int, int, int]]:
    """Yield marker, offset and length of each segment of a JPEG or JPEG-LS file."""
    offset = count = padding = 0
    seen_scan = False
    found = _MARKER.search(data)
    while found and data[found.start() + 1] != _END:
        marker = data[found.start() + 1]
        padding += 0 if seen_scan else found.start() - offset
        count += 1
        if padding > _MAX_PADDING or count > _MAX_SEGMENTS:
            raise overloaded("a JPEG with too much beside the image")
        offset, length = found.end(), 0
        if marker != _START:
            length = int.from_bytes(data[offset : offset + 2], "big")
            yield marker, offset, length
        seen_scan = seen_scan or marker == _SCAN
        offset += length
        found = _MARKER.search(data, offset)


def check_jpeg(data: bytes) -> List[Tuple[int, int, int]]:
    """Return width, height and channels of each picture header in a JPEG or JPEG-LS file.

    Raises Unusable if there are too many scans, or too much beside the image.
    """
    scans = exif = metadata = 0
    sizes = []
    for marker, offset, length in _segments(data):
        if marker == _SCAN:
            scans += 1
        elif marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", data, offset + 3)
            sizes.append((width, height, channels))
        metadata += length
        if marker == _APP1 and data.startswith(b"Exif\0", offset + 2):
            exif += length
        if exif > MAX_EXIF or metadata > _MAX_METADATA:
            raise overloaded("a JPEG with too much beside the image")
        if scans > _MAX_SCANS:
            raise overloaded(f"a JPEG of more than {_MAX_SCANS} scans")
    return sizes
