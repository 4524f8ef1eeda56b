"""The checks of `selftest`: files of the package, and what they give where it was measured."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np
from packaging.version import Version

from cxr_vit.checkpoint_files import CONFIG, sha256
from cxr_vit.commands.installation import has_poptorch
from cxr_vit.config import BatchPlan, Config, dump_config, load_config
from cxr_vit.config.files import packaged_configs
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import EngineUnavailable

if TYPE_CHECKING:
    from torch import Tensor

    from cxr_vit.data.dataset import Batch
    from cxr_vit.engines.base import Engine, EngineState

#: Made by tests/selftest_files.py. The last one has the hashes of the others.
FOLDER = Path(__file__).resolve().parents[1] / "selftest"
CHECKPOINT, EXPECTED, HASHES = "checkpoint", "expected.json", "sha256.json"

#: Precision -> largest difference of a logit or a loss from what was computed in fp32 on a CPU. The
#: logits are 2 to 4; a unit in the last place of bf16 and fp16 is 1/64 and 1/512 there.
TOLERANCES = {"fp32": 1e-5, "bf16": 0.1, "fp16": 0.02}
#: An IPU has other exponentials and sums. Not measured; the two forms of GELU differ by 2.5e-4.
_IPU_FP32 = 1e-4
#: Numbers of stages that `pipeline` has, one for each process.
_PIPELINE = 2
_UPDATES, _LEARNING_RATE = 3, 1e-3
_TANH = "gelu_pytorch_tanh"

_IMAGES = "Install kornia-rs and pillow in the versions that are listed as needed."
_DICOM = 'Install the decoders: pip install "cxr-vit[dicom]".'
_ONNX = 'Install onnx and onnxruntime as listed: pip install "cxr-vit[export]".'
_FILES = "Install the package again: files of it are missing, or have changed."
_NUMBERS = (
    "Install torch and transformers in the versions that are listed as needed; if they are, report"
    " it with this output."
)
_DEVICE = (
    "Compare with engine.device=cpu; update the driver, or install the build of torch that is made"
    " for it."
)
_DISK = "Look at the free space and the file system of the temporary folder (TMPDIR)."


class Result(NamedTuple):
    """What a check found.

    `status` is ``"ok"``, ``"differs"``, ``"fails"`` (with an error) or ``"skipped"``; `advice` is
    empty where the text says what to do.
    """

    status: str
    text: str
    advice: str = ""


class Check(NamedTuple):
    """A check, and what to do if it does not pass.

    An optional one is skipped where its engine is not there.
    """

    name: str
    function: Callable[[], Result]
    advice: str
    is_optional: bool = False

    def run(self) -> Result:
        """Return the result; any error becomes one."""
        try:
            result = self.function()
        except EngineUnavailable as error:  # says itself what to do
            text = " ".join(str(error).split())
            skipped = Result("skipped", text.partition(". ")[0])
            return skipped if self.is_optional else Result("fails", text)
        except Exception as error:  # a broken library may raise anything
            first = str(error).strip().split("\n")[0]
            result = Result("fails", f"{type(error).__name__}: {first}")
        return result._replace(advice=self.advice)


class Environment(NamedTuple):
    """What was computed with a version of torch and one of transformers, in fp32 on a CPU.

    Attributes
    ----------
    logits
        Activation of the MLP -> logits ``[4, C]``. An IPU computes GELU in its tanh form only.
    losses
        Losses of the first updates of a training.
    """

    versions: List[str]
    logits: Dict[str, List[List[float]]]
    losses: List[float]

    def order(self) -> Version:
        """Return a key that sorts by the version of torch."""
        return Version(self.versions[0])


def read_environments() -> List[Environment]:
    """Return the environments with expectations, the oldest torch first."""
    text = (FOLDER / EXPECTED).read_text(encoding="utf-8")
    return [Environment(**one) for one in json.loads(text)]


def installed_versions() -> List[str]:
    """Return the versions of torch, without its build, and of transformers."""
    modules = map(importlib.import_module, ("torch", "transformers"))
    return [str(module.__version__).partition("+")[0] for module in modules]


def nearest(environments: Sequence[Environment], versions: Sequence[str]) -> Environment:
    """Return the environment of these versions, else the newest that is not newer, else the first.

    `environments` are sorted by the version of torch.
    """
    older = [one for one in environments if one.order() <= Version(versions[0])]
    exact = [one for one in environments if one.versions == list(versions)]
    return [*exact, *reversed(older), *environments][0]


def file_check() -> Check:
    """Return the check of the files, without which no other one says what is wrong."""
    return Check("files", _files, _FILES)


def checks(expected: Environment, engines: Sequence[str]) -> Iterator[Check]:
    """Yield the checks in the order of what depends on what; `engines` may be empty, for all."""
    yield Check("PNG", partial(_image, "image.png", "decoded"), _IMAGES)
    yield Check("resized PNG", partial(_image, "image.png", "resized"), _IMAGES)
    for name, file in (("DICOM", "image.dcm"), ("DICOM, JPEG 2000", "image_jpeg2000.dcm")):
        image = partial(_image, file, "decoded")
        yield Check(name, partial(_with_extra, "dicom", ["pydicom"], image), _DICOM)
    yield Check("configurations", _configurations, _FILES)
    yield Check("checkpoint", _checkpoint, _NUMBERS)
    yield from _forward_passes(expected, engines)
    if not engines:
        onnx = partial(_onnx, expected)
        yield Check("ONNX", partial(_with_extra, "export", ["onnx", "onnxruntime"], onnx), _ONNX)
    if not engines or "torch" in engines:
        yield Check("training", partial(_training, expected), _NUMBERS)
        yield Check("saved checkpoint", _saved_checkpoint, _DISK)


def _with_extra(extra: str, modules: Sequence[str], function: Callable[[], Result]) -> Result:
    """Skip a check if a library of an extra is not installed; with a broken one it fails."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        return Result("skipped", f"without {' and '.join(missing)} (extra {extra})")
    return function()


