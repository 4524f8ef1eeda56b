"""What `predict` does with an open model: a row for each image, up to the end or a signal."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sys
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Generator,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

from cxr_vit.cli import EXIT_INTERRUPTED, EXIT_PARTIAL, EXIT_STOPPED
from cxr_vit.commands.checkpoint_predictor import Opened
from cxr_vit.commands.predict_arguments import PredictArguments, options_of
from cxr_vit.commands.saliency_pictures import saliency_pictures
from cxr_vit.console import progress
from cxr_vit.errors import DataError
from cxr_vit.prediction.decoding import chunks_of, in_order
from cxr_vit.prediction.outputs import OutputFile, SeenImages, open_output
from cxr_vit.prediction.rows import CsvRows, Decider, JsonRows, Row, TableRows, plain_path
from cxr_vit.prediction.run import Predicted, Watcher, count_images, predict
from cxr_vit.training.run_folder import package_versions
from cxr_vit.training.signals import StopOnSignal

logger = logging.getLogger(__name__)

#: Names of labels in a message.
_SHOWN = 20


class PredictRun:
    """The images of a call, which of them are done, and where rows go.

    `target` is where rows are printed without `arguments.out`.
    """

    def __init__(
        self, opened: Opened, inputs: Sequence[str], arguments: PredictArguments, target: Any
    ) -> None:
        self.opened, self.inputs, self.arguments = opened, inputs, arguments
        self._target = target
        facts = opened.predictor.facts
        self.decider = Decider.of(facts.labels, facts.points, arguments.operating_point)
        self._rows = self._rows_of(arguments.format)
        self._stop_reason: Optional[str] = None
        self._first_unread: Optional[Row] = None
        self._watchers: Dict[str, Watcher] = {}
        self._lost_pictures = False

    def _rows_of(self, format: str) -> Union[CsvRows, JsonRows, TableRows]:
        if format == "csv":
            return CsvRows(self.decider, self.arguments.keep_tags)
        return (JsonRows if format == "jsonl" else TableRows)(self.decider)

    def run(self, watchers: Mapping[str, Watcher]) -> int:
        """Predict the images that are not done; return the exit status.

        The main process calls the watchers, by their option, with each chunk before it writes the
        rows. One that fails is called no more: rows are not to be lost for a picture.
        """
        self._refuse_other_inputs()
        self._say_never_found()
        self._watchers = dict(watchers)
        with self._output() as (write, done):
            # The main process decides: scoring takes all of them.
            errors = self.opened.once("done", lambda: self._done(done))
            is_done = [error is not None for error in errors]
            unread = errors.count(True)
            chunks = self._chunks(is_done)
            stopping = StopOnSignal(self._stop, quiet=not self.opened.is_alone)
            with stopping, contextlib.closing(chunks):
                for predicted in chunks:
                    if self.opened.is_main:
                        for option in list(self._watchers):
                            self._watch(option, predicted)
                    rows = enumerate(predicted.rows, predicted.first)
                    new = [row for number, row in rows if not is_done[number]]
                    write([self._rows.line(row) for row in new])
                    end = predicted.first + len(predicted.rows)
                    is_done[predicted.first : end] = [True] * len(predicted.rows)
                    failed = [row for row in new if row.error is not None]
                    unread += len(failed)
                    self._first_unread = self._first_unread or next(iter(failed), None)
                    if self.opened.any_process(self._stop_reason is not None):
                        break
        return self._end(is_done, unread)

    def _watch(self, option: str, predicted: Predicted) -> None:
        try:
            self._watchers[option](predicted)
        except Exception as error:
            logger.warning("%s: no more pictures, only rows: %s", option, error)
            del self._watchers[option]
            self._lost_pictures = True

    def _refuse_other_inputs(self) -> None:
        """Raise DataError if this process found other images than the main one."""
        own = hashlib.sha256("\0".join(map(plain_path, self.inputs)).encode()).hexdigest()
        if self.opened.once("inputs", lambda: own) != own:
            raise DataError(
                "this host has other images than that of the first process. Give all hosts the same"
                " files."
            )

    def _say_never_found(self) -> None:
        """Warn of labels whose absence from the findings says nothing of an image."""
        names = self.decider.never_found()
        if self.decider.thresholds and names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            text = "no threshold for %s%s: never a finding, whatever the probability is"
            logger.warning(text, ", ".join(names[:_SHOWN]), more)

    def _stop(self, reason: str) -> None:
        self._stop_reason = reason

    def _chunks(self, is_done: Sequence[bool]) -> Generator[Predicted, None, None]:
        """Yield the chunks that are not done, and show progress."""
        predictor, workers = self.opened.predictor, self.opened.workers
        chunks = chunks_of(self.inputs, predictor.chunk, is_done)
        keep = self.arguments.keep_tags
        decoded = in_order(chunks, predictor.facts.settings, keep=keep, workers=workers)
        left = sum(len(chunk.paths) for chunk in chunks)
        with contextlib.closing(decoded), self._progress(len(self.inputs) - left) as advance:
            for predicted in predict(predictor, self.decider, decoded):
                yield predicted
                advance(len(predicted.rows))

    @contextlib.contextmanager
    def _progress(self, done: int) -> Iterator[Callable[[int], Any]]:
        # A bar would be drawn over the rows of a terminal.
        is_hidden = self.arguments.out is None and self._target is not None
        if not self.opened.is_main or (is_hidden and self._target.isatty()):
            yield lambda images: None
            return
        with progress("predicting", done=done, total=len(self.inputs)) as advance:
            yield advance

    @contextlib.contextmanager
    def _output(self) -> Iterator[Tuple[Callable[[List[str]], None], Optional[OutputFile]]]:
        """Yield what writes lines, and the file that has rows already if there is one."""
        out, rows = self.arguments.out, self._rows
        if not self.opened.is_main:
            yield lambda lines: None, None
        elif out is None or isinstance(rows, TableRows):
            self._print([rows.header])
            yield self._print, None
        else:
            facts = {
                "model": self.opened.predictor.facts.identity,
                "options": options_of(self.arguments),
                "columns": list(rows.columns),
                "versions": package_versions(),
            }
            with open_output(out, rows, facts, resumes=self.arguments.resume) as file:
                yield file.write, file

    def _print(self, lines: Sequence[str]) -> None:
        self._target.write("".join(lines))
        self._target.flush()

    def _done(self, file: Optional[OutputFile]) -> List[Optional[bool]]:
        """Return of each image whether its row has an error, None if it has no row."""
        rows = {} if file is None else {done.image: done.has_error for done in file.done}
        return [rows.get(plain_path(path)) for path in self.inputs]

    def _end(self, is_done: Sequence[bool], unread: int) -> int:
        done = sum(is_done)
        text = count_images(done, unread)
        if self.opened.is_main:
            is_apart = self.arguments.format == "table" or self.arguments.out is not None
            first = self._first_unread
            if first is not None and self.arguments.out is not None:
                text += f"; the first is {first.image}: {first.error}"  # its row is in a file
            print(text, file=self._target if is_apart else sys.stderr, flush=True)
        if done < len(is_done):
            reason = self._stop_reason or "another process was stopped"
            resume = ", and --resume continues" if self.arguments.out else ""
            logger.warning(
                "stopped (%s): %d images are left%s", reason, len(is_done) - done, resume
            )
            return EXIT_INTERRUPTED if reason.startswith("SIGINT") else EXIT_STOPPED
        # torchrun takes another status of any other process for a failure.
        is_partial = unread > 0 or self._lost_pictures
        return EXIT_PARTIAL if is_partial and self.opened.is_main else 0


def watchers_of(arguments: PredictArguments, opened: Opened) -> Dict[str, Watcher]:
    """Return, by option, what is called with each chunk of images, in the main process."""
    watchers: Dict[str, Watcher] = {}
    if arguments.preprocess_check is not None and opened.is_main:
        folder = arguments.preprocess_check
        watchers[f"--preprocess-check {folder}"] = _preprocess_check(
            folder, opened, resumes=arguments.resume
        )
    if arguments.saliency is not None and opened.is_main:
        watchers[f"--saliency {arguments.saliency}"] = saliency_pictures(
            arguments.saliency,
            opened,
            method=arguments.saliency_method,
            findings=arguments.findings,
            resumes=arguments.resume,
        )
    return watchers


def _preprocess_check(folder: Path, opened: Opened, *, resumes: bool) -> Watcher:
    """Return what writes the part of each image that the model sees."""
    seen = SeenImages(folder, opened.predictor.facts.image_size)
    seen.make(resumes=resumes)

    def write(predicted: Predicted) -> None:
        images = zip(predicted.paths, predicted.pixels, predicted.usable)
        for number, (path, pixels, is_usable) in enumerate(images, predicted.first):
            if is_usable:
                seen.write(number, path, pixels)

    return write
