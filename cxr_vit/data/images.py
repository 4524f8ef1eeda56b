"""Find, check and decode image files."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import (
    Any,
    Callable,
    Container,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

import kornia_rs
import numpy as np
from PIL import Image, UnidentifiedImageError

from cxr_vit.data.codestreams import (
    JPEG_SIGNATURE,
    MAX_EXIF,
    MAX_SIDE,
    PNG_SIGNATURE,
    PngChunks,
    Unusable,
    check_jpeg,
    damaged,
    has_all_rows,
    overloaded,
    read_chunks,
)
from cxr_vit.data.dicom import decode_dicom, is_dicom
from cxr_vit.data.names import IMAGE_EXTENSIONS, NameIndex, agreement, extension, parts_of
from cxr_vit.errors import DataError
from cxr_vit.regular_files import read_bytes

logger = logging.getLogger(__name__)

MAX_MEGAPIXELS = 64

#: Filters that resize images, all antialiased, by their name in the configuration.
FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

#: The only decoders of Pillow that are tried, whatever the file's name or content.
_FORMATS = ("PNG", "JPEG")

#: What a failed download leaves in place of an image, by its first bytes.
_LOOK_ALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image. Run: git lfs pull"),
    (b"<", "a page of HTML or XML, not the image (a login or error page?). Fetch it again."),
)

#: What a DICOM file without preamble begins with: group 2, or 8, of its first element.
_DICOM_GROUPS = (b"\x02\x00", b"\x08\x00")

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

#: Uncompressed 16-bit colour has 6; the file is in memory together with its decoded pixels.
_BYTES_PER_MEGAPIXEL = 7_000_000
_ADVICE = {
    errno.EFBIG: " Export it as a plain PNG, or raise data.max_megapixels.",
    errno.EINVAL: " Replace it by an image file.",
}
#: Pixels that are converted at a time: 16-bit colour takes many times its size meanwhile.
_BAND_PIXELS = 2**18

#: Bit depth and colour type in a PNG file, and two of their values.
_PNG_FORMAT = slice(24, 26)
_GRAY_8, _RGB_16 = b"\x08\x00", b"\x10\x02"

#: EXIF in a PNG as ImageMagick writes it: a text of hexadecimal digits.
_RAW_EXIF = "Raw profile type exif"
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

#: PNG chunks that do not change the pixels: no orientation, no transparency.
_PLAIN_CHUNKS = frozenset(
    b"IHDR IDAT IEND tIME pHYs gAMA sRGB cHRM iCCP sBIT bKGD hIST sPLT".split()
)


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

    `paths` maps file names to paths; `names` are the images of this sequence, in order; `how` is
    what `gray_or_reason` takes.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        names: Sequence[str],
        *,
        image_size: int,
        max_megapixels: int,
        **how: Any,
    ) -> None:
        super().__init__(image_size)
        self._how = {"max_megapixels": max_megapixels, **how}
        self._by_name = paths
        self._paths = [paths[name] for name in names]

    def __len__(self) -> int:
        return len(self._paths)

    def select(self, names: Sequence[str]) -> FileReader:
        """Return a reader of some of the images."""
        return FileReader(
            self._by_name,
            names,
            image_size=self.image_size,
            **self._how,
        )

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode and resize images."""
        for image, row in zip(out, rows):
            image[:] = read_gray(self._paths[row], self.image_size, **self._how)

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


_READ_ONE = "Set data.images to the folder that should be read, or keep one file of each image."


