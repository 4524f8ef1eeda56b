"""Loggers: TensorBoard, JSON lines, CSV, Weights & Biases and MLflow behind one interface."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import logging
import math
import os
import re
import tempfile
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Deque,
    Dict,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Type,
)

from cxr_vit.config.schema import Config
from cxr_vit.data.text_files import csv_line, original_text
from cxr_vit.errors import ConfigError
from cxr_vit.files import replacing, write_text
from cxr_vit.regular_files import no_link, read_bytes
from cxr_vit.training.log_files import EventFile, LogFile, keep_lines, read_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # a third of a second, which a run without figures saves

logger = logging.getLogger(__name__)

#: Tag -> value, None where it is undefined.
Scalars = Mapping[str, Optional[float]]
#: Tag -> figure.
Figures = Mapping[str, "Figure"]

#: Numbers that stay the same in a run: TensorBoard draws no curve of them.
_CONSTANTS = {"perf/compile_s", "val/auroc_defined", "val/num_findings"}
#: Columns of TensorBoard's hparams page, beside the settings.
_HPARAM_METRICS = ("val/auroc_macro", "val/average_precision_macro", "val/loss")
#: Settings that name places on a machine, not what is trained: no hyperparameters.
_MACHINE = {
    "run.name", "run.root", "run.dir", "data.root", "data.csv", "data.join", "data.images",
    "data.boxes", "data.relabels", "data.train_list", "data.val_list", "data.test_list",
    "data.cache_dir", "engine.executable_cache", "engine.profile_dir", "loggers",
}  # fmt: skip
#: TensorBoard's Custom Scalars page: group -> chart -> how it is drawn and regexes of its tags.
_LAYOUT = {
    "validation": {
        "macro AUROC": ["Multiline", ["^val/auroc_macro$"]],
        "macro AUROC with its 95 % interval": [
            "Margin",
            ["val/auroc_macro", "val/auroc_macro_low", "val/auroc_macro_high"],
        ],
        "AUROC of each finding": ["Multiline", ["^val/auroc/"]],
    },
    "training": {
        "loss, training and validation": ["Multiline", ["^train/loss$", "^val/loss$"]],
        "learning rate": ["Multiline", ["^train/lr$"]],
    },
    "speed": {
        "samples per second": ["Multiline", ["^perf/samples_per_s$"]],
        "waiting for data, % of the time": ["Multiline", ["^perf/data_wait_pct$"]],
    },
}
#: What W&B and MLflow allow in the id of a run.
_RUN_ID = re.compile(r"[^\s/\\#?%:]+")
#: Default project of W&B and experiment of MLflow.
_PROJECT = "cxr-vit"


def as_number(tag: str, value: Any) -> Optional[float]:
    """Return a metric as a number, None where undefined; ConfigError if it is none."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"log_metrics: {tag}={value!r} is no number.") from error


class Logger:
    """Base of loggers; every method does nothing. Only the main process has loggers."""

    def setup(self, folder: Path, first_step: int) -> None:
        """Open the log. `folder` is the run's folder and has config.yaml already.

        `first_step` is 0 in a new run; a resumed run continues after `first_step`.
        """

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log the whole configuration, ``"optim.lr"`` -> value: once, after `setup`."""

    def log_metrics(self, metrics: Scalars, step: int) -> None:
        """Log an event; a value is None where it is undefined."""

    def log_figures(self, figures: Figures, step: int) -> None:
        """Log matplotlib figures."""

    def finalize(self, status: str) -> None:
        """Close the log; `status` is "success", "stopped" or "failed".

        Also called if `setup` was not reached or failed.
        """


class JsonlLogger(Logger):
    """Write one JSON object per event to ``metrics.jsonl``, flat and always with `step`."""

    def __init__(self) -> None:
        self.path = Path("metrics.jsonl")
        self._file = LogFile(self.path)

    def setup(self, folder: Path, first_step: int) -> None:
        """Drop the events after `first_step`: a resumed run repeats them."""
        self.path = folder / self.path.name
        self._file = LogFile(self.path)
        keeps = partial(_keeps_event, first_step)
        self._file.change(partial(keep_lines, self.path, keeps))

    def log_metrics(self, metrics: Scalars, step: int) -> None:
        """Append an event."""
        event = {"step": step, **{tag: _finite(value) for tag, value in metrics.items()}}
        self._file.append(f"{json.dumps(event)}\n".encode())

    def finalize(self, status: str) -> None:
        """Write what waits for room on the disk."""
        self._file.close()


def _keeps_event(last_step: int, index: int, line: bytes) -> Optional[bool]:
    """Return whether an event is not after `last_step`, None if the line is no event."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    is_number = isinstance(step, (int, float)) and not isinstance(step, bool)
    return step <= last_step if is_number else None