# Images


def _image(name: str, key: str) -> Result:
    from cxr_vit.data.images import read_gray

    with np.load(FOLDER / "pixels.npz", allow_pickle=False) as pixels:
        expected = pixels[key]
    found = read_gray(FOLDER / name, len(expected))
    difference = np.abs(found.astype(int) - expected)
    size = f"{len(expected)} x {len(expected)} pixels"
    if not difference.any():
        return Result("ok", f"{size} are equal")
    row, column = np.unravel_index(difference.argmax(), difference.shape)
    return Result(
        "differs",
        f"{np.count_nonzero(difference)} of {size}, by {difference.max()} at most: row {row},"
        f" column {column} is {found[row, column]}, expected {expected[row, column]}",
    )


# Files


def _files() -> Result:
    hashes = json.loads((FOLDER / HASHES).read_text(encoding="utf-8"))
    missing = [name for name in hashes if not (FOLDER / name).is_file()]
    there = [name for name in hashes if name not in missing]
    changed = [name for name in there if sha256(FOLDER / name) != hashes[name]]
    if not missing and not changed:
        return Result("ok", f"{len(hashes)} are as they were made")
    named = {"missing": missing, "changed": changed}
    text = "; ".join(f"{what}: {', '.join(names)}" for what, names in named.items() if names)
    return Result("differs", f"in {FOLDER}, {text}")


def _configurations() -> Result:
    named = packaged_configs()
    if not named:
        return Result("differs", "the package has none")
    for name, path in named.items():
        is_part = name.startswith("data/") or name == "recipes/pod4"
        load_config([Path("vit_pod4"), path] if is_part else [path])
    return Result("ok", f"{len(named)} load")


def _checkpoint() -> Result:
    with _engine(_config("torch")) as engine:
        count = sum(weight.numel() for weight in engine.module.model.weights().values())
    return Result("ok", f"{count} weights are loaded")


def _saved_checkpoint() -> Result:
    import torch

    from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint

    config, batch = _trained(_config("torch")), images()
    with tempfile.TemporaryDirectory() as scratch, _engine(config) as engine:
        engine.train_step(batch, lr=_LEARNING_RATE)
        state, logits = engine.state_dict(), engine.predict(batch)
        files = {**engine.module.model.hub_files(), CONFIG: dump_config(config)}
        folder = CheckpointStore(Path(scratch)).save(1, state, files=files, trainer_state={})
        with _engine(config) as other:
            other.load_state_dict(load_checkpoint(folder)[0])
            loaded, same_logits = other.state_dict(), torch.equal(other.predict(batch), logits)
    saved, found = _tensors(state), _tensors(loaded)
    differing = [name for name, value in saved.items() if not torch.equal(value, found[name])]
    if differing or not same_logits:
        names = ", ".join(differing[:3]) or "the logits"
        return Result("differs", f"{len(differing)} of {len(saved)} tensors: {names}")
    return Result("ok", f"{len(saved)} tensors are equal after saving and loading")


def _tensors(state: EngineState) -> Dict[str, Tensor]:
    slots = state.optimizer.items()
    return {
        **state.weights,
        **{f"{slot} of {name}": value for name, own in slots for slot, value in own.items()},
    }


# Numbers


def images() -> Batch:
    """Return a batch of four: the image, mirrored, upside down, and inverted."""
    import torch

    from cxr_vit.data.dataset import Batch
    from cxr_vit.data.labels import FINDINGS

    with np.load(FOLDER / "pixels.npz", allow_pickle=False) as pixels:
        image = pixels["resized"]
    four = np.stack([image, image[:, ::-1], image[::-1], 255 - image])[:, None]
    labels = torch.eye(len(FINDINGS))[:4]
    return Batch(torch.from_numpy(four.copy()), labels, torch.arange(4))


