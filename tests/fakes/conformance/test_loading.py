"""DataLoader: combined batches, asynchronous loading, distributed processes."""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, Tuple

import pytest
import torch

from .models import make_options


def numbers(size: int) -> torch.utils.data.Dataset:
    return torch.utils.data.TensorDataset(torch.arange(float(size)), torch.arange(size))


def batches(poptorch: Any, dataset: Any, options: Any = None, **keywords: Any) -> List[List[int]]:
    options = make_options(poptorch, 2, 3) if options is None else options
    loader = poptorch.DataLoader(options, dataset, batch_size=2, **keywords)
    try:
        result = [batch[1].tolist() for batch in loader]
        assert len(loader) == len(result)
        return result
    finally:
        loader.terminate()


@pytest.mark.parametrize("workers", [0, 1])
def test_combined_batches(both: Tuple[Any, Any], workers: int) -> None:
    poptorch, _ = both
    loader = poptorch.DataLoader(make_options(poptorch, 2, 3), numbers(30), batch_size=2)
    assert loader.combinedBatchSize == 12 and len(loader) == 2
    assert batches(poptorch, numbers(30), num_workers=workers) == [
        list(range(12)),
        list(range(12, 24)),
    ]
    short = batches(poptorch, numbers(30), num_workers=workers, drop_last=False)
    assert short[-1] == list(range(24, 30))


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("mode", ["Async", "AsyncRebatched"])
def test_asynchronous_batches(fake: Tuple[Any, Any], mode: str, drop_last: bool) -> None:
    poptorch, _ = fake
    keywords: Dict[str, Any] = {"mode": poptorch.DataLoaderMode[mode], "drop_last": drop_last}
    if mode == "AsyncRebatched":
        keywords["rebatched_worker_size"] = 5
    given = batches(poptorch, numbers(30), **keywords)
    assert given == batches(poptorch, numbers(30), drop_last=drop_last)


def test_asynchronous_buffers_are_reused(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    loader = poptorch.DataLoader(
        make_options(poptorch), numbers(36), batch_size=2, mode=poptorch.DataLoaderMode.Async
    )
    for _ in range(2):
        iterator = iter(loader)
        first = next(iterator)
        assert isinstance(first, list) and first[1].tolist() == list(range(6))
        next(iterator)
        # Released by the second call, and filled with batch four: the ring has three buffers.
        assert first[1].tolist() == list(range(18, 24))
        # A loop over the iterator would start again.
        assert [next(iterator)[1].tolist()[0] for _ in range(4)] == [12, 18, 24, 30]
        with pytest.raises(StopIteration):
            next(iterator)
    assert next(iter(loader))[1].tolist() == list(range(6))
    assert next(iter(loader))[1].tolist() == list(range(6))
    loader.terminate()
    with pytest.raises(AssertionError):
        iter(loader)


class Named(torch.utils.data.Dataset):
    def __init__(self, value: Any) -> None:
        self.value = value

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return {"number": torch.tensor(index), "other": self.value}


def test_asynchronous_data_must_be_flat(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    keywords = {"batch_size": 2, "mode": poptorch.DataLoaderMode.Async}
    options = make_options(poptorch)
    loader = poptorch.DataLoader(options, Named(torch.ones(2)), **keywords)
    assert {key: tuple(tensor.shape) for key, tensor in next(iter(loader)).items()} == {
        "number": (6,),
        "other": (6, 2),
    }
    with pytest.raises(poptorch.Error, match="failed to start"):
        poptorch.DataLoader(options, Named([torch.ones(2)]), **keywords)
    with pytest.raises(Exception, match="pickle"):
        poptorch.DataLoader(options, Named(lambda: None), **keywords)


def test_asynchronous_loading_uses_its_own_random_generator(fake: Tuple[Any, Any]) -> None:
    poptorch, _ = fake
    mode, strategies = poptorch.DataLoaderMode.Async, poptorch.SharingStrategy

    def order(strategy: Any) -> List[List[int]]:
        torch.manual_seed(0)
        options = {"sharing_strategy": strategy}
        return batches(poptorch, numbers(60), shuffle=True, mode=mode, async_options=options)

    assert order(strategies.Fork) == order(strategies.Fork)
    assert order(strategies.ForkServer) != order(strategies.ForkServer)


class TwoByTwo:
    """Yields pairs of indices, last to first."""

    batch_size = 2

    def __iter__(self) -> Iterator[List[int]]:
        return iter([[number, number - 1] for number in range(29, 0, -2)])

    def __len__(self) -> int:
        return 15


@pytest.mark.parametrize("mode", ["Sync", "Async"])
def test_custom_batch_sampler(fake: Tuple[Any, Any], mode: str) -> None:
    poptorch, _ = fake
    options = make_options(poptorch, 2, 3)
    loader = poptorch.DataLoader(
        options, numbers(30), batch_sampler=TwoByTwo(), mode=poptorch.DataLoaderMode[mode]
    )
    expected = [list(range(29, 17, -1)), list(range(17, 5, -1))]
    assert [batch[1].tolist() for batch in loader] == expected
    with pytest.raises(poptorch.Error, match="mutually exclusive"):
        poptorch.DataLoader(options, numbers(30), batch_size=2, batch_sampler=TwoByTwo())


def test_processes_share_a_dataset(both: Tuple[Any, Any]) -> None:
    poptorch, _ = both

    def share(process: int, shuffle: bool) -> List[int]:
        options = make_options(poptorch).randomSeed(4)
        options.Distributed.configureProcessId(process, 2)
        given = batches(poptorch, numbers(25), options, shuffle=shuffle)
        return [number for batch in given for number in batch]

    assert share(0, False) + share(1, False) == list(range(24))
    parts = share(0, True), share(1, True)
    assert len(set(parts[0]) | set(parts[1])) == 24
    unseeded = make_options(poptorch)
    unseeded.Distributed.configureProcessId(0, 2)
    with pytest.raises(AssertionError, match="randomSeed"):
        poptorch.DataLoader(unseeded, numbers(24), shuffle=True)
