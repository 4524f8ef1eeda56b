"""Find, check and decode image files."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Container, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Union

import kornia_rs
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cxr_vit.data.dicom import decode_dicom, is_dicom
from cxr_vit.errors import DataError

MAX_MEGAPIXELS = 64

#: Recorded in the cache's index.
RESIZE_FILTER = "bilinear, antialiased (Pillow)"

_SUFFIXES = (".png", ".jpg", ".jpeg")

#: The only decoders of Pillow that are tried, whatever the file's name or content.
_FORMATS = ("PNG", "JPEG")

#: What a failed download leaves in place of an image, by its first bytes.
_LOOK_ALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image. Run: git lfs pull"),
    (b"<", "a page of HTML or XML, not the image (a login or error page?). Fetch it again."),
)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

#: Bit depth and colour type in a PNG file, and two of their values.
_PNG_FORMAT = slice(24, 26)
_GRAY_8, _RGB_16 = b"\x08\x00", b"\x10\x02"

#: PNG chunks that do not change the pixels: no orientation, no transparency.
_PLAIN_CHUNKS = frozenset(
    b"IHDR IDAT IEND tIME pHYs gAMA sRGB cHRM iCCP sBIT bKGD hIST sPLT".split()
)

#: Channels by PNG colour type.
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

#: Adam7 interlacing: first column and row of each pass, and the steps between columns and rows.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
    (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip


class ImageReader(ABC):
    """A sequence of images, all `image_size` pixels square."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def select(self, names: Sequence[str]) -> ImageReader:
        """Return a reader of the images with these file names, in this order."""

    @abstractmethod
    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the images of `rows`, int64 ``[n]``, into `out`, uint8 ``[n, H, W]``, contiguous.

        Raises DataError if an image cannot be read.
        """

    def source(self, row: int) -> str:
        """Return the path that an image is read from, for messages."""
        return "unknown path"


class FileReader(ImageReader):
    """Read images from their files; every read decodes and resizes.

    `paths` maps file names to paths; `names` are the images of this sequence, in order.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        names: Sequence[str],
        *,
        image_size: int,
        max_megapixels: int,
    ) -> None:
        super().__init__(image_size)
        self.max_megapixels = max_megapixels
        self._by_name = paths
        self._paths = [paths[name] for name in names]

    def __len__(self) -> int:
        return len(self._paths)

    def select(self, names: Sequence[str]) -> FileReader:
        """Return a reader of some of the images."""
        limits = {"image_size": self.image_size, "max_megapixels": self.max_megapixels}
        return FileReader(self._by_name, names, **limits)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode and resize images."""
        for image, row in zip(out, rows):
            path = self._paths[row]
            image[:] = read_gray(path, self.image_size, max_megapixels=self.max_megapixels)

    def source(self, row: int) -> str:
        """Return the path of an image."""
        return self._paths[row]

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process needs the paths of its own images only.
        return {**self.__dict__, "_by_name": {}}


class EmptyReader(ImageReader):
    """A number of images without pixels, for processes that compute without images."""

    def __init__(self, count: int) -> None:
        super().__init__(image_size=0)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def select(self, names: Sequence[str]) -> EmptyReader:
        """Return a reader of this many images."""
        return EmptyReader(len(names))

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Do nothing: the buffer has no pixels."""
        assert out.size == 0, out.shape


def find_images(root: Path, wanted: Optional[Container[str]] = None) -> Dict[str, str]:
    """Walk a folder and return the path of each image (of each wanted one) by its file name.

    Names are unique in NIH's data, so any nesting works: `images/` of NIH's archives,
    `images_001/images/` of Kaggle's copy, or one folder of resized images.

    Raises DataError if two folders hold the same name, e.g. a resized copy beside the originals.
    """
    found: Dict[str, str] = {}
    duplicates = []
    seen: Set[object] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        identity = status.st_dev, status.st_ino
        if identity in seen:  # links may form a circle
            folders.clear()
            continue
        seen.add(identity)
        folders.sort()
        for name in names:
            if name.lower().endswith(_SUFFIXES) and (wanted is None or name in wanted):
                path = os.path.join(folder, name)
                if found.setdefault(name, path) != path:
                    duplicates.append(f"{found[name]} and {path}")
    if duplicates:
        raise DataError(
            f"{len(duplicates)} images are under {root} twice, e.g. {duplicates[0]}. Set"
            " data.images to the folder that should be read."
        )
    return found