@lru_cache(maxsize=None)
def _config_of(checkpoint: Path) -> Config:
    from cxr_vit.training.run_folder import config_of_checkpoint

    return config_of_checkpoint(checkpoint, [])


def _config(engine: str, device: str = "cpu", precision: str = "fp32") -> Config:
    of_device = (
        {"device": "auto", "executable_cache": None} if engine == "poptorch" else {"device": device}
    )
    stages = [1] * _PIPELINE if engine == "pipeline" else [2]
    return _config_of(FOLDER / CHECKPOINT).changed(
        engine={"name": engine, "precision": precision, **of_device},
        pipeline={"layers_per_stage": stages},
    )


def _trained(config: Config) -> Config:
    return config.changed(optim={"name": "adamw", "lr": _LEARNING_RATE})


def _engine(config: Config) -> Engine:
    from cxr_vit.engines.choice import build_engine, choose_engine
    from cxr_vit.model.module import ViTModule

    is_pipeline = config.engine.name == "pipeline"
    launch = Launch.from_environment() if is_pipeline else Launch()
    choice = choose_engine(config, launch)
    module = ViTModule.load_from_checkpoint(FOLDER / CHECKPOINT, config=config)
    module.setup(for_ipu=choice.is_ipu)
    return build_engine(config, module, choice, BatchPlan.from_section(config.batch), launch)


def first_losses() -> List[float]:
    """Return the losses of the first updates."""
    with _engine(_trained(_config("torch"))) as engine:
        steps = [engine.train_step(images(), lr=_LEARNING_RATE) for _ in range(_UPDATES)]
    return [float(step.losses[0]) for step in steps]


def _training(expected: Environment) -> Result:
    return _compare(first_losses(), expected.losses, TOLERANCES["fp32"], "loss")


def _compare(found: Any, expected: Any, tolerance: float, what: str) -> Result:
    """Compare numbers of the same shape."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected)
    difference = np.abs(found - expected)
    # The worst is not a number, if there is one.
    worst = np.unravel_index(difference.argmax(), difference.shape)
    text = f"the largest difference is {difference[worst]:.1g}, and {tolerance:g} is allowed"
    if difference[worst] <= tolerance:
        return Result("ok", text)
    place = ", ".join(map(str, worst))
    return Result(
        "differs", f"{text}: {what} [{place}] is {found[worst]:.6f}, expected {expected[worst]:.6f}"
    )


def _forward_passes(expected: Environment, engines: Sequence[str]) -> Iterator[Check]:
    """Yield a check for each engine, device and precision."""
    for engine, device, precision in _kinds(engines):
        place = {"torch": device.upper(), "pipeline": f"{_PIPELINE} processes"}.get(engine, "IPU")
        yield Check(
            f"{engine} on {place}, {precision}",
            partial(_forward, expected, engine, device, precision),
            _NUMBERS if device == "cpu" else _DEVICE,
            is_optional=engine == "torch" or engine not in engines,  # of torch, the precision
        )


def _kinds(engines: Sequence[str]) -> Iterator[Tuple[str, str, str]]:
    """Yield engine, device and precision."""
    import torch

    if not engines or "torch" in engines:
        devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
        yield from (("torch", device, precision) for device in devices for precision in TOLERANCES)
    if not engines or "pipeline" in engines:
        yield "pipeline", "cpu", "fp32"
    if not engines or "poptorch" in engines:
        precisions = ("fp32", "fp16") if has_poptorch() else ("fp16",)
        yield from (("poptorch", "ipu", precision) for precision in precisions)


def _forward(expected: Environment, name: str, device: str, precision: str) -> Result:
    """Compare the logits. Raises EngineUnavailable if the engine is not there."""
    if name == "pipeline" and Launch.from_environment().world_size != _PIPELINE:
        raise EngineUnavailable(
            f"it needs two processes: torchrun --nproc-per-node {_PIPELINE} -m cxr_vit selftest"
            " --engine pipeline"
        )
    with _engine(_config(name, device, precision)) as engine:
        logits = engine.predict(images())
    is_ipu = name == "poptorch"
    tolerance = _IPU_FP32 if is_ipu and precision == "fp32" else TOLERANCES[precision]
    return _compare(logits, expected.logits[_TANH if is_ipu else "gelu"], tolerance, "logit")


def _onnx(expected: Environment) -> Result:
    """Compare probabilities: 1e-5 of those of the checkpoint is 1e-4 of a logit."""
    from cxr_vit.prediction.onnx_export import onnx_graph
    from cxr_vit.prediction.onnx_model import Session

    with _engine(_config("torch")) as engine:
        content = onnx_graph(engine.module).SerializeToString()
    session = Session(content, Path("model.onnx"), num_labels=len(expected.logits["gelu"][0]))
    found = session.probabilities(images().images.numpy()[:, 0])
    wanted = 1 / (1 + np.exp(-np.asarray(expected.logits["gelu"])))
    return _compare(found, wanted, TOLERANCES["fp32"], "probability")