def find_images(
    root: Path, wanted: Optional[Iterable[str]] = None, *, remedy: str = _READ_ONE
) -> Dict[str, str]:
    """Walk a folder and return the path of each image, or of each wanted one by its text.

    Any nesting works: `images/` of NIH's archives, `images_001/images/` of Kaggle's copy, or one
    folder of resized images. A wanted text is a file name or a path with any extension or none; the
    file is the one whose folders agree with the text's longest, then the one of that very name,
    then one of another extension. A text whose own folder has images, but not this one, has no
    file: `train/1.png` is not taken for `test/1.png`. Nothing is read outside `root`, whatever a
    text is. Without `wanted`, the key is the file name.

    Raises DataError if two files fit alike, e.g. a resized copy beside the originals, with the
    `remedy`, or if one file fits two texts.
    """
    texts = None if wanted is None else set(wanted)
    has_folders = texts is not None and re.search(r"[/\\]", "\n".join(texts)) is not None
    found = {} if has_folders else _find_exactly(root, texts, remedy)
    if texts is not None and len(found) < len(texts):
        found.update(_find_by_stem(root, texts.difference(found), remedy, taken=found))
    return found


def _find_exactly(root: Path, wanted: Optional[Container[str]], remedy: str) -> Dict[str, str]:
    found: Dict[str, str] = {}
    duplicates = []
    for folder, names in walk(root):
        for name in names:
            if name in wanted if wanted is not None else extension(name) in IMAGE_EXTENSIONS:
                path = os.path.join(folder, name)
                if found.setdefault(name, path) != path:
                    duplicates.append(f"{found[name]} and {path}")
    _refuse_twice(root, duplicates, remedy)
    return found


def _find_by_stem(
    root: Path, wanted: Iterable[str], remedy: str, *, taken: Container[str] = ()
) -> Dict[str, str]:
    """Find texts by the ends of paths; files of the names `taken` are of other images."""
    index = NameIndex(wanted)
    found: Dict[str, str] = {}
    scores: Dict[str, int] = {}
    twice: Dict[str, str] = {}
    places: List[List[str]] = []
    for folder, names in walk(root):
        folders = parts_of(os.path.abspath(folder))  # noqa: PTH100  (Path.resolve follows links)
        beginnings = index.beginnings(folders)
        has_images = any(extension(name) in IMAGE_EXTENSIONS for name in names)
        for name in names:
            for text in index.find(beginnings, name):
                score = 0 if name in taken else _score(text, folders, name)
                has_images = has_images or score > 0
                best = scores.get(text, 0)
                if score > best:
                    found[text], scores[text] = os.path.join(folder, name), score
                    twice.pop(text, None)
                elif score == best > 0:
                    twice.setdefault(text, os.path.join(folder, name))
        if has_images:
            places.append(folders)
    for text in _absent_where_expected(scores, places):
        del found[text], scores[text]
        twice.pop(text, None)
    _refuse_twice(root, [f"{found[text]} and {path}" for text, path in twice.items()], remedy)
    if len(set(found.values())) < len(found):
        _drop_shared(found, scores)
    _log_differences(found, scores)
    return found


def walk(
    root: Path, *, on_error: Optional[Callable[[OSError], None]] = None, hidden: bool = True
) -> Iterator[Tuple[str, List[str]]]:
    """Yield each folder and its file names, following links to folders.

    `on_error` is called for a folder that cannot be read, which is passed over otherwise. `hidden`
    folders may be left out.
    """
    seen: Set[object] = set()
    for folder, folders, names in os.walk(root, onerror=on_error, followlinks=True):
        status = Path(folder).stat()
        identity = status.st_dev, status.st_ino
        if identity in seen:  # links may form a circle
            folders.clear()
            continue
        seen.add(identity)
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        yield folder, names


def _refuse_twice(root: Path, pairs: Sequence[str], remedy: str) -> None:
    if pairs:
        raise DataError(f"{len(pairs)} images are under {root} twice, e.g. {pairs[0]}. {remedy}")


#: Parts of a score: the file has the text's name, or its name but for the extension.
_EXACT, _OTHER_EXTENSION, _FOLDER = 2, 1, 3


def _score(text: str, folders: Sequence[str], name: str) -> int:
    """Return how well a file of the same stem fits a text; 0 if it is no image."""
    if text == name:
        return _EXACT
    parts = parts_of(text)
    if parts[-1:] == [name]:
        score = _EXACT
    elif extension(name) in IMAGE_EXTENSIONS:
        score = _OTHER_EXTENSION
    else:
        return 0
    return score + _FOLDER * agreement(parts[:-1], folders)


