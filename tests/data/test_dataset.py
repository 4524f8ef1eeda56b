"""ChestXrayDataset, alone and in torch's DataLoader."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import List

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.dataset import Batch, ChestXrayDataset, collate, dataset_of_files
from cxr_vit.data.images import FileReader
from cxr_vit.data.records import Records
from cxr_vit.data.sampler import PADDING, EvaluationSampler, ReplicaSampler, TrainingSampler
from cxr_vit.data.views import VIEWS
from cxr_vit.errors import DataError

SIDE = 16
IMAGES = 7


def pixels(row: int) -> np.ndarray:
    return np.random.default_rng(row).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


@pytest.fixture
def dataset(tmp_path: Path) -> ChestXrayDataset:
    names = [f"{row:08d}_000.png" for row in range(IMAGES)]
    for row, name in enumerate(names):
        Image.fromarray(pixels(row)).save(tmp_path / name)
    paths = {name: str(tmp_path / name) for name in names}
    table = pd.DataFrame({"image": names})
    labels = np.eye(IMAGES, 14, dtype=np.uint8)
    labels[3] = 0
    reader = FileReader(paths, names, image_size=SIDE, max_megapixels=1)
    return ChestXrayDataset(Records(table, labels), reader)


def load(dataset: ChestXrayDataset, sampler: object, num_workers: int) -> List[Batch]:
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=num_workers)
    return list(loader)


def assert_equal_batches(one: List[Batch], two: List[Batch]) -> None:
    assert len(one) == len(two)
    for left, right in zip(one, two):
        assert isinstance(right, Batch)
        for first, second in zip(left, right):
            assert first.dtype == second.dtype
            assert torch.equal(first, second)


def test_an_image_is_uint8_of_one_channel(dataset: ChestXrayDataset) -> None:
    image = dataset[2].image
    assert image.dtype == torch.uint8 and image.shape == (1, SIDE, SIDE)
    np.testing.assert_array_equal(image[0].numpy(), pixels(2))


def test_labels_are_float32_zeros_and_ones(dataset: ChestXrayDataset) -> None:
    labels = dataset[2].labels
    assert labels.dtype == torch.float32
    assert labels.tolist() == [0.0, 0.0, 1.0] + [0.0] * 11
    assert dataset[3].labels.tolist() == [0.0] * 14


def test_a_sample_knows_its_row(dataset: ChestXrayDataset) -> None:
    assert [dataset[row].row for row in range(IMAGES)] == list(range(IMAGES))


def test_length_names_and_classes_match_the_records(dataset: ChestXrayDataset) -> None:
    assert len(dataset) == IMAGES
    assert dataset.image_names == [f"{row:08d}_000.png" for row in range(IMAGES)]
    assert dataset.num_classes == 14


def test_a_batch_equals_its_single_rows(dataset: ChestXrayDataset) -> None:
    batch = dataset.__getitems__([4, 0, 4])
    assert batch.indices.tolist() == [4, 0, 4]
    for image, labels, row in zip(batch.images, batch.labels, [4, 0, 4]):
        assert torch.equal(image, dataset[row].image)
        assert torch.equal(labels, dataset[row].labels)


def test_a_draw_of_a_later_epoch_is_the_same_row(dataset: ChestXrayDataset) -> None:
    batch = dataset.__getitems__([4, 4 + IMAGES, 4 + 5 * IMAGES])
    assert batch.indices.tolist() == [4, 4, 4]
    assert torch.equal(batch.images[0], batch.images[2])


def test_read_images_returns_stored_pixels(dataset: ChestXrayDataset) -> None:
    np.testing.assert_array_equal(dataset.read_images([5, 1]), np.stack([pixels(5), pixels(1)]))


def test_a_vanished_image_is_named(dataset: ChestXrayDataset, tmp_path: Path) -> None:
    (tmp_path / "00000005_000.png").unlink()
    with pytest.raises(DataError, match=r"00000005_000\.png"):
        dataset[5]


def test_a_dataset_can_be_pickled(dataset: ChestXrayDataset) -> None:
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy.image_names == dataset.image_names
    assert_equal_batches([copy.__getitems__(range(IMAGES))], [dataset.__getitems__(range(IMAGES))])


def test_a_batch_is_in_the_given_order(dataset: ChestXrayDataset) -> None:
    batch = dataset.__getitems__([5, 1, 2])
    assert batch.images.shape == (3, 1, SIDE, SIDE) and batch.images.dtype == torch.uint8
    assert batch.labels.shape == (3, 14) and batch.labels.dtype == torch.float32
    assert batch.indices.tolist() == [5, 1, 2] and batch.indices.dtype == torch.int64
    assert torch.equal(batch.images[1], dataset[1].image)
    assert torch.equal(batch.labels[2], dataset[2].labels)


def test_padding_draws_are_black_images_of_index_minus_one(dataset: ChestXrayDataset) -> None:
    batch = dataset.__getitems__([4, 6, PADDING, PADDING, PADDING])
    assert batch.indices.tolist() == [4, 6, -1, -1, -1]
    assert batch.images.shape == (5, 1, SIDE, SIDE) and batch.labels.shape == (5, 14)
    assert not batch.images[2:].any() and not batch.labels[2:].any()
    assert torch.equal(batch.images[1], dataset[6].image)
    assert [part.dtype for part in batch] == [torch.uint8, torch.float32, torch.int64]


def test_a_batch_may_be_all_padding(dataset: ChestXrayDataset) -> None:
    batch = dataset.__getitems__([PADDING, PADDING])
    assert batch.indices.tolist() == [-1, -1]
    assert batch.images.shape == (2, 1, SIDE, SIDE) and not batch.images.any()


def test_padding_before_an_image_is_refused(dataset: ChestXrayDataset) -> None:
    with pytest.raises(AssertionError, match="padding must end the batch"):
        dataset.__getitems__([4, PADDING, 6])


def test_without_images_keeps_labels_and_rows_and_reads_nothing(
    dataset: ChestXrayDataset, tmp_path: Path
) -> None:
    draws = [5, 1, IMAGES + 2, PADDING]
    expected = dataset.__getitems__(draws)
    empty = dataset.without_images()
    for image in tmp_path.glob("*.png"):
        image.unlink()
    batch = empty.__getitems__(draws)
    assert batch.images.shape == (4, 1, 0, 0) and batch.images.dtype == torch.uint8
    assert torch.equal(batch.labels, expected.labels)
    assert torch.equal(batch.indices, expected.indices)
    assert len(empty) == len(dataset) and empty.image_names == dataset.image_names


def test_file_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    Image.fromarray(pixels(0)).save(path)
    images = dataset_of_files([path], num_classes=2, data=DataSection(image_size=SIDE))
    assert images[0].image[0].tolist() == pixels(0).tolist()
    assert images.image_names == [str(path)]


def test_views_equal_torchvisions(dataset: ChestXrayDataset) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    whole = torch.from_numpy(dataset.read_images(range(IMAGES))).unsqueeze(1)
    part = dataset.seen_from(VIEWS["center"][0])
    part.image_size = SIDE - 6
    views = [part.seen_from(view).__getitems__(range(IMAGES)) for view in VIEWS["ten_crop"]]
    for view, expected in zip(views, functional.ten_crop(whole, [SIDE - 6, SIDE - 6])):
        assert torch.equal(view.images, expected)
        assert torch.equal(view.indices, torch.arange(IMAGES))
    assert torch.equal(part[2].image, functional.center_crop(whole[2], [SIDE - 6, SIDE - 6]))
    mirrored = dataset.seen_from(VIEWS["flip"][1])
    assert torch.equal(mirrored.__getitems__([3]).images, whole[[3]].flip(-1))


def test_a_batch_of_zeros_is_all_padding() -> None:
    batch = Batch.zeros(2, image_size=8, num_classes=15)
    assert batch.images.shape == (2, 1, 8, 8) and batch.labels.shape == (2, 15)
    assert [part.dtype for part in batch] == [torch.uint8, torch.float32, torch.int64]
    assert batch.indices.tolist() == [-1, -1]


def test_the_loader_yields_every_image_once_and_pads_the_last_batch(
    dataset: ChestXrayDataset,
) -> None:
    sampler = ReplicaSampler(
        EvaluationSampler(IMAGES, batch_size=3),
        host_batch_size=3,
        micro_batch_size=3,
        replicas=1,
        own=range(1),
    )
    batches = load(dataset, sampler, num_workers=0)
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert indices == [0, 1, 2, 3, 4, 5, 6, -1, -1]
    assert {len(batch.images) for batch in batches} == {3}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
def test_two_loader_processes_yield_the_same_batches_as_none(dataset: ChestXrayDataset) -> None:
    sampler = TrainingSampler(
        IMAGES, global_batch_size=3, device_iterations=1, seed=3, start_step=0, total_steps=5
    )
    without, with_processes = (load(dataset, sampler, num_workers) for num_workers in (0, 2))
    assert_equal_batches(without, with_processes)
    expected = torch.cat([torch.tensor(draws) for draws in sampler]) % IMAGES
    assert torch.equal(torch.cat([batch.indices for batch in with_processes]), expected)