def _finite(value: Optional[float]) -> Optional[float]:
    """Return None for NaN and infinity, which JSON does not have."""
    return value if value is not None and math.isfinite(value) else None


class CsvLogger(Logger):
    """Write one row per event to ``metrics.csv``; a cell is empty where its tag has no value.

    The first event with a new tag adds a column, for which the file is written again.
    """

    def __init__(self) -> None:
        self.path = Path("metrics.csv")
        self._file = LogFile(self.path)
        self._columns: List[str] = []
        self._header_waits = False

    def setup(self, folder: Path, first_step: int) -> None:
        """Drop the rows after `first_step`: a resumed run repeats them."""
        self.path = folder / self.path.name
        self._file = LogFile(self.path)
        self._columns, self._header_waits = _header(self.path), False
        keeps = partial(_keeps_row, self._columns, first_step)
        self._file.change(partial(keep_lines, self.path, keeps))

    def log_metrics(self, metrics: Scalars, step: int) -> None:
        """Append a row."""
        row = {"step": step, **{_column(tag): _finite(value) for tag, value in metrics.items()}}
        new = [tag for tag in row if tag not in self._columns]
        if new or not (self._header_waits or self.path.exists()):
            self._columns = [*self._columns, *new]
            self._header_waits = True
            self._file.change(partial(self._widen, self._columns, len(new)))
        self._file.append(csv_line(row.get(tag) for tag in self._columns).encode())

    def _widen(self, columns: Sequence[str], added: int) -> None:
        """Write the table again with columns added at its end."""
        with contextlib.ExitStack() as files:
            rows: Iterator[bytes] = iter(())
            if os.path.lexists(self.path):
                rows = read_lines(files.enter_context(open(self.path, "rb", opener=no_link)))
            temporary = files.enter_context(replacing(self.path))
            wider = files.enter_context(temporary.open("wb"))
            wider.write(csv_line(columns).encode())
            for line in islice(rows, 1, None):
                wider.write(line.rstrip(b"\r\n") + b"," * added + b"\n")
        self._header_waits = False

    def finalize(self, status: str) -> None:
        """Write what waits for room on the disk."""
        self._file.close()


def _column(tag: str) -> str:
    """Return the name of a tag's column: the header is one line."""
    return " ".join(tag.splitlines())


def _header(path: Path) -> List[str]:
    """Return the columns of a table, none if it has no header that can be read."""
    try:
        with open(path, "rb", opener=no_link) as file:
            line = next(read_lines(file), b"").decode()
        columns = [original_text(cell) for cell in next(csv.reader([line], strict=True), [])]
    except (OSError, ValueError, csv.Error):
        return []
    return columns if columns[:1] == ["step"] and line.endswith("\n") else []


def _keeps_row(columns: Sequence[str], last_step: int, index: int, line: bytes) -> Optional[bool]:
    """Return whether a row is not after `last_step`, None if the line is no row."""
    if index == 0 and columns:
        return True
    cells = line.rstrip(b"\r\n").split(b",")
    try:
        numbers = {tag: float(cell or "nan") for tag, cell in zip(columns, cells)}
    except ValueError:
        return None
    if len(cells) != len(columns) or not line.endswith(b"\n") or math.isnan(numbers["step"]):
        return None
    return numbers["step"] <= last_step


