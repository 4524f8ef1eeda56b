"""Warnings and tags of the header of DICOM files."""

from __future__ import annotations

import logging
import struct
import warnings
from pathlib import Path
from typing import Any, List

import pytest
from dicom_files import Dataset, encoded, image, ramp, uid
from image_files import write

from cxr_vit.data import dicom
from cxr_vit.data.dicom_header import DicomHeader, check_keywords, read_dicom_header
from cxr_vit.errors import ConfigError


def header(folder: Path, keep: Any = (), **fields: Any) -> DicomHeader:
    with warnings.catch_warnings():  # pydicom warns of what it writes
        warnings.simplefilter("ignore")
        path = write(folder, encoded(image(ramp(), **fields)))
    return read_dicom_header(path, keep)


def view(meaning: str) -> List[Dataset]:
    code = Dataset()
    code.CodeMeaning = meaning
    return [code]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"Modality": "DX", "BodyPartExamined": "CHEST", "ViewPosition": "PA"}, []),
        ({"Modality": "CR", "BodyPartExamined": "Thorax", "ViewPosition": "AP LLD"}, []),
        ({"BurnedInAnnotation": "NO", "LossyImageCompression": "00", "BodyPartExamined": ""}, []),
        ({"ViewCodeSequence": view("postero-anterior")}, []),
        ({"Modality": "CT"}, ["modality CT, not a chest X-ray"]),
        ({"BodyPartExamined": "ABDOMEN"}, ["body part ABDOMEN, not the chest"]),
        ({"ViewPosition": "LL"}, ["view LL, not frontal"]),
        ({"ViewPosition": "XTABLE LATERAL"}, ["view XTABLE LATERAL, not frontal"]),
        ({"ViewCodeSequence": view("left lateral")}, ["view left lateral, not frontal"]),
        ({"BurnedInAnnotation": "YES"}, ["text burned into the image"]),
        ({"LossyImageCompression": "01"}, ["lossy compression"]),
        (
            {"Modality": "MG", "ViewPosition": "RAO", "BurnedInAnnotation": "YES"},
            [
                *("modality MG, not a chest X-ray", "view RAO, not frontal"),
                "text burned into the image",
            ],
        ),
    ],
    ids=range(13),
)
def test_what_may_make_a_model_err_is_warned_of(
    tmp_path: Path, fields: Any, expected: List[str]
) -> None:
    found = header(tmp_path, PatientName="Doe^Jane", PatientID="4711", **fields)
    assert found == (expected, {})


def test_only_asked_tags_are_returned_as_printable_text(tmp_path: Path) -> None:
    given = {"PatientID": "47\x1b[31m11", "PatientName": "Doe^Jane", "StudyDate": "20200131"}
    given.update(WindowCenter=[1, 2], ImageComments="long" * 1000)
    asked = [*given, "Rows", "TransferSyntaxUID", "AccessionNumber"]
    tags = header(tmp_path, asked, PatientSex="F", **given).tags
    assert list(tags) == asked
    assert tags.pop("ImageComments").startswith("longlong")
    assert tags == {
        **{"PatientID": "47?[31m11", "PatientName": "Doe^Jane", "StudyDate": "20200131"},
        **{"WindowCenter": "1.0\\2.0", "Rows": "24", "AccessionNumber": ""},
        "TransferSyntaxUID": str(uid.ExplicitVRLittleEndian),
    }


def test_text_of_a_warning_is_printable_and_short(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("pydicom").disabled = True  # as it writes the file
    try:
        (warning,) = header(tmp_path, BodyPartExamined="A\x1bB" * 100).warnings
    finally:
        logging.getLogger("pydicom").disabled = False
    assert warning.isprintable() and len(warning) < 60
    read_dicom_header(tmp_path / "image.png")
    assert not caplog.records


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x89PNG", b"\0" * 128 + b"DICM", b"\0" * 128 + b"DICM" + b"\xff" * 300),
        encoded(image(ramp(), Modality="CT"), uid.DeflatedExplicitVRLittleEndian),
        encoded(image(ramp(), Modality="CT"))[:300],
    ],
    ids=["empty", "PNG", "nothing", "noise", "deflated", "cut"],
)
def test_file_that_cannot_be_read_has_no_warnings(tmp_path: Path, data: bytes) -> None:
    found = read_dicom_header(write(tmp_path, data), ["PatientID"])
    assert found.warnings == [] and list(found.tags) == ["PatientID"]


def test_path_without_a_file_has_no_warnings(tmp_path: Path) -> None:
    assert read_dicom_header(tmp_path / "none.dcm", ["PatientID"]) == ([], {"PatientID": ""})
    assert read_dicom_header(tmp_path) == ([], {})


def test_header_of_too_many_elements_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom, "_MAX_READS", 2_000)
    data = encoded(image(ramp(), Modality="CT"))
    place = data.index(struct.pack("<HH", 0x7FE0, 0x0010))
    extra = struct.pack("<HH2sH", 0x0009, 0x1001, b"LO", 0) * 2_500
    assert read_dicom_header(write(tmp_path, data[:place] + extra + data[place:])) == ([], {})


def test_keywords_are_checked() -> None:
    check_keywords([])
    check_keywords(["PatientID", "StudyDate", "TransferSyntaxUID", "WindowCenter"])
    with pytest.raises(ConfigError, match=r"'PatientId' is no .* Did you mean 'PatientID'\?"):
        check_keywords(["StudyDate", "PatientId"])
    for keyword in ("PixelData", "ViewCodeSequence"):
        with pytest.raises(ConfigError, match=f"{keyword} holds no text"):
            check_keywords([keyword])
