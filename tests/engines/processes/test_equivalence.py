"""N processes compute the same as one process.

Two starts, of two and of four processes, run all cases; see worker.py.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, Dict, List, NamedTuple, Tuple

import pytest
import torch

from cxr_vit.config import load_config
from cxr_vit.data.synthetic.dataset import write_sample
from cxr_vit.model.key_names import hub_name
from plain_loop import (
    RECIPES,
    UNKNOWN,
    Result,
    assert_same_result,
    masked_loss,
    plain_loop,
    write_unknown,
)

from .launch import HAS_PIPELINING, finish, fork, needs_pipelining
from .worker import CONFIG, copies, has_gradient, make, measure, pipeline, score

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning"),  # torch.load's, of torch 2.0
]

#: 20 updates of 8 micro-batches of 4 images, each with a clipped gradient. At the demo's own
#: learning rate the results agree too, but rounding errors grow from one update to the next. The
#: test split has 59 images, which no batch size divides.
DEMO = (
    "model.pooling=class",
    "augment.horizontal_flip=0",
    "batch.micro_batch_size=4",
    "batch.gradient_accumulation=8",
    "batch.eval_micro_batch_size=4",
    "batch.eval_device_iterations=3",
    "train.steps=20",
    "optim.lr=3e-4",
    "optim.max_grad_norm=0.08",
    "optim.weight_decay=0.5",
    "engine.device=cpu",
    "engine.precision=fp32",
)
#: Smaller images, where the size does not matter.
SMALL = ("data.image_size=32",)
BF16 = (*SMALL, "engine.precision=bf16", "optim.max_grad_norm=null")
FP16 = (*SMALL, "engine.precision=fp16", "train.steps=8")
DEEP = (
    "model.name=vit-tiny",
    "data.image_size=16",
    "pipeline.layers_per_stage=[1, 2, 1, 2, 1, 2, 1, 2]",
    "train.steps=4",
)
#: Two of five labels are unknown.
MASKED = (*SMALL, *UNKNOWN, "train.steps=3")
#: The embeddings and two of the four layers are frozen; the others have three rates.
RATES = (
    *SMALL,
    "train.steps=3",
    "model.freeze=2",
    "optim.layer_decay=0.65",
    "optim.head_lr_scale=10",
    "optim.max_grad_norm=0.5",
)
PROBE = (*SMALL, "train.steps=3", "model.freeze=trunk", "optim.head_lr_scale=10")
ASYMMETRIC, WEIGHTED = ((*SMALL, *recipe, "train.steps=3") for recipe in RECIPES[:2])
DROPPED = (*SMALL, "train.steps=3", "model.drop_path=0.3")
#: The first of two stages has no weights to train; each call makes three updates.
FROZEN_STAGE = (
    *SMALL,
    *pipeline("1f1b", "[2, 2]"),
    "model.freeze=2",
    "batch.device_iterations=3",
    "train.steps=3",
    "engine.timeout_s=10",
)


class Case(NamedTuple):
    """A computation of some processes, and that of one process that must be the same.

    The initial loss scale matters only to fp16.
    """

    processes: int
    overrides: Tuple[str, ...]
    alone: Tuple[str, ...] = ()
    scale: float = 1.0
    scale_alone: float = 1.0

    @property
    def is_pipeline(self) -> bool:
        return "engine.name=pipeline" in self.overrides

    @property
    def needs_new_torch(self) -> bool:
        return self.is_pipeline or "engine.compile=layers" in self.overrides

    @property
    def replicas(self) -> int:
        replicas = [word for word in self.overrides if word.startswith("batch.replicas=")]
        return int(replicas[-1].split("=")[1]) if replicas else 1

    @property
    def per_replica(self) -> int:
        """Processes per replica; 0 where a process has several replicas."""
        return self.processes // self.replicas


FOUR = "[1, 1, 1, 1]"
CASES: Dict[str, Case] = {
    "torch, 2 replicas": Case(2, copies(2)),
    "torch, 4 replicas on 2": Case(2, (*SMALL, *copies(4)), SMALL),
    "gpipe, 2 stages": Case(2, (*SMALL, *pipeline("gpipe", "[2, 2]")), SMALL),
    "1f1b, 2 stages": Case(2, (*SMALL, *pipeline("1f1b", "[2, 2]")), SMALL),
    "interleaved, 4 stages on 2": Case(2, (*SMALL, *pipeline("interleaved_1f1b", FOUR)), SMALL),
    "device iterations": Case(
        2,
        (*SMALL, *pipeline("1f1b", "[1, 3]"), "batch.device_iterations=2"),
        (*SMALL, "batch.device_iterations=2"),
    ),
    "bf16, 2 stages": Case(2, (*BF16, *pipeline("1f1b", "[2, 2]")), BF16),
    "gpipe, 4 stages": Case(4, (*SMALL, *pipeline("gpipe", FOUR)), SMALL),
    "1f1b, 4 stages": Case(4, pipeline("1f1b", FOUR)),
    "interleaved, 4 stages": Case(4, (*SMALL, *pipeline("interleaved_1f1b", FOUR)), SMALL),
    "1f1b, 2 replicas x 2 stages": Case(4, (*SMALL, *pipeline("1f1b", "[2, 2]", 2)), SMALL),
    "interleaved, 2 replicas x 4 stages on 2": Case(
        4, (*SMALL, *pipeline("interleaved_1f1b", FOUR, 2)), SMALL
    ),
    "interleaved, 8 stages on 4": Case(
        4, (*pipeline("interleaved_1f1b", FOUR), *DEEP), (*DEEP, "engine.name=torch")
    ),
    "embedding and head alone": Case(4, (*SMALL, *pipeline("gpipe", "[0, 2, 2, 0]")), SMALL),
    "torch, 4 replicas": Case(4, (*SMALL, *copies(4)), SMALL),
    "no cache": Case(
        4,
        (*SMALL, *pipeline("1f1b", FOUR), "data.cache=off", "train.steps=3"),
        (*SMALL, "train.steps=3"),
    ),
    "bf16, 4 stages": Case(4, (*BF16, *pipeline("interleaved_1f1b", FOUR)), BF16),
    # The torch engine divides the loss by the 8 micro-batches, a schedule divides the gradients:
    # with an eighth of the scale both compute with the same numbers.
    "fp16, 4 stages": Case(4, (*FP16, *pipeline("1f1b", FOUR)), FP16, 2.0**20, 2.0**23),
    "fp16, 2 replicas x 2 stages": Case(
        4, (*FP16, *pipeline("gpipe", "[2, 2]", 2)), FP16, 2.0**20, 2.0**23
    ),
    "mean and asymmetric, 4 stages": Case(4, (*ASYMMETRIC, *pipeline("1f1b", FOUR)), ASYMMETRIC),
    "both and weighted, 2 stages": Case(2, (*WEIGHTED, *pipeline("gpipe", "[2, 2]")), WEIGHTED),
    "drop path, torch, 2 replicas": Case(
        2, (*DROPPED, *copies(2), "pipeline.recompute=every_layer"), DROPPED
    ),
    "drop path, 4 stages on 2": Case(
        2,
        (*DROPPED, *pipeline("interleaved_1f1b", FOUR), "pipeline.recompute=every_layer"),
        DROPPED,
    ),
    "drop path, 4 stages": Case(
        4, (*DROPPED, *pipeline("1f1b", FOUR), "pipeline.recompute=stage_inputs"), DROPPED
    ),
    "drop path, 2 replicas x 2 stages": Case(
        4, (*DROPPED, *pipeline("1f1b", "[2, 2]", 2), "pipeline.recompute=attention_mlp"), DROPPED
    ),
    "unknown labels, torch, 2 replicas": Case(2, (*MASKED, *copies(2)), MASKED),
    "unknown labels, 4 stages": Case(4, (*MASKED, *pipeline("1f1b", FOUR)), MASKED),
    "unknown labels, 2 replicas x 2 stages": Case(
        4, (*MASKED, *pipeline("interleaved_1f1b", FOUR, 2)), MASKED
    ),
    "compiled, torch, 2 replicas": Case(
        2,
        (*DROPPED, *copies(2), "engine.compile=layers", "pipeline.recompute=every_layer"),
        DROPPED,
    ),
    "compiled, 2 stages": Case(
        2, (*DROPPED, *pipeline("1f1b", "[2, 2]"), "engine.compile=whole"), DROPPED
    ),
    "frozen, 2 replicas x 4 stages on 2": Case(
        4, (*RATES, *pipeline("interleaved_1f1b", FOUR, 2)), RATES
    ),
    "frozen, torch, 2 replicas": Case(2, (*PROBE, *copies(2)), PROBE),
    "frozen, 3 of 4 stages": Case(4, (*PROBE, *pipeline("gpipe", FOUR)), PROBE),
}


def runs_here(case: Case) -> bool:
    return HAS_PIPELINING or not case.needs_new_torch


def cases(*wanted: str, but: str = "-") -> Any:
    """Parametrize a test with the cases whose names begin with one of the words."""
    chosen = [
        pytest.param(name, id=name, marks=[needs_pipelining] if case.needs_new_torch else [])
        for name, case in CASES.items()
        if name.startswith(wanted or ("",)) and but not in name
    ]
    return pytest.mark.parametrize("name", chosen)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """DEMO on a synthetic data set."""
    root = tmp_path_factory.mktemp("data") / "sample"
    write_sample(root, num_images=236, image_size=64, seed=0)
    write_unknown(root, root / "unknown.csv")
    return (*DEMO, f"data.root={root}")


@pytest.fixture(scope="module")
def alone(demo):
    """Results of one process, by overrides and loss scale."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes: the order of a sum changes its rounding
    yield lru_cache(maxsize=None)(lambda more, scale: measure((*demo, *more), scale))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def results(demo, tmp_path_factory):
    """Results of all processes of a case; cases with the same number of processes share a start."""

    @lru_cache(maxsize=None)
    def launched(processes):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        chosen = {
            name: [[*demo, *case.overrides], case.scale]
            for name, case in CASES.items()
            if case.processes == processes and runs_here(case)
        }
        if processes == 2 and HAS_PIPELINING:
            chosen["blow up"] = [[*demo, *FROZEN_STAGE], 1.0]  # the last, as it changes the module
        path = folder / "cases.json"
        path.write_text(json.dumps(chosen))
        done = finish(
            fork(processes, "tests/engines/processes/worker.py", path, folder), timeout=600
        )
        return folder, done

    @lru_cache(maxsize=None)
    def of(name: str) -> List[Dict[str, Any]]:
        processes = CASES[name].processes if name in CASES else 2
        folder, done = launched(processes)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return [
            torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in range(processes)
        ]

    return of


