"""Folders and CSVs as users have them: other extensions, blanks, paths, unreadable boxes."""

from __future__ import annotations

import csv
import logging
import re
import shutil
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL
from cxr_vit.config import load_config
from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.schema import Config
from cxr_vit.data.datamodule import ChestXrayDataModule, prepare, verify_cache
from cxr_vit.data.image_source import cache_paths, open_image_source, verify
from cxr_vit.data.images import find_images, read_gray
from cxr_vit.dataset_report.report import write_data_report
from cxr_vit.errors import DataError
from cxr_vit.model.module import ViTModule
from cxr_vit.training.trainer import Trainer

CSV = "Data_Entry_2017_v2020.csv"


def images_in(root: Path) -> List[Path]:
    return sorted(root.rglob("*.png"))


def edit(path: Path, change: Callable[[str], str]) -> None:
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")


def as_jpeg(root: Path) -> None:
    for path in images_in(root):
        with Image.open(path) as image:
            image.convert("L").save(path.with_suffix(".jpg"), quality=95)
        path.unlink()


def as_upper_case(root: Path) -> None:
    for path in images_in(root):
        path.rename(path.with_suffix(".PNG"))


def with_blanks_at_the_end(root: Path) -> None:
    edit(root / CSV, lambda text: text.replace(".png,", ".png ,"))


def with_spaces(root: Path) -> None:
    """Name images as browsers name second downloads: `00000003 (001).png`."""

    def spaced(text: str) -> str:
        return re.sub(r"(\d{8})_(\d{3})", r"\1 (\2)", text)

    for path in images_in(root):
        path.rename(path.with_name(spaced(path.name)))
    for file in (root / CSV, *root.glob("*_list.txt"), root / "BBox_List_2017.csv"):
        edit(file, spaced)


def with_columns_in_the_lists(root: Path) -> None:
    for path in root.glob("*_list.txt"):
        lines = path.read_text().splitlines()
        path.write_text("\r\n".join(f"images_001/{line} 0 1 0" for line in lines))


KINDS: Dict[str, Callable[[Path], None]] = {
    "jpg": as_jpeg,
    "upper case": as_upper_case,
    "blanks": with_blanks_at_the_end,
    "spaces": with_spaces,
    "columns": with_columns_in_the_lists,
}


def copy_of(sample_root: Path, folder: Path) -> Path:
    root = folder / "nih"
    shutil.copytree(sample_root, root, ignore=shutil.ignore_patterns("cxr_vit_cache"))
    return root


def section(root: Path, **changes: object) -> DataSection:
    return DataSection(root=str(root), image_size=16, val_fraction=0.2, **changes)


def sizes(module: ChestXrayDataModule) -> List[int]:
    return [len(rows) for rows in module.splits[:3]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_reads_the_images(
    sample_root: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cxr_vit")
    root = copy_of(sample_root, tmp_path)
    before = ChestXrayDataModule(Config(data=section(root, cache="off")))
    expected = sizes(before)
    KINDS[kind](root)
    caplog.clear()
    assert prepare(section(root)).startswith("80 of 80 images of ")
    other = "80 images have another extension than their names, e.g. "
    assert caplog.text.count(other) == (kind in ("jpg", "upper case"))
    assert "80 images equal their files" in verify_cache(section(root))
    module = ChestXrayDataModule(Config(data=section(root, cache="require")))
    assert sizes(module) == expected and module.splits.kind == "official"
    assert len(module.records.boxes) == len(before.records.boxes)
    files = {path.stem: path for path in (root / "images").rglob("*.*")}
    test = module.dataset("test")
    for row, name in enumerate(test.image_names):
        np.testing.assert_array_equal(
            test.read_images([row])[0], read_gray(files[name.rpartition(".")[0]], 16)
        )


def test_a_folder_of_jpegs_is_trained(sample_root: Path, tmp_path: Path) -> None:
    root = copy_of(sample_root, tmp_path)
    as_jpeg(root)
    overrides = [*SMALL, f"data.root={root}", f"run.dir={tmp_path / 'run'}", "train.steps=2"]
    config = load_config([], overrides)
    data = ChestXrayDataModule(config)
    trainer = Trainer(config)
    trainer.fit(ViTModule(config, data), data)
    assert trainer.global_step == 2
    image = next(root.rglob("*.jpg"))
    assert trainer.predict(trainer.module, [image]).shape == (1, 14)


# Names that are paths, as tables have them


@pytest.fixture
def paths_of_a_table(tmp_path: Path) -> List[str]:
    """Write one image per path; names repeat in the folders of patients."""
    names = [
        f'data/patient {patient}/r\u00f6ntgen "{study}", left/view.png'
        for patient in range(20)
        for study in range(2)
    ]
    for number, name in enumerate(names):
        path = tmp_path / "root" / name.partition("/")[2]
        path.parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (16, 16), np.uint8)).save(
            path
        )
    return names