class TensorBoardLogger(Logger):
    """Write event files into the run's folder, so that TensorBoard shows the run by its name.

    Numbers that stay the same are no curves, and the hparams page has only the settings that
    differ from the defaults. The page "Custom Scalars" has the charts to look at first.
    """

    def __init__(self) -> None:
        self._params: Dict[str, Any] = {}
        self._file: Optional[EventFile] = None

    def setup(self, folder: Path, first_step: int) -> None:
        """Open the event file; in a new run write the configuration."""
        earlier = folder / "tensorboard"  # where versions before 0.2 wrote
        is_there = earlier.is_dir() and not earlier.is_symlink()
        self._file = EventFile(earlier if is_there else folder)
        self._file.purge(first_step + 1)  # also if a run was restarted in its folder
        self._file.add(_torch("summary").custom_scalars(_LAYOUT))
        config = folder / "config.yaml"
        if not first_step and config.exists():
            self._add_text("config", f"```yaml\n{config.read_text(encoding='utf-8')}```")
        self._file.flush()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Keep the settings for the hparams page, which is written at the end."""
        self._params = changed_settings(params)

    def log_metrics(self, metrics: Scalars, step: int) -> None:
        """Add the defined values; flushed, so that the curves are live."""
        assert self._file is not None, "set up"
        for tag, value in metrics.items():
            if tag == "perf/compile_s" and value is not None:
                self._add_text("compilation", f"{value:.1f} s", step)
            elif tag not in _CONSTANTS and value is not None:
                self._file.add(_torch("summary").scalar(tag, value), step)
        self._file.flush()

    def log_figures(self, figures: Figures, step: int) -> None:
        """Add figures."""
        assert self._file is not None, "set up"
        for tag, figure in figures.items():
            pixels = _torch("_utils").figure_to_image(figure)
            self._file.add(_torch("summary").image(tag, pixels, dataformats="CHW"), step)
        self._file.flush()

    def finalize(self, status: str) -> None:
        """Add the hparams page and close the file."""
        if self._file is None:
            return
        metrics = dict.fromkeys(_HPARAM_METRICS, 0.0)  # the page takes the values of these tags
        for page in _torch("summary").hparams(self._params, metrics):
            self._file.add(page)
        self._file.close()
        self._file = None

    def _add_text(self, tag: str, content: str, step: int = 0) -> None:
        assert self._file is not None, "set up"
        self._file.add(_torch("summary").text(tag, content), step)


def _torch(name: str) -> Any:
    """Return a module of torch's TensorBoard, which takes long to import."""
    return import_module(f"torch.utils.tensorboard.{name}")


def changed_settings(params: Mapping[str, Any]) -> Dict[str, Any]:
    """Return the settings that differ from the defaults, without the places on this machine."""
    defaults = Config().flat()
    return {
        key: value if isinstance(value, (bool, int, float)) else str(value)
        for key, value in params.items()
        if key not in _MACHINE and not (key in defaults and str(defaults[key]) == str(value))
    }


