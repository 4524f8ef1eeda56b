"""Shared fixtures: a small synthetic data set and the configuration of a short run."""

import gc
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterator, List, Optional

import pytest

from cxr_vit.config import BatchPlan, Config, load_config
from cxr_vit.engines.processes import Launch

if TYPE_CHECKING:
    from cxr_vit.engines.base import Engine
    from cxr_vit.model.module import ViTModule

# Tests start several processes, which would compete with torch's threads for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests must not download from the hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# No test loses power. In this process a flush to the disk, which takes milliseconds and of which a
# run makes 25, only checks that the file is open; the processes that tests start do flush.
os.fsync = os.fstat

ROOT = Path(__file__).resolve().parents[1]
# `processes` starts and watches processes.
sys.path.append(str(ROOT / "tests" / "engines"))

#: Overrides for a run that takes a moment on one core.
SMALL = (
    "model.name=vit-micro",
    "model.patch_size=8",
    "data.image_size=32",
    "data.val_fraction=0.2",
    "pipeline.layers_per_stage=[1, 1, 1, 1]",
    "batch.micro_batch_size=4",
    "batch.gradient_accumulation=2",
    "batch.eval_micro_batch_size=8",
    "train.steps=6",
    "train.log_every_steps=2",
    "train.eval_every_steps=3",
    "train.checkpoint_every_steps=3",
    "engine.device=cpu",
    "engine.precision=fp32",
)

#: Overrides for a run that others read: neither processes that decode nor figures of the training.
QUICK = ("data.cache_workers=1", "loggers=[jsonl]")


def module_of(config: Config, data: Any = None, *, for_ipu: bool = False) -> "ViTModule":
    """Return a module that is set up."""
    from cxr_vit.model.module import ViTModule

    module = ViTModule(config, data)
    module.setup(for_ipu=for_ipu)
    return module


def engine_of(config: Config, module: Any, launch: Optional[Launch] = None) -> "Engine":
    """Build the engine that the configuration chooses, as train.py does."""
    from cxr_vit.engines.choice import build_engine, choose_engine

    launch = launch or Launch()
    choice = choose_engine(config, launch)
    return build_engine(config, module, choice, BatchPlan.from_section(config.batch), launch)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser without a window, tests/browser.py."""
    from browser import CHROMIUM, NO_BROWSER, Browser

    if CHROMIUM is None:
        pytest.skip(NO_BROWSER)
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture(autouse=True)
def log_level() -> Iterator[None]:
    """Restore the package's log level, which the command lines set."""
    logger = logging.getLogger("cxr_vit")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.fixture(scope="session")
def repository() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set in NIH's layout: 80 images of 32 pixels."""
    from cxr_vit.data.synthetic.dataset import write_sample

    root = tmp_path_factory.mktemp("data") / "sample"
    write_sample(root, num_images=80, image_size=32, seed=0)
    return root


@pytest.fixture
def small_overrides(sample_root: Path) -> List[str]:
    """Overrides for a run of six steps on the synthetic data set."""
    return [*SMALL, f"data.root={sample_root}"]


@pytest.fixture
def make_config(small_overrides: List[str]) -> Callable[..., Config]:
    """Make a small configuration with more overrides on top."""

    def make(*overrides: str) -> Config:
        return load_config([], [*small_overrides, *overrides])

    return make


@pytest.fixture
def make(make_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Any]:
    """Make a run of six steps with given validation scores; its folder is called `folder`."""
    from runs import Run

    def make(
        *overrides: str,
        scores: Any = (),
        callbacks: Any = (),
        loggers: Any = (),
        folder: str = "run",
    ) -> Any:
        config = make_config(f"run.dir={tmp_path / folder}", *overrides)
        return Run(config, scores, callbacks, loggers)

    return make


