"""Keys for IPUs, through train.py: each reaches PopTorch as its own option, in its own graph."""

from __future__ import annotations

import pytest
import torch

from cxr_vit.model.stages import StagedViT

from .commands import compiled

ONE = ("train.steps=1", "train.eval_every_steps=1")
FOUR = {0: 0.4, 1: 0.4, 2: 0.4, 3: 0.4}
HALF = {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.5}

#: Settings -> options of the training graph, options of the inference graph.
KNOBS = [
    (["pipeline.recompute=none"], {"autoRecomputation": 0}, {"autoRecomputation": None}),
    (["batch.eval_replicas=2"], {"replication_factor": 1}, {"replication_factor": 2}),
    (
        [
            "pipeline.available_memory_proportion=0.4",
            "pipeline.eval_available_memory_proportion=0.5",
        ],
        {"available_memory_proportion": FOUR},
        {"available_memory_proportion": HALF},
    ),
    (["train.steps=2", "batch.device_iterations=2"], {"output_mode": 2}, {"output_mode": 2}),
    (
        ["batch.eval_device_iterations=5"],
        {"output_mode": 3, "device_iterations": 1},
        {"output_mode": 2, "device_iterations": 5},
    ),
    (
        ["engine.prefetch_depth=3"],
        {"defaultBufferingDepth": 3, "defaultPrefetchBufferingDepth": None},
        {"defaultBufferingDepth": 3, "defaultPrefetchBufferingDepth": None},
    ),
]


@pytest.mark.parametrize(
    ("settings", "training", "inference"), KNOBS, ids=[" ".join(knob[0]) for knob in KNOBS]
)
def test_options_of_the_compiled_graphs(ipu, commands, settings, training, inference):
    _, inspection = ipu
    assert commands.train(*ONE, *settings).status == 0
    executables = compiled(inspection)
    for executable, expected in zip(executables, (inference, training)):
        given = {name: executable.options.get(name) for name in expected}
        assert given == expected


def test_cut_with_the_rest_of_the_layers(ipu, commands):
    _, inspection = ipu
    run = commands.train(*ONE, "pipeline.layers_per_stage=[-1, 1]")
    assert "layers_per_stage: [3, 1]" in (run.path / "config.yaml").read_text(encoding="utf-8")
    inference, training = compiled(inspection)
    assert training.num_ipus == inference.num_ipus == 2


def test_dropouts_of_hidden_states_and_of_attention(ipu, commands):
    """In training only. transformers 5.x has no module for that of attention."""
    _, inspection = ipu
    commands.train(*ONE, "model.hidden_dropout=0.25", "model.attention_dropout=0.5")
    inference, training = compiled(inspection)
    for graph, is_training in ((training, True), (inference, False)):
        (model,) = [module for module in graph.model.modules() if isinstance(module, StagedViT)]
        assert model.config.hidden_dropout_prob == 0.25
        assert model.config.attention_probs_dropout_prob == 0.5
        found = [module for module in graph.model.modules() if isinstance(module, torch.nn.Dropout)]
        assert {module.p for module in found} - {0.5} == {0.25}
        assert {module.training for module in found} == {is_training}


def test_layer_norm_epsilon(ipu, commands):
    _, inspection = ipu
    run = commands.train(*ONE, "model.layer_norm_eps=0.01")
    norms = [
        module
        for graph in compiled(inspection)
        for module in graph.model.modules()
        if type(module).__name__.endswith("LayerNorm")
    ]
    assert len(norms) == 2 * 9
    assert {norm.eps for norm in norms} == {0.01}
    saved = (run.checkpoint() / "config.json").read_text(encoding="utf-8")
    assert '"layer_norm_eps": 0.01' in saved


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ["engine.loader_mode=async", "engine.loader_buffer_size=5"],
            {"buffer_size": 5, "early_preload": False, "load_indefinitely": False},
        ),
        (
            ["engine.loader_mode=async", "engine.loader_early_preload=true"],
            {"buffer_size": 3, "early_preload": True, "load_indefinitely": False},
        ),
        (["engine.loader_mode=async_rebatched", "engine.rebatched_worker_size=2"], 2),
        (["engine.loader_mode=async_rebatched"], 7),
    ],
)
def test_arguments_of_the_loader(ipu, commands, monkeypatch, settings, expected):
    poptorch, _ = ipu
    make, given = poptorch.DataLoader.__init__, []

    def init(loader, *arguments, **named):
        given.append(named)
        make(loader, *arguments, **named)

    monkeypatch.setattr(poptorch.DataLoader, "__init__", init)
    assert commands.train(*ONE, *settings).status == 0
    training, validation = given
    key = "async_options" if isinstance(expected, dict) else "rebatched_worker_size"
    assert training[key] == expected
    assert validation["mode"] == poptorch.DataLoaderMode.Sync
    assert "async_options" not in validation