def read_gray(
    path: Union[str, Path], size: int, *, max_megapixels: int = MAX_MEGAPIXELS
) -> np.ndarray:
    """Read an image as 8-bit gray, uint8 ``[size, size]``, with an antialiased bilinear filter.

    The file is a PNG or JPEG, gray or colour, of 8 or 16 bits, or a DICOM file (see
    `decode_dicom`), whatever its name. An alpha channel must be opaque (some of NIH's images are
    RGBA with equal colours); 16-bit values are scaled by the depth they use. A JPEG and a DICOM
    file have no checksums: damage inside them may go unnoticed. Images of more than
    `max_megapixels` are refused before they are decoded.

    Raises DataError if the file is missing, damaged, of another format, too large, animated or
    partly transparent, or a DICOM file and pydicom is not installed.
    """
    pixels = gray_or_reason(path, size, max_megapixels=max_megapixels)
    if isinstance(pixels, str):
        raise DataError(f"{path}: {pixels}")
    return pixels


def gray_or_reason(
    path: Union[str, Path], size: int, *, max_megapixels: int = MAX_MEGAPIXELS
) -> Union[np.ndarray, str]:
    """Read an image as `read_gray` does, or return the reason why it is unusable."""
    try:
        gray = _decode(_read_bytes(path), max_megapixels)
    except _Unusable as reason:
        return str(reason)
    if gray.size != (size, size):
        gray = gray.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(gray, dtype=np.uint8)


class _Unusable(Exception):
    """Why an image is unusable."""


def _read_bytes(path: Union[str, Path]) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise _Unusable("the image is not there.") from error
    except OSError as error:
        raise _Unusable(f"the image cannot be read ({error.strerror}).") from error
    if not data:
        raise _Unusable("the file is empty. Fetch it again.")
    start = data[:512].replace(_BYTE_ORDER_MARK, b"", 1).lstrip().lower()
    for beginning, reason in _LOOK_ALIKES:
        if start.startswith(beginning):
            raise _Unusable(reason)
    return data