def test_the_cache_holds_images_by_path(paths_of_a_table: List[str], tmp_path: Path) -> None:
    names, data = paths_of_a_table, section(tmp_path / "root")
    files = find_images(tmp_path / "root", names)
    built = open_image_source(data, names)
    for source in (built, open_image_source(data, names), open_image_source(data, names[3:9])):
        assert (source.missing, source.bad) == ([], {})
    out = np.empty((1, 16, 16), np.uint8)
    for name in names:
        built.reader.select([name]).read(np.zeros(1, np.int64), out)
        np.testing.assert_array_equal(out[0], read_gray(files[name], 16))
    assert verify(data, names) == ({}, 40, 0)
    Path(files[names[7]]).write_bytes(b"")
    with pytest.raises(DataError, match="1 images were changed since, first: data/patient 3/r"):
        open_image_source(data, names)
    assert open_image_source(data, names, renew=True).bad == {
        names[7]: "the file is empty. Fetch it again."
    }
    assert list(open_image_source(data, names).bad) == [names[7]]


def test_an_interrupted_cache_of_paths_is_resumed(
    paths_of_a_table: List[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cxr_vit")
    data = section(tmp_path / "root")
    where = cache_paths(data)
    open_image_source(data, paths_of_a_table)
    index, pixels = where.index.read_bytes(), where.pixels.read_bytes()
    journal: List[bytes] = []
    where.index.unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", keep_journal(journal, where.journal))
        open_image_source(data, paths_of_a_table)
    where.index.unlink()
    where.journal.write_bytes(journal[0])
    open_image_source(data, paths_of_a_table)
    assert "resuming an interrupted cache: 40 of 40 images" in caplog.text
    assert (where.index.read_bytes(), where.pixels.read_bytes()) == (index, pixels)


def keep_journal(kept: List[bytes], journal: Path) -> Callable[..., None]:
    unlink = Path.unlink

    def remove(path: Path, missing_ok: bool = False) -> None:
        if path == journal and path.exists():
            kept.append(path.read_bytes())
        unlink(path, missing_ok=missing_ok)

    return remove


# Boxes and relabels that training does not need


@pytest.mark.parametrize(
    ("key", "file"),
    [("boxes", "BBox_List_2017.csv"), ("relabels", "google2019_nih-chest-xray-labels.csv")],
)
@pytest.mark.parametrize(
    "content",
    [b"Image Index|Finding\nx|y\n", b"\xff\xfe", b"", b"Image Index,Finding Label\na.png,Mass\n"],
    ids=["other", "UTF-16", "empty", "columns"],
)
def test_unreadable_annotations_in_the_root_are_left_out_with_a_warning(
    sample_root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    key: str,
    file: str,
    content: bytes,
) -> None:
    root = copy_of(sample_root, tmp_path)
    (root / file).write_bytes(content)
    module = ChestXrayDataModule(Config(data=section(root)))
    annotations = getattr(module.records, key)
    assert annotations.empty if key == "boxes" else np.isnan(annotations).all()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert file in warning and f"data.{key}=none" in warning
    with pytest.raises(DataError, match=file):
        ChestXrayDataModule(Config(data=section(root, **{key: str(root / file)}))).setup()
    caplog.clear()
    ChestXrayDataModule(Config(data=section(root, **{key: "none"}))).setup()
    assert caplog.records == []


# Images of one gray value


def blacken(root: Path, count: int) -> List[str]:
    paths = images_in(root)[:count]
    for path in paths:
        Image.new("L", (32, 32)).save(path)
    Image.new("L", (32, 32), 77).save(images_in(root)[count])
    return [path.name for path in images_in(root)[: count + 1]]


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_black_images_are_counted_and_named(
    sample_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, cache: str
) -> None:
    root = copy_of(sample_root, tmp_path)
    names = blacken(root, 12)
    module = ChestXrayDataModule(Config(data=section(root, cache=cache)))
    module.setup()
    first = f"13 images are of one gray value, as black ones are, first: {names[0]}"
    assert caplog.text.count(first) == 1
    assert sorted(module.plain_images()) == names
    text = write_data_report(module, tmp_path / "report.html")
    for shown in (text, (tmp_path / "report.html").read_text(encoding="utf-8")):
        assert "Images whose pixels are all equal, as those of a black image: 13." in shown
        assert module.plain_images()[0] in shown
    caplog.clear()
    ChestXrayDataModule(Config(data=section(root, cache="auto"))).setup()
    assert ("gray value" in caplog.text) == (cache == "off")  # then a cache is built now


def test_an_image_of_the_checksum_of_a_black_one_is_read_before_it_is_counted(
    sample_root: Path, tmp_path: Path
) -> None:
    root = copy_of(sample_root, tmp_path)
    source = open_image_source(section(root), [path.name for path in images_in(root)])
    name = images_in(root)[0].name
    module = ChestXrayDataModule(Config(data=section(root)))
    module._content = module.content._replace(source=source._replace(plain=[name]))
    assert module.plain_images() == []


# Filters


@pytest.mark.parametrize("resample", ["bilinear", "bicubic", "lanczos"])
def test_images_are_resized_by_the_filter(sample_root: Path, tmp_path: Path, resample: str) -> None:
    root = copy_of(sample_root, tmp_path)
    path = images_in(root)[0]
    with Image.open(path) as image:
        resized = image.convert("L").resize((16, 16), Image.Resampling[resample.upper()])
    expected = np.asarray(resized)
    names = [path.name]
    out = np.empty((1, 16, 16), np.uint8)
    for cache in ("off", "auto", "require"):
        source = open_image_source(section(root, resample=resample, cache=cache), names)
        source.reader.select(names).read(np.zeros(1, np.int64), out)
        np.testing.assert_array_equal(out[0], expected)


def test_a_cache_of_another_filter_is_refused(sample_root: Path, tmp_path: Path) -> None:
    root = copy_of(sample_root, tmp_path)
    prepare(section(root))
    other = section(root, resample="bicubic")
    message = r"built with resize=bilinear, antialiased \(Pillow\), and bicubic, antialiased"
    with pytest.raises(DataError, match=message):
        ChestXrayDataModule(Config(data=other)).setup()
    prepare(other)
    assert "80 images equal their files" in verify_cache(other)
    with pytest.raises(DataError, match="built with resize=bicubic"):
        ChestXrayDataModule(Config(data=section(root))).setup()


def test_skipped_images_are_listed_with_their_paths(sample_root: Path, tmp_path: Path) -> None:
    root = copy_of(sample_root, tmp_path)
    with_spaces(root)
    gone = images_in(root)[0]
    gone.unlink()
    prepare(section(root, on_missing="skip"))
    with (root / "cxr_vit_cache" / "skipped.csv").open(newline="", encoding="utf-8") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [gone.name]
