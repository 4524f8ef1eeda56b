"""Train several configurations one after another and save all results.

forking.py PROCESSES tests/engines/processes/worker.py CASES FOLDER

CASES is a JSON file: name -> overrides of configs/vit_demo.yaml and the initial loss scale. Rank r
writes FOLDER/<name>.<r>. The tests call `measure` in their own process for the results of one
process.
"""

from __future__ import annotations

import json
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch
from torch import Tensor

from conftest import engine_of, module_of
from cxr_vit.config import BatchPlan, Config, load_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch, ChestXrayDataset
from cxr_vit.data.sampler import TrainingSampler
from cxr_vit.engines import compiled, torch_engine
from cxr_vit.engines.base import EngineState, StepOutput
from cxr_vit.engines.process_group import coordinator
from cxr_vit.engines.processes import Launch
from cxr_vit.model.module import ViTModule
from cxr_vit.model.schedule import LearningRate

CONFIG = Path(__file__).resolve().parents[3] / "configs" / "vit_demo.yaml"
#: The scale doubles after two updates, so that fp16 overflows soon and repeatedly.
EAGER_SCALER = {
    "growth_factor": 2.0,
    "backoff_factor": 0.5,
    "growth_interval": 2,
    "_growth_tracker": 0,
}
#: Names of the images that this process opened.
opened_images: List[str] = []
#: Classes and functions that this process looked up to read a pickle.
unpickled: List[str] = []


def copies(replicas: int) -> Tuple[str, ...]:
    """Divide an accumulation of 8 over replicas; the global batch stays the same."""
    return f"batch.replicas={replicas}", f"batch.gradient_accumulation={8 // replicas}"


def pipeline(schedule: str, cut: str, replicas: int = 1) -> Tuple[str, ...]:
    """Use the pipeline engine with an accumulation of 8 over all replicas."""
    return (
        "engine.name=pipeline",
        f"pipeline.schedule={schedule}",
        f"pipeline.layers_per_stage={cut}",
        *copies(replicas),
    )


def has_gradient(name: str) -> bool:
    """Whether a weight has a gradient other than rounding errors.

    The bias of a key adds the same value to all scores of a query, which softmax cancels; Adam
    scales the rounding errors up.
    """
    return not name.endswith("attention.key.bias")


def measure(overrides: Sequence[str], scale: float = 1.0) -> Dict[str, Any]:
    """Train as train.py does, then score the test split; return the results of this process."""
    del opened_images[:], unpickled[:]
    launch = Launch.from_environment()
    config, data, module = make(overrides)
    model = module.model
    dataset, batches, outputs = data.dataset("train"), [], []
    rate = LearningRate.from_config(config, config.train.steps)
    start = EngineState(model.weights(), scalars={**EAGER_SCALER, "scale": scale})
    built = [(name, weakref.ref(weight)) for name, weight in model.named_parameters()]
    recomputes = config.pipeline.recompute is not None
    with engine_of(config, module, launch) as engine:
        assert {stage.kept is not None for stage in model._stages} == {recomputes}
        engine.load_state_dict(start)
        engine.compile(_example(dataset, engine.local_batch.host_batch_size))
        step = 0
        for batch in engine.loader(dataset, _order(config, dataset), training=True):
            output: StepOutput = engine.train_step(batch, lr=rate.at(step))
            batches.append(batch)
            outputs.append(output)
            step += len(output.losses)
        images = list(opened_images)
        logits, labels = engine.predict_dataset(data.dataset("test"))
        other, two = engine.predict_dataset(_with_two_labels(data.dataset("val")))
        state = engine.state_dict()
        here = {name for name, weight in model.named_parameters() if not weight.is_meta}
        stateful = {
            name for name, weight in model.named_parameters() if weight in engine.optimizer.state
        }
    return {
        "losses": torch.cat([output.losses for output in outputs]),
        "norms": torch.cat([output.grad_norm for output in outputs]),
        "num_samples": sum(output.num_samples for output in outputs),
        "logits": logits,
        "labels": labels,
        "shapes": [list(other.shape), list(two.shape)],
        "weights": state.weights,
        "optimizer": state.optimizer,
        "scale": state.scalars.get("scale", 1.0),
        "rows": torch.cat([batch.indices for batch in batches]),
        "pixels": sum(batch.images.numel() for batch in batches),
        "images": images,
        "unpickled": list(unpickled),
        # Names of the built weights (`stages.<i>. ...`) that are still in memory.
        "alive": sorted(name for name, weight in built if weight() is not None),
        "here": sorted(here),
        "stateful": sorted(stateful),
    }


def blow_up(overrides: Sequence[str]) -> Dict[str, Any]:
    """Make a host batch of updates with a rate that makes the second one NaN, as on GPUs."""
    torch_engine._is_late = lambda device: True
    config, data, module = make(overrides)
    with engine_of(config, module, Launch.from_environment()) as engine:
        batch = _example(data.dataset("train"), engine.local_batch.host_batch_size)
        norms = engine.train_step(batch, lr=1e30).grad_norm
        fused = [group["fused"] for group in engine.optimizer.param_groups]
    return {"norms": norms, "fused": fused}


def score(overrides: Sequence[str], weights: Dict[str, Tensor]) -> Tensor:
    """Return the logits of the test split, for given weights."""
    config, data, module = make(overrides)
    with engine_of(config, module, Launch.from_environment()) as engine:
        engine.load_state_dict(EngineState(weights))
        return engine.predict_dataset(data.dataset("test"))[0]


def make(overrides: Sequence[str]) -> Tuple[Config, ChestXrayDataModule, ViTModule]:
    """Build configuration, data and module."""
    config = load_config([CONFIG], overrides)
    data = ChestXrayDataModule(config)
    data.once = coordinator(Launch.from_environment()).call_once
    return config, data, module_of(config, data)


def _order(config: Config, dataset: ChestXrayDataset) -> TrainingSampler:
    batch = BatchPlan.from_section(config.batch)
    return TrainingSampler(
        len(dataset),
        global_batch_size=batch.global_batch_size,
        device_iterations=batch.device_iterations,
        seed=config.run.seed,
        start_step=0,
        total_steps=config.train.steps,
    )


def _with_two_labels(dataset: ChestXrayDataset) -> ChestXrayDataset:
    """Return the first images of a split with less labels than the model has."""
    records = dataset.records.take(np.arange(9))
    reader = dataset._reader.select(records.table["image"].tolist())
    return ChestXrayDataset(replace(records, labels=records.labels[:, :2]), reader)


def _example(dataset: ChestXrayDataset, size: int) -> Batch:
    return Batch.zeros(size, image_size=dataset.image_size, num_classes=dataset.num_classes)


def _note(event: str, arguments: Any) -> None:
    if event == "pickle.find_class":
        unpickled.append(".".join(map(str, arguments)))
    if event == "open" and str(arguments[0]).endswith(".png"):
        opened_images.append(Path(arguments[0]).name)


def main() -> None:
    """Run all cases."""
    sys.addaudithook(_note)
    compiled._COMPILER = {"backend": "aot_eager"}  # kernels would take a minute
    cases, folder = Path(sys.argv[1]), Path(sys.argv[2])
    rank = Launch.from_environment().rank
    for name, (overrides, scale) in json.loads(cases.read_text()).items():
        found = blow_up(overrides) if name == "blow up" else measure(overrides, scale)
        torch.save(found, folder / f"{name}.{rank}")


if __name__ == "__main__":
    main()
