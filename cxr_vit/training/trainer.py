"""The trainer: runs a module on an engine, with callbacks, loggers, checkpoints and a run folder.

The order of the hooks is in `cxr_vit.training.callback`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from torch import Tensor

from cxr_vit.checkpoint_files import checkpoint_of
from cxr_vit.config import BatchPlan, Config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch, ChestXrayDataset, dataset_of_files
from cxr_vit.data.sampler import TrainingSampler
from cxr_vit.engines.base import Engine, EngineState, Interrupted
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.memory import explaining_out_of_memory
from cxr_vit.engines.process_group import coordinator
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CheckpointError, DataError
from cxr_vit.evaluation.label_match import LabelMatch
from cxr_vit.evaluation.metrics import EvalOutputs, Scores, probabilities
from cxr_vit.model.module import ViTModule
from cxr_vit.training import config_checks
from cxr_vit.training.callback import Callback, TrainOutputs
from cxr_vit.training.checkpoint import CheckpointStore, check_facts, load_checkpoint
from cxr_vit.training.durations import Durations
from cxr_vit.training.extensions import all_callbacks, all_loggers
from cxr_vit.training.loggers import Figures, Logger, as_number
from cxr_vit.training.pace import Pace, timed
from cxr_vit.training.run_folder import FoundRun, RunFolder, create_run, find_run
from cxr_vit.training.saving import Saver, restore_callbacks
from cxr_vit.training.scoring import (
    describe_views,
    match_of,
    outputs_of,
    predict_views,
    with_interval,
)
from cxr_vit.training.signals import StopOnSignal

logger = logging.getLogger(__name__)

PathLike = Union[str, Path]


class Trainer:
    """Train, validate, test and predict.

    Each call builds the engine of the configuration and closes it at its end. Learning rate and
    sample order are functions of the step, so the step, the engine's state and the callbacks' state
    are enough to resume a run exactly.

    Parameters
    ----------
    config
        The configuration that the module and the data were made with.
    callbacks
        Called after the built-in ones and those of `config.callbacks`, in their order. The
        latter are imported by `fit` alone: scoring runs no code that a configuration names.
    loggers
        Used instead of those of `config.loggers`.

    Attributes
    ----------
    global_step
        Weight updates done.
    current_epoch
        Epoch of the current host batch, counted from 0.
    callback_metrics
        Tag -> last value of every metric that was logged or computed.
    module, datamodule, engine
        What is running. The engine is there until the call ends.
    run
        The run's folder, from the beginning of `fit` on.
    validation_outputs, test_outputs
        Scores, logits and labels of the last validation and test.
    interrupted
        Whether a signal, `train.max_minutes` or `interrupt` ended the training, to be resumed.

    Raises
    ------
    ConfigError
        If the configuration does not fit the processes or the IPUs.
    EngineUnavailable
        If the configured engine is not available here.
    """

    module: ViTModule
    datamodule: ChestXrayDataModule
    engine: Engine
    run: RunFolder
    train_data: ChestXrayDataset
    val_data: ChestXrayDataset
    durations: Durations
    checkpoints: CheckpointStore
    match: LabelMatch
    validation_outputs: EvalOutputs
    test_outputs: EvalOutputs

    def __init__(
        self,
        config: Config,
        *,
        callbacks: Sequence[Callback] = (),
        loggers: Optional[Sequence[Logger]] = None,
    ) -> None:
        self.config = config
        self.launch = Launch.from_environment()
        self.is_global_zero = self.launch.is_main
        self._given = callbacks, loggers
        scoring = config.changed(callbacks=[], loggers=[])
        self.callbacks = all_callbacks(scoring, callbacks, is_main=self.is_global_zero)
        self.loggers = all_loggers(scoring, loggers) if self.is_global_zero else []
        self._has_extensions = False
        self.choice = choose_engine(config, self.launch)
        self.batch = BatchPlan.from_section(config.batch)
        self.is_fitting = False
        self.is_logging = False
        self._reset()

    def _reset(self) -> None:
        """Set the state of a run that has not begun."""
        self.global_step = 0
        self.current_epoch = 0
        self.callback_metrics: Scores = {}
        self.evaluated_step = 0
        self.saver = Saver(self)
        self._pace = Pace()
        self.stop_reason: Optional[str] = None
        self.interrupted = False
        self.compile_s = 0.0
        self._stop_request: Optional[str] = None
        self._interruption: Optional[str] = None
        minutes = self.config.train.max_minutes
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes

    # The four entry points

    def fit(
        self,
        module: ViTModule,
        datamodule: ChestXrayDataModule,
        ckpt_path: Optional[PathLike] = None,
    ) -> None:
        """Train to the end, or until a stop is requested.

        A new run gets a folder of its own. `ckpt_path` resumes: ``"last"`` the newest run of this
        configuration (`run.dir`, else `run.name`), a run's folder that run; both continue in their
        folder. Another checkpoint's path begins a new run with its state. Processes that torchrun
        restarts resume the run that they began.

        Raises
        ------
        CheckpointError
            If there is nothing to resume, or the checkpoint is damaged, of another model or of
            other data, or past the end of this run; or if the last checkpoint cannot be written.
        ConfigError
            If a class named in the configuration cannot be used.
        OutOfMemory
            With a batch that needs less.
        """
        self._reset()
        config_checks.check_data_config(self.config, datamodule.config, trains=True)
        self._import_extensions()
        with contextlib.ExitStack() as stack:
            found = find_run(self.config.run, ckpt_path, self.launch, stack)
            self.setup_data(datamodule, "fit")
            self._open_module(module)
            config_checks.check_monitor(self.config, module)
            self.match = match_of(module, datamodule, trains=True)
            self._open_splits(datamodule)
            restored = None
            if found.checkpoint:
                restored = self._restore(found.checkpoint, found.restarted)
            if found.folder:
                self._use_run(found.folder)
                if restored:
                    self.saver.restore_folder()
            if restored and self.is_complete:
                module.model.load_weights(restored[0].weights)
                self._print(
                    f"{found.checkpoint} is at step {self.global_step}, the last one: nothing to"
                    " do. To train on, raise train.epochs or train.steps."
                )
                return
            if not found.folder:
                self.saver.forget_best()  # a new folder has none yet
                self._use_run(create_run(self.config.run, self.launch, found.key))
                stack.enter_context(self.run.locked())
                self.run.refuse_saved()
            self._fit_in_run(found, restored)
        self._notify("teardown", "fit")
        self._print(self.describe_end())

    def _open_splits(self, datamodule: ChestXrayDataModule) -> None:
        self.train_data = datamodule.dataset("train", augmented=True)
        self.val_data = datamodule.dataset("val")
        self.durations = Durations.from_section(self.config.train, self.batch, len(self.train_data))

    def _fit_in_run(
        self, found: FoundRun, restored: Optional[Tuple[EngineState, Dict[str, Any]]]
    ) -> None:
        """Build the engine, restore its state and the callbacks', and train."""
        with self._building_engine("fit"):
            if restored:
                with explaining_out_of_memory(self.config, training=True):
                    self.engine.load_state_dict(restored[0])
                restore_callbacks(self, restored[1])
            self._describe_run(is_new=not (found.folder and restored))
            if restored and not found.folder:
                self._print(f"continues {found.checkpoint} in a folder of its own")
            with StopOnSignal(self.interrupt, quiet=self.launch.has_others):
                self._fit()

    def _import_extensions(self) -> None:
        """Import the classes that the configuration names, and say which."""
        if self._has_extensions:
            return
        callbacks, loggers = self._given
        named = [*self.config.callbacks, *(self.config.loggers if loggers is None else ())]
        classes = [str(item) for item in named if not isinstance(item, str)]
        if classes:
            self._print(f"importing what the configuration names: {', '.join(classes)}")
        self.callbacks = all_callbacks(self.config, callbacks, is_main=self.is_global_zero)
        self.loggers = all_loggers(self.config, loggers) if self.is_global_zero else []
        self._has_extensions = True

    def validate(
        self,
        module: ViTModule,
        datamodule: ChestXrayDataModule,
        ckpt_path: Optional[PathLike] = None,
    ) -> Scores:
        """Score the validation split; return the metrics by tag (``val/auroc_macro``).

        `ckpt_path` is a checkpoint to score: a path, a run's folder (then its `best`), or
        ``"best"`` or ``"last"`` of the run that `fit` made. None: the module's present weights.
        """
        with self._scoring(module, datamodule, "validate", ckpt_path):
            self._validate(datamodule.dataset("val"))
        return self.validation_outputs.tagged()

    def test(
        self,
        module: ViTModule,
        datamodule: ChestXrayDataModule,
        ckpt_path: Optional[PathLike] = None,
        *,
        split: str = "test",
    ) -> Scores:
        """Score the test split, or another one; return the metrics by tag. See `validate`.

        The data may have other labels than the module; see `data.label_map`.
        """
        with self._scoring(module, datamodule, "test", ckpt_path):
            self._notify("on_test_start")
            views = self.config.evaluation.views
            self.test_outputs = self._score(datamodule.dataset(split), split, views)
            self.callback_metrics.update(self.test_outputs.tagged())
            self._notify("on_test_end")
        return self.test_outputs.tagged()

    def predict(
        self,
        module: ViTModule,
        images: Union[PathLike, Sequence[PathLike]],
        ckpt_path: Optional[PathLike] = None,
    ) -> Tensor:
        """Return the probability of each label for image files, float32 ``[N, C]``.

        The columns are those of `module.names`. PNG, JPEG and (with the extra `dicom`) DICOM files
        are read. Raises DataError if a file is missing or unusable. See `validate` for `ckpt_path`.
        """
        dataset = dataset_of_files(
            [images] if isinstance(images, (str, Path)) else images,
            num_classes=len(module.names),
            data=self.config.data,
        )
        with self.predicting(module, ckpt_path) as predict:
            return predict(dataset)

    @contextlib.contextmanager
    def predicting(
        self, module: ViTModule, ckpt_path: Optional[PathLike] = None
    ) -> Iterator[Callable[[ChestXrayDataset], Tensor]]:
        """Open the engine, and yield what `predict` calls: images to float32 ``[N, C]``.

        It may be called any number of times. See `validate` for `ckpt_path`.
        """
        views = self.config.evaluation.views
        with self._scoring(module, None, "predict", ckpt_path):
            self._print(*describe_views(views))
            yield lambda dataset: probabilities(self._predict(dataset, views)[0])

    # Opening and closing

    def setup_data(self, datamodule: ChestXrayDataModule, stage: Optional[str] = None) -> None:
        """Set up the data in all processes, in the main process first.

        `fit`, `validate` and `test` do it. Raises DataError if this process has other data: its
        rows would be other images.
        """
        config_checks.check_data_config(self.config, datamodule.config, trains=False)
        processes = coordinator(self.launch)
        self.datamodule = datamodule
        datamodule.once = processes.call_once
        with processes.main_first("data"):
            datamodule.setup(stage)
        differing = processes.differences("data", datamodule.fingerprint())
        if differing:
            raise DataError(
                "this host's data differ from those of the first process:"
                f" {'; '.join(differing)}. Give all hosts the same CSV, lists and images."
            )

    def _open_module(self, module: ViTModule) -> None:
        """Set the module up; ConfigError if it was made with another configuration."""
        config_checks.check_module_config(self.config, module)
        self.module = module
        module.setup(for_ipu=self.choice.is_ipu)

    @contextlib.contextmanager
    def _building_engine(self, stage: str) -> Iterator[None]:
        """Build the engine, and close and release it at the end."""
        with explaining_out_of_memory(self.config, training=stage == "fit"):
            engine = build_engine(self.config, self.module, self.choice, self.batch, self.launch)
        with engine:
            self.engine = engine
            try:
                self._notify("setup", stage)
                yield
            finally:
                del self.engine  # its weights and moments would stay on the device

    @contextlib.contextmanager
    def _scoring(
        self,
        module: ViTModule,
        datamodule: Optional[ChestXrayDataModule],
        stage: str,
        ckpt_path: Optional[PathLike],
    ) -> Iterator[None]:
        """Open what scoring needs, with the weights of a checkpoint if one is given."""
        checkpoint = None
        if ckpt_path is not None:  # the main process may still be writing it
            path = ckpt_path
            find = coordinator(self.launch).call_once
            checkpoint = Path(find("checkpoint", lambda: str(self._find_checkpoint(path))))
        if datamodule is not None:
            self.match = match_of(module, datamodule, trains=False)
            self._print(*self.match.describe())
            self.setup_data(datamodule, stage)
        self._open_module(module)
        if checkpoint is not None:
            module.load_weights(checkpoint)
        with self._building_engine(stage):
            yield
        self._notify("teardown", stage)

    def _find_checkpoint(self, ckpt_path: PathLike) -> Path:
        """Return the folder of a checkpoint; ``"best"`` and ``"last"`` are of the own run."""
        if ckpt_path not in ("best", "last"):
            return checkpoint_of(Path(ckpt_path))
        if not hasattr(self, "run"):
            raise CheckpointError(
                f"ckpt_path={ckpt_path!r} is a checkpoint of the run that fit() makes, and this"
                " trainer has made none. Give a path."
            )
        is_best = ckpt_path == "best"  # it is missing until a validation
        return checkpoint_of(self.run.path if is_best else self.run.checkpoints / "last")

    def _use_run(self, folder: RunFolder) -> None:
        self.run = folder
        self.checkpoints = CheckpointStore(folder.checkpoints, writes=folder.writes)

    def _restore(self, checkpoint: Path, restarted: bool) -> Tuple[EngineState, Dict[str, Any]]:
        """Restore the trainer's state; return the engine's and the content of trainer_state.json.

        Raises CheckpointError if the checkpoint is damaged, of other data, or past the end of this
        run.
        """
        state, trainer_state = load_checkpoint(checkpoint)
        check_facts(checkpoint, trainer_state, self.resume_facts())
        step = trainer_state["step"]
        if step > self.durations.total_steps:
            raise CheckpointError(
                f"{checkpoint} is at step {step}, past this run's {self.durations.total_steps}"
                " steps. Raise train.epochs or train.steps."
            )
        self.global_step, self.evaluated_step = step, trainer_state["evaluated_step"]
        self.current_epoch = step // self.durations.steps_per_epoch
        self.saver.restore(trainer_state)
        # A restarted run may have been started with this option; its checkpoints are complete.
        if self.config.train.resume_weights_only and not restarted:
            state = EngineState(state.weights, scalars={"updates": float(step)})
        return state, trainer_state

    def resume_facts(self) -> Dict[str, Any]:
        """Return the facts that must match on resume."""
        return {
            "labels": self.module.names,
            **self.datamodule.fingerprint(),
            "seed": self.config.run.seed,
            "global_batch_size": self.batch.global_batch_size,
            **self.module.model.image_facts(),
        }

    def _describe_run(self, *, is_new: bool) -> None:
        """Print the run's folder and what runs in it; write the files that describe it."""
        self._print(str(self.run.path))
        data, engine = self.datamodule, self.engine
        self.run.write_config(self.config)
        if is_new:
            self.run.write_environment(engine.describe(), engine.facts(), data.fingerprint())
        self.run.write_skipped(data.skipped)
        self._print(data.describe(), engine.describe())
        self._print(*self.module.model.plan.describe(engine.place), *engine.batch.describe())
        self._print(self.durations.describe(self.global_step))

    def _print(self, *lines: str) -> None:
        if self.is_global_zero:
            sys.stdout.write("".join(f"{line}\n" for line in lines))
            sys.stdout.flush()

    # The training loop

    def _fit(self) -> None:
        """Train from the current step to the last one, or until a stop is requested."""
        self.is_fitting = True
        try:
            with explaining_out_of_memory(self.config, training=True):
                self.compile_s = self.engine.compile(self._example_batch())
            self._open_loggers()
            self._notify("on_fit_start")
            self._notify("on_train_start")
            self._stop_if_requested()
            if self.validation_is_due:  # the run was stopped between a step and its validation
                self._validate_and_save()
                self._stop_if_requested()
            if not self.stop_reason:
                self._train()
            self.saver.save_the_end()
            self._notify("on_train_end")
            self._notify("on_fit_end")
            self._close_loggers("stopped" if self.interrupted else "success")
        except BaseException as error:
            with _only_warning("on_exception of a callback"):
                self._notify("on_exception", error)
            self._close_loggers("failed")
            raise
        finally:
            self.is_fitting = False

    def _train(self) -> None:
        """Train batch by batch to the last step or a stop; validate and save when due."""
        per_epoch = self.durations.steps_per_epoch
        is_first = True
        batches = self.engine.loader(self.train_data, self._sampler(), training=True)
        for batch, wait_s in timed(batches):
            first = self.global_step
            if is_first or first // per_epoch != self.current_epoch:
                self.current_epoch, is_first = first // per_epoch, False
                self._notify("on_train_epoch_start")
            self._train_step(batch, wait_s)
            if self.checkpoint_is_due and not self.validation_is_due:
                self.save_checkpoint()
            self._stop_if_requested()
            if self.validation_is_due:
                self._validate_and_save()
            if self.is_due(first, per_epoch):
                self._notify("on_train_epoch_end")
            self._stop_if_requested()
            if self.stop_reason:
                break

    def _train_step(self, batch: Batch, wait_s: float) -> None:
        """Do the weight updates of a host batch and notify the callbacks."""
        first = self.global_step
        index = first % self.durations.steps_per_epoch // self.batch.device_iterations
        self._notify("on_train_batch_start", batch, index)
        self._pace.start(wait_s)
        lr = config_checks.rate_at(self.module, first, self.durations.total_steps)
        with explaining_out_of_memory(self.config, training=True):
            output = self.engine.train_step(batch, lr=lr)
            self.global_step = first + output.num_updates
            times = self._pace.end(output, reads=self._needs_numbers(first))
        outputs = TrainOutputs(first, self.global_step, output, lr, *times)
        self._notify("on_train_batch_end", outputs, batch, index)

    def _needs_numbers(self, first_step: int) -> bool:
        """Whether something follows the steps since `first_step` that needs their losses."""
        periods = self.config.train.log_every_steps, self.durations.steps_per_epoch
        is_due = any(self.is_due(first_step, every) for every in periods)
        return is_due or self.validation_is_due or self.checkpoint_is_due

    def _validate(self, dataset: ChestXrayDataset) -> None:
        """Score the validation split and notify the callbacks."""
        self._notify("on_validation_start")
        scored, count = self._score(dataset, "val"), self.config.evaluation.val_resamples
        self.validation_outputs = with_interval(scored, dataset.records, count)
        self.callback_metrics.update(self.validation_outputs.tagged())
        self._notify("on_validation_end")

    def _validate_and_save(self) -> None:
        """Validate, and save if the score is the best or a checkpoint is due."""
        before = self.evaluated_step
        self.evaluated_step = self.global_step
        try:
            self._validate(self.val_data)
        except Interrupted:  # a resumed run repeats it
            self.evaluated_step = before
            return
        self.saver.save_if_best(self.saver.monitored())

    def _score(self, dataset: ChestXrayDataset, split: str, views: str = "center") -> EvalOutputs:
        """Score a split with the present weights."""
        with explaining_out_of_memory(self.config, training=False):
            self.engine.prepare_scoring(dataset)
        self._print(*describe_views(views))
        start = time.perf_counter()
        scored, step = self._predict(dataset, views), self.global_step
        return outputs_of(self.engine, self.match, *scored, split=split, step=step, start=start)

    def _predict(self, dataset: ChestXrayDataset, views: str) -> Tuple[Tensor, Tensor]:
        stops = self._is_interrupted if self.is_fitting else None
        with explaining_out_of_memory(self.config, training=False):
            return predict_views(self.engine, dataset, views, stops=stops)

    def is_due(self, first_step: int, every: int) -> bool:
        """Whether a multiple of `every` lies in the steps since `first_step`; always at the end."""
        return self.global_step // every > first_step // every or self.is_finished

    @property
    def validation_is_due(self) -> bool:
        """Whether a validation is due since the last one; none is after a requested stop."""
        due = self.is_due(self.evaluated_step, self.durations.eval_every)
        return due and self.evaluated_step < self.global_step and not self.stop_reason

    @property
    def checkpoint_is_due(self) -> bool:
        """Whether a checkpoint is due since the last one."""
        due = self.is_due(self.saver.tried_step, self.durations.checkpoint_every)
        return due and self.saver.tried_step < self.global_step

    @property
    def estimated_stepping_batches(self) -> int:
        """Number of weight updates of the whole run."""
        return self.durations.total_steps

    @property
    def is_finished(self) -> bool:
        """Whether the last step is done."""
        return self.global_step >= self.durations.total_steps

    @property
    def is_complete(self) -> bool:
        """Whether the last step is done and validated: nothing is left to resume."""
        return self.is_finished and self.evaluated_step == self.global_step

    # Stopping

    @property
    def should_stop(self) -> bool:
        """Whether the run stops after the current host batch; set it to stop the run."""
        return bool(self.stop_reason or self._stop_request or self._is_interrupted())

    @should_stop.setter
    def should_stop(self, value: bool) -> None:
        """Request a stop, or withdraw the request."""
        self._stop_request = "should_stop was set" if value else None

    def request_stop(self, reason: str) -> None:
        """Stop all processes after the current host batch. Any process may call it."""
        self._stop_request = self._stop_request or reason

    def interrupt(self, reason: str) -> None:
        """Stop all processes after the current host batch, to be resumed later.

        Any process may call it at any time, also from a signal handler.
        """
        self._interruption = reason

    def _is_interrupted(self) -> bool:
        """Whether this process was interrupted, or has used up its time."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._interruption = f"train.max_minutes={self.config.train.max_minutes:g} are over"
        return self._interruption is not None

    def _stop_if_requested(self) -> None:
        """Stop if any process asks for it: all of them must stop at the same step."""
        if self.stop_reason or not self.engine.any_process(self.should_stop):
            return
        self.interrupted = self.engine.any_process(self._is_interrupted())
        own = self._interruption or self._stop_request
        self.stop_reason = own or "another process asked for it"

    def describe_end(self) -> str:
        """Describe in one line how the run ended and where its best checkpoint is."""
        ending = "finished"
        if not self.is_complete:
            ending = f"stopped at step {self.global_step}: {self.stop_reason}"
        names = [name for name in ("best", "last") if self.checkpoints.linked(name)]
        if not names:
            return f"{ending}; there is no checkpoint yet"
        return f"{ending}; {names[0]} checkpoint: {self.checkpoints.folder / names[0]}"

    def save_checkpoint(self, *, is_best: bool = False) -> Optional[Path]:
        """Write a checkpoint of the current step, update the links, and delete old checkpoints.

        All processes must call it together. Returns None, with a warning, if it cannot be written,
        as on a full disk. Raises NonFiniteLoss and writes nothing if a weight is NaN or infinite.
        """
        return self.saver.save(is_best=is_best)

    # Logging

    def _open_loggers(self) -> None:
        if self.is_global_zero:
            self.is_logging = True
            for log in self.loggers:
                log.setup(self.run.path, self.global_step)
                log.log_hyperparams(self.config.flat())

    def _close_loggers(self, status: str) -> None:
        if self.is_logging:
            self.is_logging = False
            for log in self.loggers:
                with _only_warning(f"{type(log).__name__}.finalize"):
                    log.finalize(status)

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        """Log metrics of the current step, tag -> number or tensor of one, None where undefined.

        They also become `callback_metrics`. Outside `fit` nothing is logged. Raises ConfigError if
        a value is no number.
        """
        numbers = {tag: as_number(tag, value) for tag, value in metrics.items()}
        self.callback_metrics.update(numbers)
        if self.is_logging:
            for log in self.loggers:
                with _only_warning(f"{type(log).__name__}.log_metrics", OSError):
                    log.log_metrics(numbers, self.global_step)

    def log_figures(self, figures: Figures) -> None:
        """Log matplotlib figures of the current step, tag -> figure."""
        if self.is_logging:
            for log in self.loggers:
                with _only_warning(f"{type(log).__name__}.log_figures", OSError):
                    log.log_figures(figures, self.global_step)

    # Batches

    def rows(self, step: int) -> List[int]:
        """Return the rows of the training split that an update uses, over all processes."""
        rows: List[int] = (self.draws(step) % len(self.train_data)).tolist()
        return rows

    def draws(self, step: int) -> np.ndarray:
        """Return the draws of an update, over all processes: what `train_data` reads images by."""
        return self._sampler().draws(step)

    def _sampler(self) -> TrainingSampler:
        return TrainingSampler(
            len(self.train_data),
            global_batch_size=self.batch.global_batch_size,
            device_iterations=self.batch.device_iterations,
            seed=self.config.run.seed,
            start_step=self.global_step,
            total_steps=self.durations.total_steps,
        )

    def _example_batch(self) -> Batch:
        return Batch.zeros(
            self.engine.local_batch.host_batch_size,
            image_size=self.train_data.image_size,
            num_classes=self.train_data.num_classes,
        )

    def _notify(self, hook: str, *event: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, self.module, *event)


@contextlib.contextmanager
def _only_warning(what: str, kind: type[Exception] = Exception) -> Iterator[None]:
    """Warn of an error that must not hide another one, or end a run."""
    try:
        yield
    except kind as error:
        logger.warning("%s failed: %s: %s", what, type(error).__name__, error)
