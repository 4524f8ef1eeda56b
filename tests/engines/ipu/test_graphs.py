"""Placement of the graphs, host transfers, and passing the IPUs between graphs."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import StepOutput
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.ipu.graphs import InferenceGraph, TrainingGraph
from cxr_vit.errors import NonFiniteLoss
from cxr_vit.model.stages import StagedViT

from .commands import compiled, make_engine

TINY = ("model.name=vit-tiny", "model.patch_size=16")
#: Module name in a graph -> name of the part in the printed allocation.
PARTS = {
    r"\.vit\.embeddings$": "Embedding",
    r"\.vit\.(?:encoder\.layer|layers)\.(\d+)$": "Encoder {}",
    r"\.vit\.layernorm$": "Head",
    r"\.classifier$": "Head",
}


def example(engine):
    """Return a host batch of random images."""
    generator = torch.Generator().manual_seed(5)
    size = engine.local_batch.host_batch_size
    images = torch.randint(0, 256, (size, 1, 32, 32), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 2, (size, 14), generator=generator).float()
    return Batch(images, labels, torch.arange(size))


def placed(executable):
    """Return part of the model -> (stage, IPU) from the trace."""
    found = {}
    for name, places in executable.placements.items():
        for pattern, part in PARTS.items():
            match = re.search(pattern, name)
            if match:
                assert len(places) == 1, (name, places)
                where = found.setdefault(part.format(*match.groups()), places[0])
                assert where == places[0], name
    return found


def allocation(layers_per_stage):
    """Return the expected value of `placed`."""
    parts, layer = {"Embedding": (0, 0)}, 0
    for stage, count in enumerate(layers_per_stage):
        for _ in range(count):
            parts[f"Encoder {layer}"] = (stage, stage)
            layer += 1
    return {**parts, "Head": (stage, stage)}


@pytest.mark.parametrize(
    ("layers", "eval_layers"),
    [([3, 3, 3, 3], None), ([2, 4, 4, 2], None), ([3, 3, 3, 3], [2, 4, 4, 2])],
)
def test_every_part_runs_on_the_printed_ipu(ipu, commands, capsys, layers, eval_layers):
    _, inspection = ipu
    evaluation = [] if eval_layers is None else [f"pipeline.eval_layers_per_stage={eval_layers}"]
    commands.train(*TINY, f"pipeline.layers_per_stage={layers}", "train.steps=1", *evaluation)
    inference, training = compiled(inspection)
    assert placed(training) == allocation(layers)
    assert placed(inference) == allocation(eval_layers or layers)
    printed = dict(re.findall(r"^(\w+(?: \d+)?) +--> IPU (\d)$", capsys.readouterr().out, re.M))
    assert {part: int(ipu) for part, ipu in printed.items()} == {
        part: ipu for part, (_, ipu) in placed(training).items()
    }


def test_single_stage_evaluation_needs_one_ipu(ipu, commands):
    _, inspection = ipu
    commands.train(
        "train.steps=1", "pipeline.eval_layers_per_stage=[4]", "batch.eval_device_iterations=1"
    )
    inference, training = compiled(inspection)
    assert (inference.num_ipus, training.num_ipus) == (1, 4)


def test_stage_i_is_the_block_on_ipu_i(ipu, commands):
    _, inspection = ipu
    with make_engine(commands.config()) as engine:
        engine.compile(example(engine))
        for executable, stages in zip(compiled(inspection), (4, 7)):
            assert [(stage, ipu) for stage, _, ipu in executable.blocks] == [
                (0, 0), (1, 1), (2, 2), (3, 3),
            ]  # fmt: skip
            assert executable.used_ipus == [0, 1, 2, 3]
            assert executable.pipeline_stages == stages, "7 = 4 forward and 3 backward"
            assert not executable.forced_to_ipu, "nothing is made on the device from nothing"
            assert all(len(places) == 1 for places in executable.parameters_used.values())
            weights = {name for name, _ in engine.model.named_parameters()}
            assert len(executable.parameters_used) == len(weights)


def test_no_operation_is_outside_the_blocks(ipu, commands, monkeypatch):
    """Operations outside the blocks run on IPU 0, so the blocks are moved to IPUs 1 to 4."""
    poptorch, inspection = ipu
    begin = poptorch.BeginBlock

    def one_further(layer, user_id, ipu_id):
        return begin(layer, user_id=user_id, ipu_id=ipu_id + 1)

    monkeypatch.setattr(poptorch, "BeginBlock", one_further)
    config = commands.config(
        "batch.gradient_accumulation=9", "batch.eval_device_iterations=5", "model.dropout=0.1"
    )
    with make_engine(config) as engine:
        engine.compile(example(engine))
        for executable in compiled(inspection):
            assert {ipu for _, _, ipu in executable.ops} == {1, 2, 3, 4}
        names = [name for name, _, _ in executable.ops]
        assert executable.ops[-1][2] == 4, "the loss lies on the last IPU"
        assert any("binary_cross_entropy" in n or "log_sigmoid" in n for n in names[-12:]), names


def test_inputs_and_outputs_of_the_graphs(ipu, commands, monkeypatch):
    crossed = {}
    train, infer = TrainingGraph.forward, InferenceGraph.forward

    def training(self, images, labels):
        crossed["training"] = [(item.dtype, tuple(item.shape)) for item in (images, labels)]
        return train(self, images, labels)

    def inference(self, images):
        crossed["inference"] = [(images.dtype, tuple(images.shape))]
        return infer(self, images)

    monkeypatch.setattr(TrainingGraph, "forward", training)
    monkeypatch.setattr(InferenceGraph, "forward", inference)
    config = commands.config(
        "batch.micro_batch_size=2",
        "batch.device_iterations=2",
        "batch.replicas=2",
        "batch.eval_micro_batch_size=3",
    )
    with make_engine(config) as engine:
        batch = example(engine)
        engine.compile(batch)
        assert crossed == {
            "training": [(torch.uint8, (2, 1, 32, 32)), (torch.float32, (2, 14))],
            "inference": [(torch.uint8, (3, 1, 32, 32))],
        }
        losses = engine.graphs.training(batch.images, batch.labels)(batch.images, batch.labels)
        assert isinstance(losses, torch.Tensor), "the loss is the only output"
        assert (losses.dtype, losses.shape) == (torch.float32, (2 * 7 * 2,))
        logits = engine.predict(Batch.zeros(24, image_size=32, num_classes=14))
        assert (logits.dtype, logits.shape) == (torch.float32, (24, 14))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.slow
def test_poptorch_can_compile_every_operation_of_vit_base(front_end, commands, precision, dropout):
    _, inspection = front_end
    config = commands.config(
        "model.name=vit-base",
        "model.patch_size=16",
        "data.image_size=224",
        "pipeline.layers_per_stage=[3, 3, 3, 3]",
        "pipeline.recompute=every_layer",
        f"engine.precision={precision}",
        f"model.dropout={dropout}",
        f"model.drop_path={dropout}",
    )
    with make_engine(config) as engine:
        assert sum(parameter.numel() for parameter in engine.model.parameters()) == 85_809_422
        size = engine.local_batch.host_batch_size
        engine.compile(Batch.zeros(size, image_size=224, num_classes=14))
        inference, training = compiled(inspection)
        for executable in (inference, training):
            counts = Counter(name for name, _, _ in executable.ops)
            assert counts["convolution"] == 1
            assert counts["native_layer_norm"] == 25
            assert inspection.unhandled_ops(executable) == {}
            assert placed(executable) == allocation([3, 3, 3, 3])
        dropped = [name for name, _, _ in training.ops if "dropout" in name or "bernoulli" in name]
        assert bool(dropped) == bool(dropout)
        assert not [name for name, _, _ in inference.ops if "dropout" in name]


@pytest.mark.parametrize(
    ("recompute", "execution", "kept"),
    [
        ("every_layer", "pipelined", 4),
        ("stage_inputs", "pipelined", 0),
        ("[stage_inputs, every_layer, [2], []]", "pipelined", 2),
        ("none", "pipelined", 0),
        ("attention_mlp", "pipelined", 8),
        ("[every_layer, attention_mlp, stage_inputs, attention_mlp]", "pipelined", 5),
        ("every_layer", "sharded", 0),
    ],
)
def test_recompute_sets_the_kept_outputs(ipu, commands, recompute, execution, kept):
    _, inspection = ipu
    config = commands.config(
        f"pipeline.recompute={recompute}",
        f"pipeline.execution={execution}",
        "model.dropout=0.1",
        "model.drop_path=0.1",
    )
    with make_engine(config) as engine:
        engine.compile(example(engine))
        inference, training = compiled(inspection)
        assert (inference.checkpoints, training.checkpoints) == (0, kept)


def test_listed_layers_are_counted_over_the_whole_model(ipu, commands):
    _, inspection = ipu
    config = commands.config(
        *TINY,
        "pipeline.layers_per_stage=[2, 4, 4, 2]",
        "pipeline.recompute=[[1], [2, 5], every_layer, stage_inputs]",
    )
    with make_engine(config) as engine:
        kept = [engine.model.layers[index] for index in (1, 2, 5, 6, 7, 8, 9)]
        assert list(map(id, engine.graphs.kept)) == list(map(id, kept))
        engine.compile(example(engine))
        assert compiled(inspection)[1].checkpoints == 7


def test_compilation_leaves_no_hook_on_the_model(ipu, commands):
    _, inspection = ipu
    with make_engine(commands.config("pipeline.recompute=every_layer")) as engine:
        engine.compile(example(engine))
        for model in (engine.model, engine.graphs.eval_model):
            assert inspection.annotations(model) == {}
            assert not [name for name, part in model.named_modules() if part._forward_hooks]
        assert len(inspection.log().calls("begin_ipu_block")) >= 8, "but there were blocks"


def test_failed_compilation_leaves_no_hook_on_the_model(ipu, commands, monkeypatch):
    poptorch, inspection = ipu
    engine = make_engine(commands.config("pipeline.recompute=every_layer"))
    monkeypatch.setattr(
        poptorch.PoplarExecutor,
        "compile",
        lambda *inputs: (_ for _ in ()).throw(RuntimeError("no")),
    )
    with pytest.raises(RuntimeError, match="no"):
        engine.compile(example(engine))
    for model in (engine.model, engine.graphs.eval_model):
        assert inspection.annotations(model) == {}
        assert not [name for name, part in model.named_modules() if part._forward_hooks]


def test_saved_weights_have_hub_names(ipu, commands):
    run = commands.train("train.steps=1")
    saved = load_file(str(run.checkpoint() / "model.safetensors"))
    assert {name.split(".")[0] for name in saved} == {"vit", "classifier"}
    assert {"vit.encoder.layer.3.output.dense.bias", "vit.layernorm.weight"} <= set(saved)
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def test_close_unwraps_the_model_and_releases_the_ipus(ipu, commands):
    _, inspection = ipu
    inspection.config().available_ipus = 4
    for _ in range(2):
        with make_engine(commands.config()) as engine:
            engine.compile(example(engine))
            wrapped = {type(parameter) for parameter in engine.model.parameters()}
            assert wrapped != {torch.nn.Parameter}, "while PopTorch has it"
        assert type(engine.model) is StagedViT
        assert {type(parameter) for parameter in engine.model.parameters()} == {torch.nn.Parameter}
        assert engine.model(torch.zeros(1, 1, 32, 32, dtype=torch.uint8)).shape == (1, 14)


def life(inspection):
    """Return the calls with an executable, in order, as (name, kind of graph)."""
    inference, training = compiled(inspection)
    kinds = {id(inference): "inference", id(training): "training"}
    return [
        (call.name, kinds[id(call.args[0])])
        for call in inspection.log()
        if call.args and id(call.args[0]) in kinds
    ]


def tenures(inspection):
    """Split the calls by the graph that is attached."""
    found = []
    for name, kind in life(inspection):
        if name == "loadEngineAndConnectStreams":
            found.append((kind, []))
        elif name not in ("compiled", "attachToDevice"):
            assert found[-1][0] == kind, f"{name} of the {kind} graph while the other is attached"
            found[-1][1].append(name)
    return found


def test_graphs_alternate_and_weights_are_copied_once_each_way(ipu, commands):
    _, inspection = ipu
    inspection.config().available_ipus = 4
    commands.train("train.steps=6", "train.eval_every_steps=2", "batch.eval_micro_batch_size=2")
    held = tenures(inspection)
    assert [kind for kind, _ in held] == [
        "inference",  # compiled
        "training", "inference",
        "training", "inference",
        "training", "inference",
    ]  # fmt: skip
    for kind, calls in held[:-1]:
        assert calls.count("detachFromDevice") == 1
        assert calls[-1] == "detachFromDevice"
        assert calls.count("copyWeightsToDevice_impl") == 1
        assert calls.count("copyWeightsToHost_impl") == (1 if kind == "training" else 0)
        assert calls.count("readOptimizerState") == (1 if kind == "training" else 0)
        assert calls.count("execute") == (
            2 if kind == "training" else 0 if calls is held[0][1] else 2
        )
    kind, calls = held[-1]
    assert "detachFromDevice" not in calls, "it is destroyed instead"
    assert calls.count("copyWeightsToDevice_impl") == 1


def test_no_weight_is_copied_between_steps(ipu, commands):
    _, inspection = ipu
    commands.train("train.steps=6")
    names = [name for name, kind in life(inspection) if kind == "training"]
    first, last = names.index("execute"), len(names) - 1 - names[::-1].index("execute")
    assert set(names[first:last]) == {"execute", "updateOptimizers"}


def test_save_between_steps_reads_the_weights_once_without_detaching(ipu, commands):
    _, inspection = ipu
    commands.train("train.steps=4", "train.checkpoint_every_steps=2")
    training = [calls for kind, calls in tenures(inspection) if kind == "training"]
    assert len(training) == 1
    assert training[0].count("copyWeightsToHost_impl") == 2
    assert training[0].count("readOptimizerState") == 2


def test_learning_rate_is_sent_before_each_call(ipu, commands):
    _, inspection = ipu
    run = commands.train("train.steps=6", "batch.device_iterations=2", "schedule.warmup_steps=4")
    rates = [
        call.args[1]["groups"][0]["learningRate"][0]
        for call in inspection.log().calls("updateOptimizers")
    ]
    assert rates[0] == 1e-3, "when it is attached: the peak, which no step uses"
    logged = [event["train/lr"] for event in run.events if "train/lr" in event]
    assert rates[1:] == pytest.approx(logged)
    assert logged == pytest.approx([0.0, 5e-4, 1e-3])
    names = [name for name, kind in life(inspection) if kind == "training"]
    for index, name in enumerate(names):
        if name == "execute":
            assert names[index - 1] == "updateOptimizers"


def test_cycles_are_logged_if_counted(ipu, commands):
    counted = commands.train("engine.log_cycles=true", "train.steps=2")
    cycles = [event["perf/ipu_cycles"] for event in counted.events if "train/loss" in event]
    assert len(cycles) == 2
    assert min(cycles) > 0
    plain = commands.train("train.steps=1")
    assert not any("perf/ipu_cycles" in event for event in plain.events)


@pytest.mark.parametrize("synthetic", [True, False])
def test_nan_losses_of_synthetic_data_do_not_end_the_run(ipu, commands, monkeypatch, synthetic):
    """The buffers of the device then hold any value, also NaN."""
    step = PopTorchEngine.train_step

    def train_step(engine, batch, *, lr):
        output = step(engine, batch, lr=lr)
        return StepOutput(output.losses * float("nan"), output.grad_norm, output.num_samples)

    monkeypatch.setattr(PopTorchEngine, "train_step", train_step)
    overrides = [f"engine.synthetic_data={str(synthetic).lower()}", "train.steps=2"]
    if synthetic:
        assert commands.train(*overrides).status == 0
    else:
        with pytest.raises(NonFiniteLoss):
            commands.train(*overrides)


def test_weights_beyond_protobufs_limit_are_written_apart(ipu, commands, monkeypatch):
    """One file for each graph, in a folder that is gone after the run."""
    _, inspection = ipu
    with make_engine(commands.config()) as engine:
        engine.compile(example(engine))
        assert not any("saveInitializersToFile" in graph.options for graph in compiled(inspection))
    inspection.log().clear()
    monkeypatch.setattr("cxr_vit.engines.ipu.engine.PROTOBUF_LIMIT", 1000)
    with make_engine(commands.config()) as engine:
        engine.compile(example(engine))
        files = [Path(graph.options["saveInitializersToFile"]) for graph in compiled(inspection)]
        assert [file.name for file in files] == ["inference", "training"]
        assert all(file.parent.is_dir() for file in files)
    assert not any(file.parent.exists() for file in files)