def _absent_where_expected(scores: Mapping[str, int], places: Iterable[Sequence[str]]) -> List[str]:
    """Return the texts of which a folder with images agrees in more folders than the found file.

    `places` are the folders with images.
    """
    nearer: Dict[str, str] = {}  # text -> one folder more than agree
    for text, score in scores.items():
        folders = parts_of(text)[:-1]
        agreeing = (score - 1) // _FOLDER
        if agreeing < len(folders):
            nearer[text] = "/".join(folders[-agreeing - 1 :])
    wanted = set(nearer.values())
    depths = {end.count("/") + 1 for end in wanted}
    there = {"/".join(place[-depth:]) for place in places for depth in depths} & wanted
    return [text for text, end in nearer.items() if end in there]


def _drop_shared(found: Dict[str, str], scores: Mapping[str, int]) -> None:
    """Leave each file to the text that it fits best; the others have no file.

    Raises DataError if it fits two texts alike.
    """
    owners: Dict[str, str] = {}
    shared: Dict[str, str] = {}
    for text, path in list(found.items()):
        other = owners.setdefault(path, text)
        if other == text:
            continue
        if scores[text] > scores[other]:
            owners[path] = text
            shared.pop(path, None)
        elif scores[text] == scores[other]:
            shared[path] = text
        del found[other if owners[path] == text else text]
    if shared:
        path, text = next(iter(shared.items()))
        raise DataError(
            f"{len(shared)} files are of two images each, e.g. {path} of {owners[path]!r} and of"
            f" {text!r}. Give each image a file, or leave out one of the rows."
        )


def _log_differences(found: Mapping[str, str], scores: Mapping[str, int]) -> None:
    """Log how many files differ from their texts in the extension, and warn of other folders."""
    other = [text for text in found if scores[text] % _FOLDER == _OTHER_EXTENSION]
    other = [text for text in other if extension(text)]  # a name may have none
    if other:
        text = "%d images have another extension than their names, e.g. %s for %r"
        logger.info(text, len(other), found[other[0]], other[0])
    moved = [text for text in found if scores[text] < _FOLDER and len(parts_of(text)) > 1]
    if moved:
        text = "%d images are in other folders than their paths, found by name, e.g. %s for %r"
        logger.warning(text, len(moved), found[moved[0]], moved[0])


def read_gray(path: Union[str, Path], size: int, **how: Any) -> np.ndarray:
    """Read an image as 8-bit gray, uint8 ``[size, size]``; `how` is what `gray_or_reason` takes.

    The file is a PNG or JPEG, gray or colour, of 8 or 16 bits, or a DICOM file (see
    `decode_dicom`), whatever its name. An alpha channel must be opaque (some of NIH's images are
    RGBA with equal colours); 16-bit values are scaled by the depth they use. A JPEG and a DICOM
    file have no checksums: damage inside them may go unnoticed. Images of more than
    `max_megapixels` are refused before they are decoded.

    Raises DataError if the file is missing, damaged, of another format, too large, animated or
    partly transparent, or a DICOM file and pydicom is not installed.
    """
    pixels = gray_or_reason(path, size, **how)
    if isinstance(pixels, str):
        raise DataError(f"{path}: {pixels}")
    return pixels


def gray_or_reason(
    path: Union[str, Path],
    size: int,
    *,
    max_megapixels: int = MAX_MEGAPIXELS,
    resample: str = "bilinear",
    dicom_window: Optional[str] = None,
) -> Union[np.ndarray, str]:
    """Read an image as `read_gray` does, or return the reason why it is unusable.

    `resample` is one of `FILTERS`; `dicom_window` has no effect on a PNG or JPEG.
    """
    gray = _original_or_reason(path, max_megapixels, dicom_window)
    if isinstance(gray, str):
        return gray
    if gray.size != (size, size):
        gray = gray.resize((size, size), FILTERS[resample])
    return np.array(gray, dtype=np.uint8)


