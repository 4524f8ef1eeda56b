"""One way of benchmarks.throughput: trains, and times its steps when it is asked to.

    python -m benchmarks.throughput_worker TASK.json

The ways of this project run `train.py` with the callback `Paced` instead. A worker sends a line of
JSON when it is warm, and one for each command: `go` trains and times a number of steps, `evaluate`
scores the validation images, anything else ends it. Between commands it waits.
"""

from __future__ import annotations

import json
import math
import resource
import socket
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from cxr_vit import Callback

#: The learning rate and weight decay of all ways.
LEARNING_RATE, WEIGHT_DECAY = 2e-4, 0.01
LABELS = 14
#: Side of the matrices of the processor's peak, and products per round.
MATRIX = {"cpu": 2048, "cuda": 8192}
PRODUCTS = {"cpu": 10, "cuda": 100}
Task = Dict[str, Any]


class Pace:
    """Counts the steps of a way, times them, and waits for commands between them.

    Parameters
    ----------
    task
        `socket`, where the benchmark listens; `began`, when it started this process; `warm`,
        `settle` and `steps`: steps before the first command, and untimed and timed ones of each.
    evaluate
        Scores the validation images and returns their number and the seconds.
    """

    def __init__(self, task: Task, evaluate: Optional[Callable[[], Dict[str, Any]]] = None) -> None:
        self.task = task
        self.evaluate = evaluate
        self.facts: Dict[str, Any] = {}
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(task["socket"])
        self._commands = self._connection.makefile("r", encoding="utf-8")
        self._done = 0
        self._begin, self._end = 1, task["warm"]
        self._began, self._faults = 0.0, 0
        self._first: Optional[float] = None

    def step_begins(self) -> None:
        """Note when the first step begins; a model is compiled in it."""
        if self._first is None:
            self._first = time.perf_counter()

    def step_done(self) -> bool:
        """Count a weight update; at the end of a window report it. Return whether to stop."""
        self._done += 1
        if self._done == 1:
            synchronise()
            self.facts["start_s"] = time.time() - self.task["began"]
            if self._first is not None:
                self.facts["first_step_s"] = time.perf_counter() - self._first
        if self._done == self._begin:
            synchronise()
            self._began, self._faults = time.perf_counter(), page_faults()
        if self._done < self._end:
            return False
        synchronise()
        seconds, steps = time.perf_counter() - self._began, self._end - self._begin
        self.facts["page_faults_per_step"] = (page_faults() - self._faults) / steps
        return self.report(seconds, steps)

    def report(self, seconds: float, steps: int) -> bool:
        """Send the seconds of some steps; obey the next command. Return whether to stop."""
        self._send({"seconds": seconds, "steps": steps, **self.facts})
        while True:
            command = self._commands.readline().strip()
            if command == "go":
                self._begin = self._done + self.task["settle"]
                self._end = self._begin + self.task["steps"]
                return False
            if command != "evaluate" or self.evaluate is None:
                self._commands.close()
                self._connection.close()
                return True
            self._send(self.evaluate())

    def _send(self, message: Dict[str, Any]) -> None:
        if torch.cuda.is_available():
            message["gpu_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
            torch.cuda.empty_cache()  # this way waits now, and the next one needs the memory
        self._connection.sendall(f"{json.dumps(message)}\n".encode())


def page_faults() -> int:
    """Return how often the kernel had to give this process a page."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Paced(Callback):
    """Paces a run of `train.py`; `task` is a JSON file. Only the main process is asked."""

    def __init__(self, task: str) -> None:
        self.task: Task = json.loads(Path(task).read_text(encoding="utf-8"))
        self.pace: Optional[Pace] = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        """Connect to the benchmark."""
        if trainer.is_global_zero:
            self.pace = Pace(self.task, partial(_evaluate, trainer))
            self.pace.facts["compile_s"] = trainer.compile_s

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for a command where one is due; end the run if there is none."""
        if self.pace is not None and self.pace.step_done():
            trainer.request_stop("the benchmark is over")


def _evaluate(trainer: Any) -> Dict[str, Any]:
    trainer.engine.prepare_scoring(trainer.val_data)
    synchronise()
    start = time.perf_counter()
    trainer.engine.predict_dataset(trainer.val_data)
    synchronise()
    return {"seconds": time.perf_counter() - start, "images": len(trainer.val_data)}


class Images(Dataset):  # type: ignore[type-arg]
    """What a user of the peers writes: float images of three channels, normalised one by one."""

    def __init__(self, task: Task) -> None:
        self.pixels, self.labels = read_images(task)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Dict[str, Tensor]:
        image = torch.from_numpy(self.pixels[index].astype(np.float32) / 255)
        image = ((image - 0.5) / 0.5).unsqueeze(0).expand(3, -1, -1)
        return {"pixel_values": image, "labels": torch.from_numpy(self.labels[index])}


def read_images(task: Task) -> Tuple[np.ndarray, np.ndarray]:
    """Return the images of the cache, uint8 ``[N, H, W]``, and labels, float32 ``[N, C]``."""
    size = task["image_size"]
    pixels = np.fromfile(task["pixels"], dtype=np.uint8).reshape(-1, size, size)
    labels = np.random.default_rng(0).random((len(pixels), LABELS)) < 0.1
    return pixels, labels.astype(np.float32)


def loader(task: Task) -> DataLoader[Any]:
    """Return the loader of Lightning and of the plain loop, as their guides recommend."""
    workers = task["workers"]
    return DataLoader(
        Images(task),
        batch_size=task["micro_batch"],
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=task["device"] == "cuda",
    )


def hugging_face_model(task: Task) -> nn.Module:
    """Return the model that this project trains, from the same numbers."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=task["hidden_size"],
        num_hidden_layers=task["num_layers"],
        num_attention_heads=task["num_heads"],
        intermediate_size=task["mlp_size"],
        image_size=task["image_size"],
        patch_size=task["patch_size"],
        num_labels=LABELS,
        problem_type="multi_label_classification",
    )
    return ViTForImageClassification(config)


def timm_model(task: Task) -> nn.Module:
    """Return timm's Vision Transformer of the same shape."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=task["image_size"],
        patch_size=task["patch_size"],
        embed_dim=task["hidden_size"],
        depth=task["num_layers"],
        num_heads=task["num_heads"],
        mlp_ratio=task["mlp_size"] / task["hidden_size"],
        num_classes=LABELS,
    )