@pytest.fixture(scope="module")
def masked(demo):
    """The result of a loop over the known labels."""
    return plain_loop(load_config([CONFIG], [*demo, *MASKED]), masked_loss)


@pytest.fixture
def both(results, alone):
    """Results of the main process of a case and of one process."""

    def of(name: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
        case = CASES[name]
        return results(name)[0], alone(case.alone, case.scale_alone)

    return of


def assert_near(ours, theirs, what, tolerance=1e-5):
    difference = float((ours - theirs).abs().max())
    assert difference <= tolerance, f"{what} differs by {difference:.2g}"


def assert_weights_agree(ours, theirs, tolerance=1e-5):
    assert ours["weights"].keys() == theirs["weights"].keys()
    assert ours["optimizer"].keys() == theirs["optimizer"].keys()
    for name in filter(has_gradient, theirs["weights"]):
        assert_near(ours["weights"][name], theirs["weights"][name], name, tolerance)
    for name in filter(has_gradient, theirs["optimizer"]):
        assert ours["optimizer"][name].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for slot, value in theirs["optimizer"][name].items():
            assert_near(ours["optimizer"][name][slot], value, f"{slot} of {name}", tolerance)


@cases(but="16,")
def test_losses_norms_and_weights_match_one_process(both, name):
    ours, theirs = both(name)
    assert len(ours["losses"]) == len(theirs["losses"]) >= 3
    assert ours["num_samples"] == theirs["num_samples"] == 32 * len(ours["losses"])
    assert_near(ours["losses"], theirs["losses"], "the loss")
    assert_near(ours["norms"], theirs["norms"], "the gradient norm")
    assert_weights_agree(ours, theirs)


def test_one_process_computes_the_same_with_any_stages(alone):
    cut, whole = alone((), 1.0), alone(("pipeline.layers_per_stage=[4]",), 1.0)
    assert torch.equal(cut["losses"], whole["losses"])
    assert torch.equal(cut["norms"], whole["norms"])
    assert all(torch.equal(cut["weights"][name], value) for name, value in whole["weights"].items())


def test_updates_differ_enough_to_compare(alone):
    """Otherwise the tests above could not detect a wrong update."""
    demo, small = alone((), 1.0), alone(SMALL, 1.0)
    assert demo["norms"].min() > 0.08, "each gradient is clipped"
    assert demo["losses"].max() - demo["losses"].min() > 0.05
    unclipped = alone((*SMALL, "optim.max_grad_norm=null"), 1.0)
    assert (small["losses"] - unclipped["losses"]).abs().max() > 1e-4
    undropped = alone((*DROPPED, "model.drop_path=0"), 1.0)
    assert (alone(DROPPED, 1.0)["losses"] - undropped["losses"]).abs().max() > 1e-3
    undecayed = alone((*SMALL, "optim.weight_decay=0"), 1.0)["weights"]
    name = "vit.encoder.layer.3.output.dense.weight"
    assert (small["weights"][name] - undecayed[name]).abs().max() > 1e-4


@cases("bf16")
def test_bf16_matches_one_process_bit_for_bit(both, name):
    ours, theirs = both(name)
    assert torch.equal(ours["losses"], theirs["losses"])
    assert_near(ours["norms"], theirs["norms"], "the gradient norm", 1e-6)
    assert all(
        torch.equal(ours["weights"][name], value) for name, value in theirs["weights"].items()
    )


@cases("fp16")
def test_fp16_overflows_in_the_same_updates_as_one_process(both, name):
    ours, theirs = both(name)
    skipped = ours["norms"] == 0
    assert 1 < skipped.sum() < len(skipped) - 1
    assert torch.equal(skipped, theirs["norms"] == 0)
    assert ours["scale"] * 8 == theirs["scale"]
    assert_near(ours["losses"], theirs["losses"], "the loss", 1e-4)
    assert_near(ours["norms"], theirs["norms"], "the gradient norm", 1e-3)


@cases("unknown")
def test_unknown_labels_are_left_out_of_losses_and_gradients(both, masked, name):
    for ours in both(name):
        gradients = {name: slots["exp_avg"] for name, slots in ours["optimizer"].items()}
        assert_same_result(Result(ours["losses"], gradients, ours["norms"]), masked)


@cases()
def test_all_processes_return_the_same(results, name):
    first, *others = results(name)
    for other in others:
        for what in ("losses", "norms", "logits", "labels"):
            assert torch.equal(first[what], other[what]), what
        for what in ("num_samples", "scale"):
            assert first[what] == other[what], what


@cases()
def test_processes_send_each_other_no_pickles(results, name):
    assert [ours["unpickled"] for ours in results(name)] == [[]] * CASES[name].processes


@cases()
def test_scores_match_one_process(results, alone, demo, name):
    ours, case = results(name)[0], CASES[name]
    assert ours["logits"].shape == (59, 14)
    assert torch.equal(ours["labels"], alone(case.alone, case.scale_alone)["labels"])
    expected = score((*demo, *case.alone), ours["weights"])
    assert_near(ours["logits"], expected, "a logit")
    assert ours["logits"].std(dim=0).min() > 1e-3, "scores differ between images"


@cases()
def test_data_with_other_labels_are_scored(results, name):
    for ours in results(name):
        assert ours["shapes"] == [[9, 14], [9, 2]]


@cases()
def test_each_process_holds_only_its_own_stages(results, demo, name):
    case = CASES[name]
    every = {name for name, _ in make((*demo, *case.overrides))[2].model.named_parameters()}
    for rank, ours in enumerate(results(name)):
        own = every
        if case.is_pipeline:
            position = rank % case.per_replica
            own = {name for name in every if stage_of(name) % case.per_replica == position}
            assert 0 < len(own) < len(every)
        assert set(ours["here"]) == own, rank
        assert set(ours["alive"]) == own, f"{rank}: weights of other stages stay in memory"
        trained = results(name)[0]["optimizer"].keys()
        assert set(ours["stateful"]) == {name for name in own if hub_name_of(name) in trained}, rank


def stage_of(parameter: str) -> int:
    return int(parameter.split(".")[1])  # stages.<i>.<path>


def hub_name_of(parameter: str) -> str:
    return hub_name(parameter.split(".", 2)[2])


@cases("frozen")
def test_frozen_weights_keep_their_values_and_have_no_state(results, demo, name):
    case, (ours, *_) = CASES[name], results(name)
    trunk = "model.freeze=trunk" in case.overrides
    start = make((*demo, *case.overrides))[2].model.weights()
    changed = {name for name in start if not torch.equal(start[name], ours["weights"][name])}
    trained = ("classifier.",) if trunk else ("vit.encoder.layer.2.", "vit.encoder.layer.3.")
    trained += () if trunk else ("vit.layernorm.", "classifier.")
    assert changed == ours["optimizer"].keys() == {n for n in start if n.startswith(trained)}


@needs_pipelining
def test_frozen_stage_goes_along_with_updates_that_are_left_out_on_the_device(results):
    frozen, trained = results("blow up")
    assert not any(frozen["fused"])
    assert all(trained["fused"])
    assert torch.equal(frozen["norms"].isfinite(), torch.tensor([True, False, False]))
    assert torch.equal(frozen["norms"][:1], trained["norms"][:1])


@cases()
def test_replicas_divide_the_images_and_only_first_stages_read_them(results, alone, name):
    case, every = CASES[name], results(name)
    expected = alone(case.alone, case.scale_alone)
    first_stages = every[:: case.per_replica] if case.is_pipeline else every
    # Of each round of micro-batches, one per replica, every process has the next part.
    size = 4 * case.replicas // len(first_stages)
    parts = [ours["rows"].reshape(-1, size) for ours in first_stages]
    assert torch.equal(torch.stack(parts, dim=1).flatten(), expected["rows"])
    for rank, ours in enumerate(every):
        reads = not case.is_pipeline or rank % case.per_replica == 0
        pixels = expected["pixels"] // len(first_stages) if reads else 0
        assert ours["pixels"] == pixels, rank


@needs_pipelining
def test_only_the_first_stage_opens_images(results):
    first, *others = results("no cache")
    assert len(first["images"]) >= 3 * 32
    assert len(set(first["images"][-3 * 32 :])) == 3 * 32, "no epoch ends in three updates"
    assert [other["images"] for other in others] == [[], [], []]