def read_original(
    path: Union[str, Path],
    *,
    max_megapixels: int = MAX_MEGAPIXELS,
    dicom_window: Optional[str] = None,
) -> Image.Image:
    """Read an image as `read_gray` does, of mode L, at its own size.

    Raises DataError as `read_gray` does.
    """
    gray = _original_or_reason(path, max_megapixels, dicom_window)
    if isinstance(gray, str):
        raise DataError(f"{path}: {gray}")
    return gray


def _original_or_reason(
    path: Union[str, Path], max_megapixels: int, dicom_window: Optional[str]
) -> Union[Image.Image, str]:
    try:
        return _decode(_read_bytes(path, max_megapixels), max_megapixels, dicom_window)
    except Unusable as reason:  # it may quote the file
        return "".join(letter if letter.isprintable() else "?" for letter in str(reason))


def _read_bytes(path: Union[str, Path], max_megapixels: int) -> bytes:
    try:
        data = read_bytes(path, limit=max_megapixels * _BYTES_PER_MEGAPIXEL + 1_000_000)
    except FileNotFoundError as error:
        raise Unusable("the image is not there.") from error
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "")
        raise Unusable(f"the image cannot be read ({error.strerror}).{advice}") from error
    if not data:
        raise Unusable("the file is empty. Fetch it again.")
    start = data[:512].replace(_BYTE_ORDER_MARK, b"", 1).lstrip().lower()
    for beginning, reason in _LOOK_ALIKES:
        if start.startswith(beginning):
            raise Unusable(reason)
    return data


