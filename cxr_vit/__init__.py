"""Fine-tune Vision Transformers on chest X-rays, on Graphcore IPUs, CPUs and GPUs.

The public names are below. Each is imported at its first use, so that `import cxr_vit` imports no
torch, and `--help` and a configuration error answer at once.
"""

import importlib
from typing import TYPE_CHECKING, Any, List

from cxr_vit.version import __version__

if TYPE_CHECKING:
    from cxr_vit.config import Config, load_config
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.data.dataset import Batch
    from cxr_vit.engines.base import Engine
    from cxr_vit.engines.ipu.engine import PopTorchEngine
    from cxr_vit.engines.pipeline_engine import PipelineEngine  # noqa: F401
    from cxr_vit.engines.torch_engine import TorchEngine
    from cxr_vit.errors import CxrVitError
    from cxr_vit.evaluation.metrics import evaluate, probabilities
    from cxr_vit.model.module import ViTModule
    from cxr_vit.training.callback import Callback, TrainOutputs
    from cxr_vit.training.callbacks import EarlyStopping
    from cxr_vit.training.loggers import (
        CsvLogger,
        JsonlLogger,
        Logger,
        MLFlowLogger,
        TensorBoardLogger,
        WandbLogger,
    )
    from cxr_vit.training.trainer import Trainer

#: Public name -> the module that defines it.
_MODULES = {
    "Config": "config",
    "load_config": "config",
    "ChestXrayDataModule": "data.datamodule",
    "Batch": "data.dataset",
    "evaluate": "evaluation.metrics",
    "probabilities": "evaluation.metrics",
    "ViTModule": "model.module",
    "Engine": "engines.base",
    "TorchEngine": "engines.torch_engine",
    "PipelineEngine": "engines.pipeline_engine",
    "PopTorchEngine": "engines.ipu.engine",
    "Trainer": "training.trainer",
    "Callback": "training.callback",
    "TrainOutputs": "training.callback",
    "EarlyStopping": "training.callbacks",
    "Logger": "training.loggers",
    "TensorBoardLogger": "training.loggers",
    "JsonlLogger": "training.loggers",
    "CsvLogger": "training.loggers",
    "WandbLogger": "training.loggers",
    "MLFlowLogger": "training.loggers",
    "CxrVitError": "errors",
}

#: Without PipelineEngine: `from cxr_vit import *` works with every torch.
__all__ = [
    "Batch",
    "Callback",
    "ChestXrayDataModule",
    "Config",
    "CsvLogger",
    "CxrVitError",
    "EarlyStopping",
    "Engine",
    "JsonlLogger",
    "Logger",
    "MLFlowLogger",
    "PopTorchEngine",
    "TensorBoardLogger",
    "TorchEngine",
    "TrainOutputs",
    "Trainer",
    "ViTModule",
    "WandbLogger",
    "__version__",
    "evaluate",
    "load_config",
    "probabilities",
]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name == "PipelineEngine":
        _check_pipelining()
    if name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value
    from cxr_vit.errors import suggestion

    near = suggestion(name, _MODULES)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{near}")


def _check_pipelining() -> None:
    from cxr_vit.engines.choice import check_pipelining
    from cxr_vit.errors import EngineUnavailable

    try:
        check_pipelining("cxr_vit.PipelineEngine")
    except EngineUnavailable as error:
        raise ImportError(str(error)) from error


def __dir__() -> List[str]:
    return sorted({*globals(), *_MODULES})