class WandbLogger(Logger):
    """Log to Weights & Biases, which `WANDB_MODE=offline` keeps in ``<run>/wandb``.

    A resumed run continues the run whose id is in ``wandb_run_id.txt``.
    """

    def __init__(
        self, *, project: Optional[str] = None, entity: Optional[str] = None, offline: bool = False
    ) -> None:
        _require("wandb")
        self.project = project or os.environ.get("WANDB_PROJECT") or _PROJECT
        self.entity = entity
        self.offline = offline
        self._run: Any = None

    def setup(self, folder: Path, first_step: int) -> None:
        """Open the run, or continue that of the folder."""
        import wandb

        file = folder / "wandb_run_id.txt"
        run_id = _id_in(file)
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                name=folder.resolve().name,
                dir=str(folder),
                id=run_id,
                resume=None if run_id is None else "allow",
                mode="offline" if self.offline else None,
                settings=wandb.Settings(console="off"),  # leave stdout and the progress bar alone
            )
        except wandb.errors.Error as error:
            advice = "run `wandb login`, or set WANDB_MODE=offline and `wandb sync` it later"
            _unavailable("Weights & Biases", error, advice, first_step)
            return
        _keep_id(file, self._run.id)
        # W&B counts calls itself and refuses a step that is not later than the last one, which
        # a resumed run repeats: the step is a metric, and the x axis of all others.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log the whole configuration; a resumed run may have changed it."""
        if self._run is not None:
            self._run.config.update(dict(params), allow_val_change=True)

    def log_metrics(self, metrics: Scalars, step: int) -> None:
        """Log the defined values; W&B's own process sends them."""
        values = {tag: value for tag, value in metrics.items() if value is not None}
        if self._run is not None and values:
            self._run.log({"step": step, **values})

    def log_figures(self, figures: Figures, step: int) -> None:
        """Log figures as images."""
        if self._run is None or not figures:
            return
        import wandb
        from PIL import Image

        images = {
            tag: wandb.Image(Image.open(io.BytesIO(_png(figure))))
            for tag, figure in figures.items()
        }
        self._run.log({"step": step, **images})

    def finalize(self, status: str) -> None:
        """Close the run; waits until everything is sent, or W&B's own retries end."""
        if self._run is not None:
            self._run.finish(exit_code=1 if status == "failed" else 0)
            self._run = None


