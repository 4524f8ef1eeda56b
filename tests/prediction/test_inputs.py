"""Which files a command line names: NIH's layout, lists with names, and what cannot be found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cxr_vit.data.synthetic.dataset import write_sample
from cxr_vit.errors import DataError
from cxr_vit.prediction.inputs import find_inputs


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """NIH's layout: the table above the folder of the images."""
    root = tmp_path_factory.mktemp("data") / "sample"
    write_sample(root, num_images=40, image_size=32, seed=0)
    return root


def test_lists_of_nih_name_the_images_below_their_folder(sample: Path) -> None:
    images = sorted(map(str, (sample / "images").iterdir()))
    assert sorted(find_inputs([sample / "Data_Entry_2017_v2020.csv"])) == images
    of_test = find_inputs([sample / "test_list.txt"])
    assert 0 < len(of_test) < len(images) and set(of_test) <= set(images)


def test_names_may_have_no_extension_folders_or_no_file(sample: Path) -> None:
    table = sample / "other.csv"
    table.write_text("dicom_id\n00000001_000\nimages/00000001_001.png\nabsent\n/absent.png\n")
    found = [str(sample / "images" / name) for name in ("00000001_000.png", "00000001_001.png")]
    assert find_inputs([table]) == [*found, str(sample / "absent"), "/absent.png"]


def test_list_of_which_nothing_is_there_is_refused(sample: Path, tmp_path: Path) -> None:
    table = tmp_path / "predictions.csv"
    table.write_bytes((sample / "Data_Entry_2017_v2020.csv").read_bytes())
    with pytest.raises(DataError, match="none of the 40 images that it lists") as refused:
        find_inputs([table])
    assert f"searched in {tmp_path} and" in str(refused.value)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").touch()
    (tmp_path / "list.txt").write_text("1.png\n")
    with pytest.raises(DataError, match=r"twice.*Give paths in the list"):
        find_inputs([tmp_path / "list.txt"])


def test_files_of_other_kinds_are_counted(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO", logger="cxr_vit")
    for name in ("1.png", "notes.txt", "list.csv", ".hidden"):
        (tmp_path / name).touch()
    assert find_inputs([tmp_path]) == [str(tmp_path / "1.png")]
    assert f"{tmp_path}: 2 files of other kinds left out" in caplog.messages


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 300, "File name too long"), ("file/x", "no such file or folder")]
)
def test_path_that_cannot_be_looked_at_is_said(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=reason):
        find_inputs([tmp_path / name])
