"""Which file is found for a name or path of a table, and which row for a line of a list."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Dict, List, Optional

import pytest

from cxr_vit.data.images import find_images
from cxr_vit.data.names import NameIndex, stem
from cxr_vit.errors import DataError

CHEXPERT = [
    f"CheXpert-v1.0-small/train/patient{patient:05d}/study{study}/view1_frontal.jpg"
    for patient in (1, 2, 3)
    for study in (1, 2)
]


def touch(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()
    return root


def found(root: Path, *wanted: str) -> Dict[str, str]:
    """Return the found files by text, relative to the root."""
    return {
        text: Path(path).relative_to(root).as_posix()
        for text, path in find_images(root, wanted).items()
    }


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("a.png", "images/a.jpg"),
        ("a.png", "images/a.PNG"),
        ("a.jpg", "a.JPEG"),
        ("a", "deep/er/a.dicom"),
        ("a", "a"),
        ("a.dcm", "a.png"),
        ("a.tif", "a.png"),
        ("1.2.840.10008.5", "1.2.840.10008.5.dcm"),
        ("1.2.840.10008.5", "1.2.840.10008.5"),
        ("00000003 (001).png", "images/00000003 (001).jpg"),
        ('r\u00f6ntgen, "1".png', 'images/r\u00f6ntgen, "1".png'),
        ("files/p10/s5/a.jpg", "files/p10/s5/a.jpg"),
        ("files/p10/s5/a.dcm", "other/a.png"),
        ("/data/of/another/machine/a.jpg", "a.jpg"),
        ("D:\\NIH images\\a.png", "images/a.PNG"),
        ("../../a.png", "a.png"),
    ],
)
def test_a_file_is_found_by_name_or_stem(tmp_path: Path, wanted: str, file: str) -> None:
    assert found(touch(tmp_path, file, "b.png", "c.txt"), wanted, "b.png") == {
        wanted: file,
        "b.png": "b.png",
    }


@pytest.mark.parametrize(
    ("wanted", "file"),
    [
        ("a.png", "A.png"),  # another image on most systems
        ("a", "a.txt"),
        ("a.png", "a.png.jpg"),
        ("1.2.840.10008.5", "1.2.840.10008.dcm"),
        ("a.png", "._a.png"),
    ],
)
def test_another_name_is_not_the_image(tmp_path: Path, wanted: str, file: str) -> None:
    assert found(touch(tmp_path, file), wanted) == {}


@pytest.mark.parametrize("wanted", ["{}/out.png", "../out.png", "root/../../out.png"])
def test_no_text_leads_out_of_the_folder(tmp_path: Path, wanted: str) -> None:
    touch(tmp_path, "out.png", "root/in.png")
    text = wanted.format(tmp_path)
    assert find_images(tmp_path / "root", [text]) == {}


def test_the_very_name_comes_before_another_extension(tmp_path: Path) -> None:
    root = touch(tmp_path, "images/a.png", "images/a.jpg", "more/a.PNG")
    assert found(root, "a.png") == {"a.png": "images/a.png"}
    assert found(root, "a.png", "a.jpg", "x/b.png") == {
        "a.png": "images/a.png",
        "a.jpg": "images/a.jpg",
    }


@pytest.mark.parametrize("other", ["a.jpg", "more/a.jpg", "a.PNG"])
def test_two_files_that_fit_alike_are_refused(tmp_path: Path, other: str) -> None:
    root = touch(tmp_path, "a.jpeg", other)
    with pytest.raises(DataError, match=r"1 images are under .* twice, e\.g\. .*a\.\w+ and") as got:
        find_images(root, ["a.png"])
    assert "keep one file of each image" in str(got.value)


def test_folders_tell_files_of_one_name_apart(tmp_path: Path) -> None:
    root = touch(tmp_path, *(text.partition("/")[2] for text in CHEXPERT), "valid/b.jpg")
    assert found(root, *CHEXPERT) == {text: text.partition("/")[2] for text in CHEXPERT}
    png = {text.replace(".jpg", ".png"): text.partition("/")[2] for text in CHEXPERT}
    assert found(root, *png) == png


def test_a_missing_file_is_not_that_of_another_patient(tmp_path: Path) -> None:
    root = touch(tmp_path, *(text.partition("/")[2] for text in CHEXPERT[:3]))
    assert set(found(root, *CHEXPERT)) == set(CHEXPERT[:3])


TABLE = [f"{number:04d}.png" for number in range(6)]


@pytest.mark.parametrize(
    ("here", "there", "expected"),
    [
        ("test", "train", 3),
        ("/data/test", "deep/train", 3),
        ("test/images", "train/images", 3),
        ("a/test", "train", 3),
        ("images", None, 6),
        ("x/images", None, 6),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ""])
def test_a_missing_file_is_not_one_of_the_same_name_in_another_folder(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    here: str,
    there: Optional[str],
    expected: int,
    suffix: str,
) -> None:
    present = TABLE[: 3 if there else 0]
    root = touch(tmp_path, *(f"{here.strip('/')}/{stem(name)}{suffix}" for name in present))
    touch(root, *(f"{there or 'flat'}/{name}" for name in TABLE))
    texts = [f"{here}/{name if suffix else stem(name)}" for name in TABLE]
    assert set(found(root, *texts)) == set(texts[:expected])
    message = f"6 images are in other folders than their paths, found by name, e.g. {root}/flat/"
    assert [text[: len(message)] for text in caplog.messages] == ([] if there else [message])


def test_the_longest_agreement_of_folders_counts(tmp_path: Path) -> None:
    root = touch(tmp_path, "small/p1/a.png", "large/p1/a.png", "large/p2/a.jpg")
    assert found(root, "x/large/p1/a.png") == {"x/large/p1/a.png": "large/p1/a.png"}
    assert found(root, "p2/a.png") == {"p2/a.png": "large/p2/a.jpg"}
    with pytest.raises(DataError, match="twice"):
        find_images(root, ["p1/a.png"])


def test_a_file_belongs_to_one_text(tmp_path: Path) -> None:
    root = touch(tmp_path, "a.png")
    assert found(root, "a.png", "a.jpg") == {"a.png": "a.png"}
    assert found(root, "x/a.png", "x/a.jpg") == {"x/a.png": "a.png"}
    with pytest.raises(DataError, match=r"1 files are of two images each, e\.g\. .*a\.png of 'a\."):
        find_images(root, ["a.dcm", "a.jpg"])


def test_other_extensions_are_counted_once_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cxr_vit")
    root = touch(tmp_path, "a.jpg", "b.png", "c.PNG", "d.png")
    find_images(root, ["b.png", "d.png"])
    assert caplog.messages == []
    find_images(root, ["a.png", "b.png", "c.png", "d.png"])
    (message,) = caplog.messages
    assert message.startswith("2 images have another extension than their names, e.g. ")
    caplog.clear()
    find_images(root, ["there/b.png", "d.png"])
    (message,) = caplog.messages
    assert message == (
        "1 images are in other folders than their paths, found by name, e.g."
        f" {root / 'b.png'} for 'there/b.png'"
    )


def test_paths_that_differ_deep_down_are_told_apart_by_the_folders(tmp_path: Path) -> None:
    texts = [f"{top}/{'x/' * 20}a.png" for top in "12"]
    assert found(touch(tmp_path, *texts), *texts) == {text: text for text in texts}
    assert [NameIndex(texts).matching(text) for text in texts] == [[text] for text in texts]


@pytest.mark.parametrize(
    ("texts", "depth"),
    [
        (["a.png", "b.png"], 1),
        (["a.png", "x/b.png"], 1),
        (CHEXPERT, 3),
        (CHEXPERT[:1], 1),
        (["x/a.png", "/x//a.png", "./x/a.png"], 2),
        (["a.png", "x/a.png"], 2),
        (["1/" * 100 + "a.png", "2/" + "1/" * 100 + "a.png"], 16),
    ],
)
def test_the_depth_is_what_keeps_the_texts_apart(texts: List[str], depth: int) -> None:
    assert NameIndex(texts).depth == depth


def test_many_paths_that_no_folder_near_the_file_tells_apart_are_refused() -> None:
    texts = [f"{number}/{'x/' * 20}a.png" for number in range(101)]
    assert NameIndex(texts[1:]).depth == 16
    with pytest.raises(DataError, match=r"^more than 100 names of images agree in their last 16"):
        NameIndex(texts)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (CHEXPERT[1], CHEXPERT[1]),
        ("patient00001/study2/view1_frontal", CHEXPERT[1]),
        ("C:\\patient00001\\study2\\view1_frontal.png", CHEXPERT[1]),
        ("study2/view1_frontal.jpg", None),
        ("patient00009/study2/view1_frontal.jpg", None),
    ],
)
def test_a_path_matches_the_text_of_its_image(path: str, text: Optional[str]) -> None:
    assert NameIndex(CHEXPERT).matching(path) == ([text] if text else [])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.png", "a"), ("a.b.JPG", "a.b"), (".png", ".png"), ("a.", "a."), ("a.v2", "a.v2")],
)
def test_the_stem_leaves_out_an_extension_of_images(name: str, expected: str) -> None:
    assert stem(name) == expected