class MLFlowLogger(Logger):
    """Log to the MLflow server of `MLFLOW_TRACKING_URI`, without one to ``<run>/mlruns``.

    A resumed run continues the run whose id is in ``mlflow_run_id.txt``.
    """

    def __init__(
        self, *, experiment: Optional[str] = None, tracking_uri: Optional[str] = None
    ) -> None:
        _require("mlflow")
        self.experiment = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        self.tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        self._client: Any = None
        self._run_id = ""
        self._backlog = _Backlog("MLflow")

    def setup(self, folder: Path, first_step: int) -> None:
        """Open the run, or continue that of the folder."""
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        uri = self.tracking_uri
        if not uri:
            # MLflow 3 wants a database, which mlflow-skinny does not have.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = (folder / "mlruns").resolve().as_uri()
        file = folder / "mlflow_run_id.txt"
        try:
            client = MlflowClient(uri)
            run_id = _id_in(file)
            if run_id is None:
                experiment = _experiment(client, self.experiment)
                run_id = client.create_run(experiment, run_name=folder.resolve().name).info.run_id
            else:
                client.update_run(run_id, status="RUNNING")
        except MlflowException as error:
            advice = f"correct the tracking URI, {uri}, or start its server"
            _unavailable("MLflow", error, advice, first_step)
            return
        _keep_id(file, run_id)
        self._client, self._run_id = client, run_id
        config = folder / "config.yaml"
        if config.exists():
            self._backlog.add(lambda: client.log_artifact(run_id, str(config)))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Log the settings that differ from the defaults; MLflow never changes one."""
        changed = changed_settings(params)
        if self._client is not None:
            self._backlog.add(lambda: self._send_params(changed))

    def _send_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        known = self._client.get_run(self._run_id).data.params
        new = [Param(key, str(value)) for key, value in params.items() if key not in known]
        for first in range(0, len(new), 100):  # the most of one call
            self._client.log_batch(self._run_id, params=new[first : first + 100])
        for key, value in params.items():
            if known.get(key, str(value)) != str(value):
                self._client.set_tag(self._run_id, f"resumed with {key}", str(value))

    def log_metrics(self, metrics: Scalars, step: int) -> None:
        """Log the defined values."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now_ms = int(1000 * time.time())
        values = [
            Metric(tag, float(value), now_ms, step)
            for tag, value in metrics.items()
            if value is not None
        ]
        if values:
            self._backlog.add(lambda: self._client.log_batch(self._run_id, metrics=values))

    def log_figures(self, figures: Figures, step: int) -> None:
        """Log figures as artifacts, ``val/roc/step_000042.png``."""
        if self._client is None:
            return
        for tag, figure in figures.items():
            self._backlog.add(partial(self._send_image, f"{tag}/step_{step:06d}.png", _png(figure)))

    def _send_image(self, name: str, png: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / Path(name).name
            path.write_bytes(png)
            self._client.log_artifact(self._run_id, str(path), str(Path(name).parent))

    def finalize(self, status: str) -> None:
        """Close the run; waits until everything is sent, or MLflow's own retries end."""
        if self._client is not None:
            end = {"success": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED")
            self._backlog.add(lambda: self._client.set_terminated(self._run_id, end))
            self._backlog.close()
            self._client = None


def _experiment(client: Any, name: str) -> str:
    """Return the id of an experiment, which is created if missing."""
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another run has just created it
            if found is None:
                raise
    return str(found.experiment_id)


class _Backlog:
    """Makes the calls to a server in their order and in a thread, so that training never waits.

    A call that fails is kept and made once more with the next one, for a network that comes back;
    a call that the server refuses is dropped. Both are warned of once.
    """

    def __init__(self, server: str) -> None:
        self.server = server
        self._calls: Deque[Callable[[], object]] = deque()
        self._thread: Optional[ThreadPoolExecutor] = None
        self._sending: Optional[Future[None]] = None
        self._has_warned = False

    def add(self, call: Callable[[], object]) -> None:
        """Make a call soon."""
        self._calls.append(call)
        if self._sending is None or self._sending.done():
            self._report()
            self._start()

    def close(self) -> None:
        """Make the calls that are left, wait for them, and be as new for another run."""
        if self._sending is None or self._thread is None:
            return
        wait([self._sending])
        if self._calls:
            self._start()
            wait([self._sending])
        self._thread.shutdown()
        if self._calls:
            text = "%s: %d calls failed to the end of the run; their numbers are in metrics.jsonl"
            logger.warning(text, self.server, len(self._calls))
        self._calls.clear()
        self._thread = self._sending = None
        self._has_warned = False

    def _start(self) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix=self.server)
        self._sending = self._thread.submit(self._send)

    def _send(self) -> None:
        from mlflow.exceptions import MlflowException

        while self._calls:
            try:
                self._calls[0]()
            except MlflowException as error:
                reply: Any = error
                if reply.get_http_status_code() >= 500:  # also if there was no answer at all
                    raise
                self._warn(f"refused: {error}")
            self._calls.popleft()

    def _report(self) -> None:
        error = None if self._sending is None else self._sending.exception()
        if error is not None:
            self._warn(f"{error}; trying again with the next numbers")

    def _warn(self, text: str) -> None:
        if not self._has_warned:
            logger.warning("%s: %s", self.server, text)
        self._has_warned = True


def _require(package: str) -> None:
    spec = find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name here is no package
        raise ConfigError(
            f'loggers: {package} is not installed. Install it, pip install "cxr-vit[loggers]", or'
            f" take {package} out of loggers."
        )


def _unavailable(service: str, error: Exception, advice: str, first_step: int) -> None:
    """Raise ConfigError in a new run; a resumed run trains on without the service."""
    reason = str(error).strip().split("\n")[0]  # what follows is advice on their Python API
    text = f"{service} cannot be used: {reason.rstrip('.')}."
    if not first_step:
        raise ConfigError(f"{text} Either {advice}, or take it out of loggers.") from error
    logger.warning("%s The resumed run logs nothing there.", text)


def _keep_id(file: Path, run_id: str) -> None:
    try:
        write_text(file, f"{run_id}\n")
    except OSError as error:
        text = "%s cannot be written (%s): a resumed run begins another run there."
        logger.warning(text, file, error.strerror or error)


def _id_in(file: Path) -> Optional[str]:
    try:
        text = read_bytes(file, limit=200).decode().strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        text = ""
    if not _RUN_ID.fullmatch(text):
        logger.warning("%s holds no id of a run: another run begins there.", file)
        return None
    return text


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


#: Name in a configuration -> logger.
BUILT_IN: Dict[str, Type[Logger]] = {
    "tensorboard": TensorBoardLogger,
    "jsonl": JsonlLogger,
    "csv": CsvLogger,
    "wandb": WandbLogger,
    "mlflow": MLFlowLogger,
}
