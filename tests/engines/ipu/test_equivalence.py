"""train.py and evaluate.py on IPUs compared with the torch engine."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from cxr_vit.config import load_config
from cxr_vit.data.labels import FINDINGS
from plain_loop import (
    RECIPES,
    UNKNOWN,
    Result,
    assert_same_result,
    masked_loss,
    plain_loop,
    write_unknown,
)

from .commands import ROOT, SMALL, TORCH, compiled, make_engine
from .test_graphs import example

TWENTY = ("train.steps=20", "train.eval_every_steps=8")


def batch(accumulation, iterations, replicas):
    return (
        *TWENTY,
        f"batch.gradient_accumulation={accumulation}",
        f"batch.device_iterations={iterations}",
        f"batch.replicas={replicas}",
    )


def near(expected):
    return pytest.approx(expected, rel=0, abs=1e-5)


def scores(run):
    return [
        {tag: event[tag] for tag in sorted(event) if tag.startswith("val/") or tag == "step"}
        for event in run.scores
    ]


def assert_scores_agree(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        assert one.keys() == other.keys()
        for tag, value in one.items():
            assert value == (None if other[tag] is None else near(other[tag])), tag


#: Most gradients of these runs are longer than 0.15; see test_losses_differ_enough_to_compare.
CLIPPED, UNCLIPPED = "optim.max_grad_norm=0.15", "optim.max_grad_norm=null"


@pytest.mark.parametrize(
    ("accumulation", "iterations", "replicas", "loader", "clipping"),
    [
        (7, 1, 1, ["engine.loader_mode=sync"], CLIPPED),
        (7, 1, 1, ["engine.loader_mode=sync"], UNCLIPPED),
        (8, 4, 1, ["engine.loader_mode=sync"], UNCLIPPED),
        (7, 4, 2, ["engine.loader_mode=sync"], CLIPPED),
        (8, 1, 2, ["engine.loader_mode=async"], UNCLIPPED),
        (7, 1, 1, ["engine.loader_mode=async_rebatched", "data.num_workers=2"], CLIPPED),
    ],
)
def test_twenty_updates_and_all_scores_equal_the_torch_engines(
    ipu, commands, torch_run, accumulation, iterations, replicas, loader, clipping
):
    overrides = (*batch(accumulation, iterations, replicas), clipping)
    run, expected = commands.train(*overrides, *loader), torch_run(*overrides)
    assert run.status == expected.status == 0
    assert len(run.losses) == 20
    assert run.losses == near(expected.losses)
    assert len(run.logged) == 20 // iterations
    assert run.logged == near(expected.logged)
    assert_scores_agree(scores(run), scores(expected))
    assert [event["step"] for event in run.scores] == [8, 16, 20]


def test_losses_differ_enough_to_compare(torch_run):
    """Otherwise the test above could not detect a wrong update."""
    clipped, unclipped = torch_run(*batch(7, 1, 1), CLIPPED), torch_run(*batch(7, 1, 1), UNCLIPPED)
    assert clipped.losses != near(unclipped.losses)
    assert max(clipped.losses) - min(clipped.losses) > 0.05


def test_evaluation_equals_the_torch_engines(ipu, commands):
    run = commands.train("batch.eval_micro_batch_size=3")
    on_ipus = commands.evaluate(run.checkpoint("best"))
    on_torch = commands.evaluate(run.checkpoint("best"), *TORCH)
    assert len(on_ipus) == 20, "each image of the test split, no padding"
    for ours, theirs in zip(on_ipus, on_torch):
        assert ours == near(theirs)
    file = run.path / "other.yaml"
    file.write_text("data: {label_map: {No Finding: Mass}, include_no_finding: true}\n")
    other = ["--data", str(file), f"data.root={commands.data}", "--split", "test"]
    with_another_label = commands.evaluate(run.checkpoint("best"), *other)
    assert with_another_label == [[*row, row[FINDINGS.index("Mass")]] for row in on_ipus]


@pytest.mark.parametrize(
    "setting",
    [
        "pipeline.execution=sharded",
        "pipeline.eval_execution=sharded",
        "pipeline.layers_per_stage=[0, 2, 2, 0]",
        "pipeline.eval_layers_per_stage=[4]",
        "engine.optimizer_state_on_chip=false",
        "optim.loss_scaling=1024",
        "optim.decay_all=true",
        "pipeline.recompute=none",
        "pipeline.recompute=[attention_mlp, stage_inputs, [2], every_layer]",
        "batch.eval_replicas=2",
        pytest.param("pipeline.recompute=attention_mlp", marks=pytest.mark.exhaustive),
        pytest.param("pipeline.layers_per_stage=[0, -1, -1, 1]", marks=pytest.mark.exhaustive),
        pytest.param("pipeline.eval_layers_per_stage=[-1, 2]", marks=pytest.mark.exhaustive),
        pytest.param("pipeline.eval_available_memory_proportion=0.5", marks=pytest.mark.exhaustive),
        pytest.param("batch.device_iterations=2", marks=pytest.mark.exhaustive),
        pytest.param("engine.prefetch_depth=4", marks=pytest.mark.exhaustive),
    ],
)
def test_placement_settings_change_no_loss(ipu, commands, torch_run, setting):
    run, expected = commands.train(setting), torch_run("train.steps=4", "run.seed=0")
    if setting == "optim.decay_all=true":
        expected = torch_run(setting)
    if setting == "batch.device_iterations=2":  # the rate of a host call's first step
        expected = torch_run(setting)
    assert run.losses == near(expected.losses)
    assert run.logits[0].tolist() == [near(row) for row in expected.logits[0].tolist()]


@pytest.mark.parametrize(
    "setting",
    [
        "model.layer_norm_eps=0.01",
        "optim={name: sgd, lr: 0.1, use_combined_accum: true}",
        "optim={name: sgd, lr: 0.1}",
        "optim={name: sgd, lr: 0.1, nesterov: true, use_combined_accum: true}",
    ],
)
def test_settings_of_model_and_optimizer_mean_the_same(ipu, commands, torch_run, setting):
    shared = (setting, "schedule.warmup_ratio=0", "schedule.name=constant")
    run, expected = commands.train(*shared), torch_run(*shared)
    assert run.losses == near(expected.losses)
    assert run.losses != near(torch_run(*shared[1:]).losses)


def test_drop_path_makes_the_torch_engines_draws(ipu, commands, torch_run):
    stages = ("pipeline.layers_per_stage=[2, 2]", "train.steps=4")
    shared = (*batch(3, 2, 2), *stages, "model.drop_path=0.3")
    run = commands.train(*shared, "pipeline.recompute=attention_mlp")
    assert run.losses == near(torch_run(*shared).losses)
    assert run.losses != near(torch_run(*shared[:-1]).losses)


def test_logits_may_be_returned_in_fp16(ipu, commands, torch_run):
    run, expected = commands.train("engine.eval_output=fp16"), torch_run("train.steps=4")
    assert run.losses == near(expected.losses)
    for ours, theirs in zip(run.logits[0], expected.logits[0]):
        assert ours.dtype == theirs.dtype == torch.float32
        assert ours.half().float().tolist() == ours.tolist(), "rounded on the device"
        assert ours.tolist() == pytest.approx(theirs.tolist(), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_pooling_and_loss_of_a_recipe_mean_the_same(ipu, commands, torch_run, recipe):
    _, inspection = ipu
    run, expected = commands.train(*recipe), torch_run(*recipe)
    assert run.status == expected.status == 0
    assert run.losses == near(expected.losses)
    assert run.losses != near(torch_run("train.steps=4", "run.seed=0").losses)
    assert run.logits[0].tolist() == [near(row) for row in expected.logits[0].tolist()]
    for executable in compiled(inspection):
        if hasattr(inspection, "unhandled_ops"):
            assert inspection.unhandled_ops(executable) == {}


# Unknown labels


MASKED = (*UNKNOWN, "train.steps=3", CLIPPED, "batch.gradient_accumulation=8")


@pytest.fixture(scope="module")
def masked(sample_root, tmp_path_factory):
    """Overrides, and the result of a loop over the known labels."""
    table = tmp_path_factory.mktemp("data") / "unknown.csv"
    write_unknown(sample_root, table)
    overrides = (*MASKED, f"data.csv={table}")
    every = [*SMALL, f"data.root={sample_root}", *overrides, *TORCH]
    config = load_config([ROOT / "configs" / "vit_demo_ipu.yaml"], every)
    return overrides, plain_loop(config, masked_loss)


@pytest.mark.parametrize(
    "settings",
    [
        ["pipeline.layers_per_stage=[1, 1, 1, 1]"],
        ["pipeline.layers_per_stage=[4]", "batch={micro_batch_size: 4, gradient_accumulation: 2}"],
        ["pipeline.layers_per_stage=[3, 1]", "batch={gradient_accumulation: 4, replicas: 2}"],
    ],
)
def test_unknown_labels_are_left_out_of_losses_and_gradients(ipu, commands, masked, settings):
    overrides, expected = masked
    run = commands.train(*overrides, *settings)
    state = load_file(str(run.checkpoint() / "optimizer.safetensors"))
    end = "/exp_avg"
    gradients = {name[: -len(end)]: state[name] for name in state if name.endswith(end)}
    assert_same_result(Result(torch.tensor(run.losses), gradients), expected)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_poptorch_can_compile_the_mask(front_end, commands, masked, precision):
    _, inspection = front_end
    config = commands.config(*masked[0], f"engine.precision={precision}")
    with make_engine(config) as engine:
        engine.compile(example(engine))
        (_, training) = compiled(inspection)
        assert inspection.unhandled_ops(training) == {}
        last = [name for name, _, ipu in training.ops[-12:] if ipu == 3]
        assert any("ge" in name.split(".") for name in last), last


def test_graphs_with_the_mask_have_a_cache_of_their_own(ipu, commands, masked):
    def folder(*overrides):
        cache = f"engine.executable_cache={commands.folder / 'cache'}"
        with make_engine(commands.config(*masked[0], *overrides, cache)) as engine:
            return engine.graphs.cache.path

    known = folder("data.uncertain=negative", "data.blank=negative")
    nih = folder("data={format: nih, csv: null, columns: null, labels: null}")
    assert folder() != known == nih


def test_graphs_depend_on_what_is_frozen_and_not_on_the_rates(ipu, commands):
    def folder(*overrides):
        cache = f"engine.executable_cache={commands.folder / 'cache'}"
        with make_engine(commands.config(UNCLIPPED, *overrides, cache)) as engine:
            return engine.graphs.cache.path

    peak = ("optim.lr=null", "optim.base_lr=0.01")
    rates = ("optim.layer_decay=0.65", "optim.head_lr_scale=10", *peak)
    sgd = ("optim.name=sgd", "optim.use_combined_accum=true")
    assert folder() == folder(*rates, "schedule.min_lr=1e-6")
    others = [("model.freeze=1",), ("model.freeze=trunk",), sgd, (*sgd, "optim.nesterov=true")]
    assert len({folder(), *(folder(*other) for other in others)}) == 5
