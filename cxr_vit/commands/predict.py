"""The command `predict`: probabilities of image files.

python -m cxr_vit predict runs/<name> folder image.png study.dcm list.csv [--out FILE]
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

from cxr_vit.checkpoint_files import checkpoint_of, verify_checkpoint
from cxr_vit.cli import importing
from cxr_vit.commands.predict_arguments import PredictArguments, predict_arguments
from cxr_vit.config import load_config
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError
from cxr_vit.training.run_folder import config_of_checkpoint

#: The override that an exported model takes: processes that decode.
_OF_READING = "data.cache_workers="


def predict(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    arguments = predict_arguments(argv)
    launch = Launch.from_environment()
    # Standard output has the rows and nothing else.
    own = contextlib.redirect_stdout(sys.stderr) if launch.is_main else contextlib.nullcontext()
    target = sys.stdout
    with contextlib.ExitStack() as stack:
        stack.enter_context(own)
        opening = _opening(arguments, launch)

        with importing():
            from cxr_vit.commands.predict_run import PredictRun, watchers_of
            from cxr_vit.data.dicom_header import check_keywords
            from cxr_vit.prediction.inputs import find_inputs
            from cxr_vit.prediction.outputs import refuse_existing

        check_keywords(arguments.keep_tags)
        if arguments.out is not None and launch.is_main:
            refuse_existing(arguments.out, resumes=arguments.resume)
        inputs = find_inputs(arguments.paths)
        opened = stack.enter_context(opening())
        run = PredictRun(opened, inputs, arguments, target)
        return run.run(watchers_of(arguments, opened))


def _opening(arguments: PredictArguments, launch: Launch) -> Callable[[], Any]:
    """Check the checkpoint; return what opens it."""
    path = arguments.checkpoint
    exported = path if path.suffix == ".onnx" else path / "model.onnx"
    if exported.is_file() and not (path / "trainer_state.json").exists():
        return lambda: _open_exported(exported, arguments, launch)
    checkpoint = checkpoint_of(path)
    state = verify_checkpoint(checkpoint, needs_optimizer=False)
    config = config_of_checkpoint(checkpoint, arguments.overrides)

    def open_it() -> Any:
        from cxr_vit.commands.checkpoint_predictor import open_checkpoint

        return open_checkpoint(checkpoint, state, config)

    return open_it


@contextlib.contextmanager
def _open_exported(path: Path, arguments: PredictArguments, launch: Launch) -> Iterator[Any]:
    """Open an exported model, which has no configuration and runs in one process."""
    if arguments.saliency is not None:
        raise ConfigError(f"--saliency needs gradients, and {path} has none. Give the checkpoint.")
    from cxr_vit.commands.checkpoint_predictor import Opened
    from cxr_vit.prediction.onnx_model import open_onnx

    for override in arguments.overrides:
        if not override.startswith(_OF_READING):
            raise ConfigError(f"{override} has no effect on {path}. Leave it out.")
    if launch.has_others:
        raise ConfigError(f"{path} runs in one process. Start the command without a launcher.")
    workers = load_config([], arguments.overrides).data.cache_workers
    yield Opened(open_onnx(path), workers=workers)