def _decode(data: bytes, max_megapixels: int, window: Optional[str]) -> Image.Image:
    """Decode a file to an image of mode L."""
    if is_dicom(data):
        return Image.fromarray(decode_dicom(data, max_megapixels=max_megapixels, window=window))
    try:
        chunks = read_chunks(data) if data.startswith(PNG_SIGNATURE) else None
        if data.startswith(JPEG_SIGNATURE):
            check_jpeg(data)
        with warnings.catch_warnings():  # Pillow warns of large images and of broken metadata
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_header(image, max_megapixels)
            return _to_gray(image, data, chunks)
    except (Unusable, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise Unusable(
            f"far more pixels than data.max_megapixels={max_megapixels}. Scale the image down."
        ) from error
    except UnidentifiedImageError as error:
        if data.startswith((PNG_SIGNATURE, JPEG_SIGNATURE)):
            raise damaged("in its header") from error
        if data.startswith(_DICOM_GROUPS):
            raise Unusable(
                "a DICOM file without its preamble (DICM at byte 128). Export it again."
            ) from error
        raise Unusable("no PNG, JPEG or DICOM file by its content. Fetch it again.") from error
    except Exception as error:  # decoders raise errors of many types on damaged bytes
        raise damaged(error) from error


def _check_header(image: Image.Image, max_megapixels: int) -> None:
    width, height = image.size
    if width * height > max_megapixels * 1_000_000:
        limit = f"data.max_megapixels={max_megapixels}"
        raise Unusable(f"{width} x {height} pixels are more than {limit}. Scale the image down.")
    if max(width, height) > MAX_SIDE:
        raise Unusable(f"{width} x {height} pixels: a side exceeds {MAX_SIDE}. Scale it down.")
    if image.mode in ("CMYK", "YCCK"):
        raise Unusable(f"an image for print ({image.mode}). Export the image as gray.")
    if getattr(image, "is_animated", False):
        raise Unusable("several pictures in one file. Export one of them as a plain PNG.")


def _to_gray(image: Image.Image, data: bytes, chunks: Optional[PngChunks]) -> Image.Image:
    png_format = data[_PNG_FORMAT] if chunks else b""
    if chunks and png_format == _GRAY_8 and chunks.kinds <= _PLAIN_CHUNKS:
        with contextlib.suppress(Exception):  # Pillow then decodes it or says what is wrong
            pixels = kornia_rs.io.decode_image_png_u8(data, image.size[::-1], "mono")
            return Image.fromarray(np.asarray(pixels)[..., 0])
    if chunks and not has_all_rows(chunks):
        raise damaged("rows are missing")
    if chunks and b"PLTE" not in chunks.kinds and png_format[1:] == b"\x03":
        raise damaged("its palette is missing")
    low = _low_bytes(data) if png_format == _RGB_16 else []
    image.load()  # also reads the metadata that follows the pixels
    levels: Any = image.getextrema() if image.mode == "P" else (0, 0)
    if image.mode == "P" and levels[1] >= len(image.getpalette() or ()) // 3:
        raise damaged("its palette is too short")
    gray = Image.new("L", image.size)
    if (low or image.mode.startswith("I")) and "transparency" not in image.info:
        _paste_scaled(gray, lambda: _deep_bands(image, low))
    else:
        bits = png_format[0] if png_format else 8
        _paste(gray, (_band_to_gray(band, png_bits=bits) for band in _bands(image)))
    turn = _turn(image.info)
    return gray if turn is None else gray.transpose(turn)


def _turn(metadata: Dict[Any, Any]) -> Optional[Image.Transpose]:
    """Return what turns an image upright, by its metadata."""
    if max(len(metadata.get("exif", "")), len(metadata.get(_RAW_EXIF, "")) // 2) > MAX_EXIF:
        raise overloaded("an image with too much EXIF metadata")
    bearer = Image.new("L", (1, 1))
    bearer.info.update(metadata)
    return _TURNS.get(bearer.getexif().get(_ORIENTATION, 1))


def _bands(image: Image.Image) -> Iterator[Image.Image]:
    """Cut an image into bands of whole rows, from top to bottom."""
    width, height = image.size
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        yield image.crop((0, top, width, min(top + rows, height)))


def _paste(gray: Image.Image, bands: Iterable[Image.Image]) -> None:
    """Put bands into an image, from top to bottom."""
    top = 0
    for band in bands:
        gray.paste(band, (0, top))
        top += band.height


def _low_bytes(data: bytes) -> List[np.ndarray]:
    """Return the low bytes of a PNG of 16-bit colour, of which Pillow reads the high ones."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        tile: Any = (*image.tile[0][:3], "RGB;16L")  # the second byte of two is the high one
        image.tile = [tile]
        return [np.asarray(band) for band in _bands(image)]


def _deep_bands(image: Image.Image, low: List[np.ndarray]) -> Iterator[np.ndarray]:
    """Return the values of 16-bit gray, or of colour by its high bytes and its `low` ones."""
    for index, band in enumerate(_bands(image)):
        values = np.asarray(band)
        yield values.astype(np.uint16) << 8 | low[index] if low else values


def _band_to_gray(image: Image.Image, *, png_bits: int) -> Image.Image:
    if "transparency" in image.info:  # transparent colours without an alpha channel
        if png_bits != 8 and image.mode != "P":  # Pillow compares them at the wrong depth
            raise Unusable("partly transparent. Export the image without a transparent colour.")
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and png_bits == 16:
        raise Unusable("16-bit with an alpha channel. Export the image as 16-bit gray.")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] != 255:
        raise Unusable("partly transparent. Export the image without an alpha channel.")
    return image.convert("L")


def _paste_scaled(gray: Image.Image, bands: Callable[[], Iterable[np.ndarray]]) -> None:
    """Scale bands of 16-bit gray or colour by the depth in use, and put them into `gray`.

    Detectors store 10, 12 or 14 bits unscaled. Pillow's own conversion clips, which turns a 12-bit
    image white.
    """
    used = max(int(values.max()) for values in bands()).bit_length()
    depth = max(8, used + used % 2)
    factor = 255.0 / (2**depth - 1)
    scaled = (np.round(values.astype(np.float32) * factor).astype(np.uint8) for values in bands())
    _paste(gray, (Image.fromarray(values).convert("L") for values in scaled))