def adamw(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW in its fastest form; torch 2.0 has no fused one on CPUs."""
    weights = list(parameters)
    options: Dict[str, Any] = {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}
    try:
        return torch.optim.AdamW(weights, fused=True, **options)
    except RuntimeError:
        return torch.optim.AdamW(weights, **options)


def plain_loop(task: Task, model: nn.Module) -> None:
    """Train in a loop of torch with everything on and nothing else: the images are on the device.

    No loader, no loss that is read, no gradient norm, no schedule, no log.
    """
    device = torch.device(task["device"])
    model = model.to(device).train()
    pixels, labels = (torch.from_numpy(array).to(device) for array in read_images(task))
    optimizer = adamw(model.parameters())
    context = partial(torch.autocast, device.type, torch.bfloat16, task["precision"] == "bf16")

    def loss_of(images: Tensor, targets: Tensor) -> Tensor:
        with context():
            values = ((images.float() / 255 - 0.5) / 0.5).unsqueeze(1).expand(-1, 3, -1, -1)
            output = model(values)
        logits = output if isinstance(output, Tensor) else output.logits
        return F.binary_cross_entropy_with_logits(logits.float(), targets)

    compute = torch.compile(loss_of) if task["compile"] else loss_of
    pace, size = Pace(task), task["micro_batch"]
    while True:
        for rows in torch.randperm(len(pixels), device=device).split(size):
            if len(rows) < size:
                continue
            pace.step_begins()
            compute(pixels[rows], labels[rows]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if pace.step_done():
                return


def transformers_trainer(task: Task) -> None:
    """Train with transformers.Trainer, in its fast settings."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stops(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pace = Pace(task)

        def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            self.pace.step_begins()

        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
            control.should_training_stop = self.pace.step_done()

    workers = task["workers"]
    arguments = TrainingArguments(
        task["folder"],
        per_device_train_batch_size=task["micro_batch"],
        max_steps=task["total_steps"],
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="cosine",
        max_grad_norm=0.0,
        bf16=task["precision"] == "bf16",
        torch_compile=task["compile"],
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=task["device"] == "cuda",
        dataloader_drop_last=True,
        logging_steps=50,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **cpu_option(TrainingArguments, task["device"]),
    )
    trainer = Trainer(
        hugging_face_model(task), arguments, train_dataset=Images(task), callbacks=[Stops()]
    )
    trainer.train()


def cpu_option(arguments: Any, device: str) -> Dict[str, bool]:
    """Return the option of transformers.TrainingArguments that keeps it off GPUs."""
    fields = arguments.__dataclass_fields__
    return {"use_cpu" if "use_cpu" in fields else "no_cuda": True} if device == "cpu" else {}


def lightning_trainer(task: Task) -> None:
    """Train with Lightning, in its fast settings."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            model = hugging_face_model(task).train()
            self.model = torch.compile(model) if task["compile"] else model

        def training_step(self, batch: Dict[str, Tensor], index: int) -> Tensor:
            loss: Tensor = self.model(**batch).loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(self.parameters())

    class Stops(pl.Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.pace = Pace(task)

        def on_train_batch_start(self, *event: Any) -> None:
            self.pace.step_begins()

        def on_train_batch_end(self, trainer: Any, *event: Any) -> None:
            if self.pace.step_done():
                trainer.should_stop = True

    pl.Trainer(
        accelerator="gpu" if task["device"] == "cuda" else "cpu",
        devices=1,
        precision="bf16-mixed" if task["precision"] == "bf16" else "32-true",
        max_steps=task["total_steps"],
        default_root_dir=task["folder"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Stops()],
    ).fit(Module(), loader(task))


def peak(task: Task) -> None:
    """Time products of large square matrices, in the precision of the training."""
    dtype = torch.bfloat16 if task["precision"] == "bf16" else torch.float32
    device, size = task["device"], MATRIX[task["device"]]
    one, other = (torch.randn(size, size).to(device, dtype) for _ in range(2))
    result = torch.empty_like(one)
    pace, count, seconds = Pace(task), PRODUCTS[device], math.nan
    while not pace.report(seconds, count * 2 * size**3):
        torch.mm(one, other, out=result)
        synchronise()
        start = time.perf_counter()
        for _ in range(count):
            torch.mm(one, other, out=result)
        synchronise()
        seconds = time.perf_counter() - start


WAYS: Dict[str, Callable[[Task], None]] = {
    "limit": lambda task: plain_loop(task, hugging_face_model(task)),
    "timm": lambda task: plain_loop(task, timm_model(task)),
    "trainer": transformers_trainer,
    "lightning": lightning_trainer,
    "peak": peak,
}


def main(task: Task) -> None:
    """Train in the way that the task names."""
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    WAYS[task["way"]](task)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")  # Lightning advises more workers
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