def _decode(data: bytes, max_megapixels: int) -> Image.Image:
    """Decode a file to an image of mode L."""
    if is_dicom(data):
        pixels = decode_dicom(data, max_megapixels=max_megapixels)
        if isinstance(pixels, str):
            raise _Unusable(pixels)
        return Image.fromarray(pixels)
    try:
        chunks = _read_chunks(data) if data.startswith(_PNG_SIGNATURE) else None
        with warnings.catch_warnings():  # Pillow warns of large images and of broken metadata
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_header(image, max_megapixels)
            return _to_gray(image, data, chunks)
    except (_Unusable, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _Unusable(
            f"far more pixels than data.max_megapixels={max_megapixels}. Scale the image down."
        ) from error
    except UnidentifiedImageError as error:
        if data.startswith((_PNG_SIGNATURE, b"\xff\xd8\xff")):
            raise _damaged("in its header") from error
        raise _Unusable("no PNG, JPEG or DICOM file by its content. Fetch it again.") from error
    except Exception as error:  # decoders raise errors of many types on damaged bytes
        raise _damaged(error) from error


def _damaged(what: object) -> _Unusable:
    return _Unusable(f"a damaged image ({what}). Fetch the file again.")


def _check_header(image: Image.Image, max_megapixels: int) -> None:
    width, height = image.size
    if width * height > max_megapixels * 1_000_000:
        limit = f"data.max_megapixels={max_megapixels}"
        raise _Unusable(f"{width} x {height} pixels are more than {limit}.")
    if getattr(image, "is_animated", False):
        raise _Unusable("several pictures in one file. Export one of them as a plain PNG.")


class _PngChunks(NamedTuple):
    """The kinds of chunks in a PNG, its header, and its compressed pixels."""

    kinds: Set[bytes]
    header: bytes
    pixels: List[memoryview]


def _read_chunks(data: bytes) -> _PngChunks:
    """Walk a PNG to its end and verify every checksum, of which Pillow verifies only some."""
    view, offset = memoryview(data), len(_PNG_SIGNATURE)
    chunks = _PngChunks(set(), data[16:29], [])
    while b"IEND" not in chunks.kinds:
        if offset + 12 > len(data):
            raise _damaged("it ends too early")
        length, kind = struct.unpack_from(">I4s", data, offset)
        body = view[offset + 4 : offset + 8 + length]
        if offset + 12 + length > len(data):
            raise _damaged("it ends too early")
        if zlib.crc32(body) != struct.unpack_from(">I", data, offset + 8 + length)[0]:
            raise _damaged("a checksum is wrong")
        chunks.kinds.add(kind)
        if kind == b"IDAT":
            chunks.pixels.append(body[4:])
        offset += 12 + length
    if data[12:16] != b"IHDR" or len(chunks.header) != 13:
        raise _damaged("it does not begin with a header")
    return chunks


def _has_all_rows(chunks: _PngChunks) -> bool:
    """Whether a PNG holds the pixels its header promises; Pillow leaves missing rows black."""
    width, height, bits, colour, _, _, is_interlaced = struct.unpack(">IIBBBBB", chunks.header)
    promised = 0
    for left, top, right, down in _PASSES if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            promised += rows * (1 + -(-columns * bits * _CHANNELS[colour] // 8))
    return len(zlib.decompressobj().decompress(b"".join(chunks.pixels), promised)) == promised


def _to_gray(image: Image.Image, data: bytes, chunks: Optional[_PngChunks]) -> Image.Image:
    png_format = data[_PNG_FORMAT] if chunks else b""
    if chunks and png_format == _GRAY_8 and chunks.kinds <= _PLAIN_CHUNKS:
        with contextlib.suppress(Exception):  # Pillow then decodes it or says what is wrong
            pixels = kornia_rs.io.decode_image_png_u8(data, image.size[::-1], "mono")
            return Image.fromarray(np.asarray(pixels)[..., 0])
    if chunks and not _has_all_rows(chunks):
        raise _damaged("rows are missing")
    if chunks and b"PLTE" not in chunks.kinds and png_format[1:] == b"\x03":
        raise _damaged("its palette is missing")
    image.load()  # also reads the metadata that follows the pixels
    if image.mode == "P" and int(np.asarray(image).max()) >= len(image.getpalette() or ()) // 3:
        raise _damaged("its palette is too short")
    if png_format == _RGB_16 and "transparency" not in image.info:  # Pillow drops the low bytes
        gray = _to_8_bits(kornia_rs.io.decode_image_png_u16(data, image.size[::-1], "rgb"))
    else:
        gray = _loaded_to_gray(image, png_bits=png_format[0] if png_format else 8)
    gray.info.update(image.info)  # exif_transpose reads the orientation from it
    return ImageOps.exif_transpose(gray).convert("L")


def _loaded_to_gray(image: Image.Image, *, png_bits: int) -> Image.Image:
    if "transparency" in image.info:  # transparent colours without an alpha channel
        if png_bits != 8 and image.mode != "P":  # Pillow compares them at the wrong depth
            raise _Unusable("partly transparent. Export the image without a transparent colour.")
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and png_bits == 16:
        raise _Unusable("16-bit with an alpha channel. Export the image as 16-bit gray.")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] != 255:
        raise _Unusable("partly transparent. Export the image without an alpha channel.")
    if image.mode.startswith("I"):
        return _to_8_bits(image)
    if image.mode in ("CMYK", "YCCK"):
        raise _Unusable(f"an image for print ({image.mode}). Export the image as gray.")
    return image.convert("L")


def _to_8_bits(pixels: Any) -> Image.Image:
    """Scale 16-bit gray or colour by the depth in use.

    Detectors store 10, 12 or 14 bits unscaled. Pillow's own conversion clips, which turns a 12-bit
    image white.
    """
    values = np.asarray(pixels)
    used = int(values.max()).bit_length()
    depth = max(8, used + used % 2)
    scaled = values.astype(np.float32) * (255.0 / (2**depth - 1))
    return Image.fromarray(np.round(scaled).astype(np.uint8))