#: Files that take half a minute or more, the slowest first.
SLOW_FILES = (
    "tests/engines/ipu/test_state.py",
    "tests/engines/ipu/test_equivalence.py",
    "tests/engines/processes/test_failures.py",
    "tests/engines/processes/test_resume.py",
    "tests/engines/processes/test_equivalence.py",
    "tests/test_docs_run.py",
    "tests/test_package.py",
    "tests/test_notebook.py",
    "tests/engines/ipu/test_graphs.py",
    "tests/engines/ipu/test_processes.py",
    "tests/engines/test_compiled.py",
    "tests/training/test_saving.py",
    "tests/test_other_data.py",
    "tests/engines/ipu/test_first_run.py",
    "tests/faults/test_no_sockets.py",
    "tests/engines/processes/test_planned_bubble.py",
    "tests/test_commands.py",
    "tests/faults/test_kills.py",
    "tests/test_api.py",
    "tests/data/test_prepare.py",
    "tests/engines/test_base.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Start the slow files first; xdist starts those with the most tests first.

    Otherwise one worker is idle at the end while the other works on a slow file.
    """
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class SlowFilesFirst(LoadFileScheduling):
        def _assign_work_unit(self, node: Any) -> None:
            slow = next((file for file in SLOW_FILES if file in self.workqueue), None)
            if slow is not None:
                self.workqueue.move_to_end(slow, last=False)
            super()._assign_work_unit(node)

    return SlowFilesFirst(config, log)


#: Text and arithmetic, which depend neither on Python nor on torch; and the pages and the notebook,
#: which are written for a current Python.
ONE_ENVIRONMENT = (
    "tests/planner/test_search.py",
    "tests/test_architecture.py",
    "tests/test_docs.py",
    "tests/test_docs_run.py",
    "tests/test_language.py",
    "tests/test_notebook.py",
)


def leave_to_newer_python(items: List[pytest.Item]) -> None:
    """On Python 3.8 run them only with what is exhaustive."""
    if sys.version_info >= (3, 9):
        return
    files = {ROOT / file for file in ONE_ENVIRONMENT}
    for item in items:
        if item.path in files:
            item.add_marker(pytest.mark.exhaustive)


def pytest_collection_finish() -> None:
    """Keep what the tests have imported from every garbage collection, which would take long."""
    gc.collect()
    gc.freeze()


# make test-frontend: what runs on PopTorch's real front end


def is_on_front_end(item: pytest.Item) -> bool:
    """Whether a test's name, parameters or fixtures say that it uses the front end."""
    words = [item.nodeid, *getattr(item, "fixturenames", ())]
    return any("front end" in word or "front_end" in word for word in words)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--front-end",
        action="store_true",
        help="run the tests of the stand-in and what uses PopTorch's real front end, and fail if"
        " nothing ran on the latter",
    )


def pytest_configure(config: pytest.Config) -> None:
    from fakes import loading

    reason = loading.available() if config.getoption("front_end") else None
    if reason:
        raise pytest.UsageError(f"--front-end: {reason}. See docs/ipu.md, section 12.")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(config: pytest.Config, items: List[pytest.Item]) -> None:
    """Leave out what runs elsewhere, and what --front-end is not about."""
    leave_to_newer_python(items)
    if not config.getoption("front_end"):
        return
    folders = (ROOT / "tests" / "engines" / "ipu", ROOT / "tests" / "fakes")
    left_out = [
        item
        for item in items
        if not is_on_front_end(item) and not any(folder in item.path.parents for folder in folders)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if is_on_front_end(item):
        item.user_properties.append(("front end", True))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Tell how many tests ran on the front end, and how many were skipped and why."""
    if not config.getoption("front_end"):
        return
    from fakes import loading

    write, stats = terminalreporter.write_line, terminalreporter.stats
    passed, failed = (len(_on_front_end(stats, outcome)) for outcome in ("passed", "failed"))
    skipped = Counter(str(report.longrepr[2]) for report in stats.get("skipped", ()))
    terminalreporter.section("PopTorch's real front end")
    write(f"{passed + failed} tests ran on it, and {failed} of them failed")
    write(f"{sum(skipped.values())} tests were skipped")
    for reason, number in skipped.items():
        write(f"  {number}: {reason}")
    write(f"It does not show: {', '.join(loading.GAPS)}")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if nothing ran on the front end."""
    terminal = session.config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or not session.config.getoption("front_end"):
        return
    if not any(_on_front_end(terminal.stats, outcome) for outcome in ("passed", "failed")):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _on_front_end(stats: Dict[str, List[Any]], outcome: str) -> List[Any]:
    """Return the reports of tests with an outcome that used the front end."""
    return [
        report for report in stats.get(outcome, ()) if dict(report.user_properties).get("front end")
    ]
