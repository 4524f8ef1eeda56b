"""What the header of a DICOM file says beside the image: warnings, and the tags that are asked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Union

from cxr_vit.data.dicom import INSTALL, is_dicom, parse, quiet
from cxr_vit.errors import ConfigError, suggestion
from cxr_vit.regular_files import read_bytes

#: Bytes of a file that are read for its header, and those of the files that images are read from.
_HEADER_BYTES, _FILE_BYTES = 2**24, 178 * 7_000_000 + 1_000_000
#: Characters of a tag's value that are kept, and of a value in a warning.
_MAX_TAG, _MAX_QUOTED = 1000, 30

#: Modalities of X-ray images, those in the standard once among them; OT and HC may be any.
_XRAY = {"CR", "DX", "RG", "RF", "XA", "DF", "DS", "OT", "HC"}
_CHEST = re.compile("CHEST|THORA|TORAX|LUNG|PULM|RIB|HEART|CARD|STERN")
#: Words of a view that is not frontal: lateral, and oblique to one side of the front or back. LLD,
#: a patient who lies on the left side, may be frontal.
_NOT_FRONTAL = {"LL", "RL", "LAT", "LATERAL", "RAO", "LAO", "RPO", "LPO", "RLO", "LLO", "OBLIQUE"}
#: Transfer syntaxes: JPEG baseline and extended, JPEG-LS near-lossless.
_LOSSY = {f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 81)}
#: Value representations of bytes, of sequences, and of what may be any.
_NO_TEXT = {"SQ", "OB", "OD", "OF", "OL", "OV", "OW", "UN", "NONE"}


class DicomHeader(NamedTuple):
    """What is known of a file beside its image."""

    #: Short phrases without data of the patient, of what may make a model for chest X-rays err.
    warnings: List[str]
    #: The asked keywords and their values, as printable text; "" where the file has none.
    tags: Dict[str, str]


def check_keywords(keep: Sequence[str]) -> None:
    """Raise ConfigError if one of these is no keyword of DICOM whose value is text or numbers."""
    if not keep:
        return
    try:
        from pydicom import datadict
    except ImportError as error:
        raise ConfigError(f"keeping tags of DICOM files needs pydicom. {INSTALL}") from error
    for keyword in keep:
        tag = datadict.tag_for_keyword(keyword)
        if tag is None:
            near = suggestion(keyword, datadict.keyword_dict)
            raise ConfigError(
                f"{keyword!r} is no keyword of DICOM.{near} Give keywords as in the standard, e.g."
                " PatientID or StudyDate."
            )
        if _NO_TEXT & set(datadict.dictionary_VR(tag).split(" or ")):
            raise ConfigError(f"{keyword} holds no text in DICOM. Leave it out.")


def read_dicom_header(path: Union[str, Path], keep: Sequence[str] = ()) -> DicomHeader:
    """Read the header of a DICOM file, and return what is to be warned of, and the tags in `keep`.

    A file that is no DICOM file, or cannot be read, has no warnings: reading its pixels fails with
    the reason. `keep` has passed `check_keywords`. At most 16 MB of the file are read.
    """
    nothing = DicomHeader([], dict.fromkeys(keep, ""))
    try:
        if not is_dicom(read_bytes(path, limit=_FILE_BYTES, length=132)):
            return nothing
        data = read_bytes(path, limit=_FILE_BYTES, length=_HEADER_BYTES)
        with quiet():
            dataset = parse(data, stop_before_pixels=True)
            tags = {keyword: _text(_element(dataset, keyword), _MAX_TAG) for keyword in keep}
            return DicomHeader(list(_warnings(dataset)), tags)
    except MemoryError:
        raise
    except Exception:  # of many types, as in decode_dicom, which reports them
        return nothing


def _element(dataset: Any, keyword: str) -> Any:
    value = dataset.get(keyword)
    return dataset.file_meta.get(keyword) if value is None else value


def _text(value: Any, length: int = _MAX_QUOTED) -> str:
    """Return the value of an element as printable text; several are separated as in the file."""
    if value is None:
        return ""
    several = isinstance(value, (list, tuple)) or type(value).__name__ == "MultiValue"
    text = "\\".join(map(str, value)) if several else str(value)
    return "".join(letter if letter.isprintable() else "?" for letter in text[:length]).strip()


def _warnings(dataset: Any) -> Iterator[str]:
    modality = _text(dataset.get("Modality")).upper()
    if modality and modality not in _XRAY:
        yield f"modality {modality}, not a chest X-ray"
    part = _text(dataset.get("BodyPartExamined")).upper()
    if part and not _CHEST.search(part):
        yield f"body part {part}, not the chest"
    codes = dataset.get("ViewCodeSequence") or ()
    meanings = [_text(code.get("CodeMeaning")) for code in codes]
    for view in (_text(dataset.get("ViewPosition")), *meanings):
        if _NOT_FRONTAL & set(re.findall("[A-Z]+", view.upper())):
            yield f"view {view}, not frontal"
            break
    if _text(dataset.get("BurnedInAnnotation")).upper() == "YES":
        yield "text burned into the image"
    is_lossy = dataset.get("LossyImageCompression") == "01"
    if is_lossy or str(dataset.file_meta.get("TransferSyntaxUID")) in _LOSSY:
        yield "lossy compression"
