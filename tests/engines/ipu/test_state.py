"""Saving and resuming, on the same engine and on another."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTForImageClassification

from conftest import engine_of, module_of
from cxr_vit.config import read_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.engines.base import EngineState
from cxr_vit.errors import CheckpointError
from fakes import loading

from .commands import IPU, TORCH, compiled, make_engine
from .test_graphs import example

ADAMW = ("optim.name=adamw",)
LAMB = ("optim.name=lamb", "optim.max_grad_norm=null", "optim.lr=0.01")
SGD = ("optim.name=sgd", "optim.max_grad_norm=null", "optim.lr=0.1")
CONSTANTS = "{VariableAttributes.markAsConstant: [betas, eps, weight_decay]}"
EIGHT = ("train.steps=8", "train.checkpoint_every_steps=4", "train.eval_every_steps=4")
#: Two stages need three micro-batches per update, four need seven, which takes twice as long.
SHORT = (*EIGHT, "pipeline.layers_per_stage=[2, 2]", "batch.gradient_accumulation=3")


@pytest.fixture(scope="module")
def trained():
    return {}


@pytest.fixture
def first_run(ipu, commands, torch_run, trained):
    """Train once for each set of overrides and implementation of PopTorch; resume from copies."""

    def train(*overrides, on=IPU):
        if on == TORCH:
            return torch_run(*overrides)
        key = (ipu[0].__file__, *overrides)
        if key not in trained:
            trained[key] = commands.train(*overrides, *on)
        return trained[key]

    return train


def optimizer_file(run, checkpoint="last"):
    return load_file(str(run.checkpoint(checkpoint) / "optimizer.safetensors"))


def trainer_state(run, checkpoint="last"):
    return json.loads((run.checkpoint(checkpoint) / "trainer_state.json").read_text())


@pytest.mark.parametrize(
    "optimizer",
    [
        ADAMW,
        LAMB,
        (*LAMB, "optim.bias_correction=false"),
        SGD,
        (*SGD, "optim.use_combined_accum=true"),
        (*ADAMW, f"engine.poptorch_options={{training: {CONSTANTS}}}"),
    ],
    ids=["adamw", "lamb", "lamb without bias correction", "sgd", "combined sgd", "constants"],
)
def test_resume_repeats_the_uninterrupted_run(ipu, commands, optimizer):
    cut = EIGHT if optimizer == ADAMW else SHORT
    settings = (*cut, *optimizer, "model.dropout=0.1", "batch.device_iterations=2")
    whole = commands.train(*settings)
    resumed = commands.resume_at(whole, 4)
    assert resumed.status == 0
    assert len(whole.losses) == 8
    assert resumed.losses == whole.losses[4:]
    assert resumed.logged == whole.logged
    assert torch.equal(resumed.logits[-1], whole.logits[-1])
    one, other = optimizer_file(whole), optimizer_file(resumed)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_resume_between_two_validations(ipu, commands):
    settings = (*SHORT, "train.checkpoint_every_steps=1", "model.dropout=0.1")
    whole = commands.train(*settings)
    resumed = commands.resume_at(whole, 3)
    assert resumed.losses == whole.losses[3:]
    assert resumed.scores == whole.scores


def test_state_includes_the_random_generator(ipu, commands):
    """Dropout repeats only because rng_state is saved; a new generator changes the losses."""
    settings = (*SHORT, "model.dropout=0.1")
    whole = commands.train(*settings)
    assert optimizer_file(whole)["rng_state"].dtype == torch.int64
    fresh = commands.resume_at(whole, 4, "train.resume_weights_only=true")
    assert fresh.losses[0] != whole.losses[4]
    assert fresh.losses[0] == pytest.approx(whole.losses[4], abs=0.05)


def test_optimizer_state_is_saved_by_hub_name(ipu, commands):
    run = commands.train("train.steps=2")
    saved = optimizer_file(run)
    name = "vit.encoder.layer.2.attention.attention.query.weight"
    assert saved[f"{name}/exp_avg"].shape == (96, 96)
    assert saved[f"{name}/exp_avg"].abs().max() > 0
    assert saved[f"{name}/exp_avg_sq"].min() >= 0
    assert float(saved[f"{name}/step"]) == 2
    assert trainer_state(run)["optimizer_kind"] == "poptorch.AdamW"
    assert trainer_state(run)["scalars"]["updates"] == 2
    weights = load_file(str(run.checkpoint() / "model.safetensors"))
    assert {key.split("/")[0] for key in saved} - {"*", "rng_state"} == set(weights)


def test_loaded_state_equals_the_saved_one(ipu, commands):
    """Before compilation and after it."""
    config = commands.config("model.dropout=0.1")
    with make_engine(config) as engine:
        batch = example(engine)
        engine.compile(batch)
        engine.train_step(batch, lr=1e-3)
        state = engine.state_dict()
        expected = engine.train_step(batch, lr=1e-3).losses
    for compile_first in (False, True):
        with make_engine(config) as other:
            if compile_first:
                other.compile(batch)
                other.train_step(batch, lr=1e-2)
            other.load_state_dict(state)
            other.compile(batch)
            again = other.state_dict()
            for name, weight in state.weights.items():
                assert torch.equal(again.weights[name], weight), name
            for name, slots in state.optimizer.items():
                for slot, value in slots.items():
                    if not slot.startswith("ipu_param"):
                        assert torch.equal(again.optimizer[name][slot], value), (name, slot)
            assert torch.equal(again.rng, state.rng)
            assert again.scalars == state.scalars
            assert torch.equal(other.train_step(batch, lr=1e-3).losses, expected)


def test_state_is_a_copy(ipu, commands):
    with make_engine(commands.config()) as engine:
        batch = example(engine)
        engine.compile(batch)
        engine.train_step(batch, lr=1e-3)
        state = engine.state_dict()
        weights = {name: weight.clone() for name, weight in state.weights.items()}
        moments = {
            name: slots["exp_avg"].clone() for name, slots in state.optimizer.items() if name != "*"
        }
        engine.train_step(batch, lr=1e-1)
        assert (
            engine.state_dict().weights["classifier.bias"] is not state.weights["classifier.bias"]
        )
        assert all(torch.equal(weights[name], state.weights[name]) for name in weights)
        assert all(
            torch.equal(value, state.optimizer[name]["exp_avg"]) for name, value in moments.items()
        )
        assert {type(weight) for weight in state.weights.values()} == {torch.Tensor}
        after = engine.state_dict()
        assert not torch.equal(after.weights["classifier.bias"], weights["classifier.bias"])


def test_state_without_training_is_the_weights(ipu, commands):
    with make_engine(commands.config()) as engine:
        state = engine.state_dict()
        assert (state.optimizer, state.rng) == ({}, None)
        assert len(state.weights) == 72


def test_state_can_be_read_while_the_inference_graph_is_attached(ipu, commands):
    with make_engine(commands.config()) as engine:
        batch = example(engine)
        engine.compile(batch)
        engine.train_step(batch, lr=1e-3)
        before = engine.state_dict()
        engine.predict(
            batch._replace(
                images=batch.images[:4], labels=batch.labels[:4], indices=batch.indices[:4]
            )
        )
        after = engine.state_dict()
        assert all(
            torch.equal(after.weights[name], before.weights[name]) for name in before.weights
        )
        assert torch.equal(after.rng, before.rng)
        for name, slots in before.optimizer.items():
            assert all(torch.equal(after.optimizer[name][slot], slots[slot]) for slot in slots)


def test_weights_of_another_model_are_refused(ipu, commands):
    with make_engine(commands.config()) as engine:
        weights = engine.state_dict().weights
        del weights["classifier.bias"]
        with pytest.raises(CheckpointError, match=r"missing classifier\.bias"):
            engine.load_state_dict(EngineState(weights))


@pytest.mark.parametrize(("first", "second"), [(TORCH, IPU), (IPU, TORCH)], ids=["to", "from"])
def test_adamw_run_resumes_on_the_other_engine(commands, first_run, torch_run, first, second):
    expected = torch_run(*EIGHT)
    resumed = commands.resume_at(first_run(*EIGHT, on=first), 4, *second)
    assert resumed.status == 0
    assert resumed.losses == pytest.approx(expected.losses[4:], rel=0, abs=1e-5)
    assert resumed.logged == pytest.approx(expected.logged, rel=0, abs=1e-5)
    assert resumed.logits[-1].tolist() == [
        pytest.approx(row, rel=0, abs=1e-5) for row in expected.logits[-1].tolist()
    ]


RATES = (
    *EIGHT,
    "model.freeze=1",
    "optim.layer_decay=0.65",
    "optim.head_lr_scale=10",
    "schedule.min_lr=1e-5",
)


def test_rates_of_layers_and_frozen_layers_mean_the_same_on_the_other_engine(
    ipu, commands, torch_run
):
    expected, first_run = torch_run(*RATES), commands.train(*RATES)
    assert first_run.losses == pytest.approx(expected.losses, rel=0, abs=1e-5)
    assert first_run.losses != pytest.approx(torch_run(*EIGHT).losses, rel=0, abs=1e-3)
    for run, there in ((first_run, TORCH), (expected, IPU)):
        resumed = commands.resume_at(run, 4, *there)
        assert resumed.losses == pytest.approx(expected.losses[4:], rel=0, abs=1e-5)
        trained = {name.partition("/")[0] for name in optimizer_file(resumed)}
        assert not [name for name in trained if name.startswith("vit.embeddings.")]
        assert "vit.encoder.layer.1.output.dense.bias" in trained
    message = r"lacks the optimizer state of vit\.embeddings\.cls_token.*\(model\.freeze\)"
    with pytest.raises(CheckpointError, match=message):
        commands.resume_at(first_run, 4, "model.freeze=none")
    frozen = commands.resume_at(first_run, 4, "model.freeze=trunk", "train.steps=6")
    assert frozen.losses[0] == first_run.losses[4]
    assert frozen.losses[1] != first_run.losses[5]


def test_losses_depend_on_the_moments(commands, torch_run):
    """Otherwise the test above would pass without the moments."""
    expected = torch_run(*EIGHT)
    fresh = commands.resume_at(expected, 4, "train.resume_weights_only=true")
    assert fresh.losses[0] == expected.losses[4]
    assert fresh.losses[1:] != pytest.approx(expected.losses[5:], rel=0, abs=1e-5)


@pytest.mark.parametrize(
    ("optimizer", "first", "second", "kinds"),
    [
        (SGD, IPU, TORCH, ("poptorch.SGD", "torch.SGD")),
        (SGD, TORCH, IPU, ("torch.SGD", "poptorch.SGD")),
        (LAMB, IPU, (*TORCH, "optim.name=adamw"), ("poptorch.LAMB", "torch.AdamW")),
        (LAMB, IPU, ("optim.name=adamw",), ("poptorch.LAMB", "poptorch.AdamW")),
        (
            LAMB,
            IPU,
            ("optim.bias_correction=false",),
            ("poptorch.LAMB", "poptorch.LAMB, no bias correction"),
        ),
        (
            SGD,
            IPU,
            ("optim.use_combined_accum=true",),
            ("poptorch.SGD", "poptorch.SGD with loss scaling 1.0, combined accumulator"),
        ),
    ],
    ids=["sgd from", "sgd to", "lamb from", "lamb to adamw", "lamb without bias", "combined sgd"],
)
def test_state_of_another_optimizer_is_refused(
    commands, first_run, optimizer, first, second, kinds
):
    begun = first_run(*SHORT, *optimizer, on=first)
    given, own = kinds
    message = rf"state of {given}\b.*; this engine has {own}\b.*train\.resume_weights_only=true"
    with pytest.raises(CheckpointError, match=message):
        commands.resume_at(begun, 4, *second)
    resumed = commands.resume_at(begun, 4, *second, "train.resume_weights_only=true")
    assert resumed.status == 0
    assert resumed.losses[0] == pytest.approx(begun.losses[4], rel=0, abs=1e-5)
    assert trainer_state(resumed)["optimizer_kind"].startswith(own)
    assert trainer_state(resumed)["scalars"]["updates"] == 8


def test_velocity_of_sgd_belongs_to_its_loss_scaling(ipu, commands):
    """PopART stores it multiplied by the scale."""
    first_run = commands.train(*SHORT, *SGD, "optim.loss_scaling=8")
    with pytest.raises(CheckpointError, match=r"scaling 8\.0; .* scaling 16\.0\."):
        commands.resume_at(first_run, 4, "optim.loss_scaling=16")
    assert commands.resume_at(first_run, 4).losses == first_run.losses[4:]


def test_random_state_of_another_number_of_ipus_is_not_used(ipu, commands, said):
    first_run = commands.train(*EIGHT, "model.dropout=0.1")
    resumed = commands.resume_at(first_run, 4, "pipeline.layers_per_stage=[2, 2]")
    assert resumed.status == 0
    assert "the random state belongs to another number of IPUs" in said.text
    said.clear()
    commands.resume_at(first_run, 4)
    assert "random state" not in said.text


def test_another_cut_changes_no_loss_after_resume(commands, first_run):
    begun = first_run(*EIGHT)
    resumed = commands.resume_at(begun, 4, "pipeline.layers_per_stage=[2, 2]")
    assert resumed.losses == pytest.approx(begun.losses[4:], rel=0, abs=1e-6)


def test_sgd_equals_torchs(first_run, torch_run):
    settings = (*SHORT, *SGD)
    run = first_run(*settings)
    assert run.losses == pytest.approx(torch_run(*settings).losses, rel=0, abs=1e-5)


def test_plain_transformers_computes_the_same_logits_from_ipu_weights(ipu, commands):
    run = commands.train("train.steps=2", "model.hidden_act=null")
    config = json.loads((run.checkpoint() / "config.json").read_text())
    assert config["hidden_act"] == "gelu_pytorch_tanh", "what an IPU computes"
    model = ViTForImageClassification.from_pretrained(str(run.checkpoint())).eval()
    data = ChestXrayDataModule(read_config([run.path / "config.yaml"]))
    dataset = data.dataset("val")
    images = torch.stack([dataset[row].image for row in range(len(dataset))]).float()
    with torch.no_grad():
        logits = model(((images / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)).logits
    assert torch.allclose(logits, run.logits[-1], rtol=0, atol=1e-5)


def test_checkpoint_with_exact_gelu_is_scored_with_the_tanh_form(ipu, commands, said):
    exact = commands.train("model.hidden_act=null", *TORCH)
    config = json.loads((exact.checkpoint() / "config.json").read_text())
    assert config["hidden_act"] == "gelu"
    on_torch = commands.evaluate(exact.checkpoint(), *TORCH)
    on_ipus = commands.evaluate(exact.checkpoint(), *IPU)
    assert "tanh form of GELU" in said.text
    assert on_ipus != on_torch
    for ours, theirs in zip(on_ipus, on_torch):
        assert ours == pytest.approx(theirs, abs=1e-3)


#: The harness of the front end needs a second per fp16 micro-batch, so there is one per step.
ONE_MICRO_BATCH = (
    "batch.micro_batch_size=7",
    "batch.gradient_accumulation=1",
    "pipeline.execution=sharded",
    "batch.eval_micro_batch_size=12",
    "batch.eval_device_iterations=1",
    "pipeline.eval_execution=sharded",
    "train.steps=4",
    "train.checkpoint_every_steps=2",
)


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_fp16_is_close_to_fp32_and_resumes(ipu, commands, torch_run, weights):
    poptorch, inspection = ipu
    # The harness stores moments in the weights' dtype: in fp16 the second one underflows, and a
    # step is then larger than fp32's.
    same = (*ONE_MICRO_BATCH, f"optim.lr={1e-4 if weights == 'fp16' else 1e-3}")
    expected = torch_run(*same)
    half = ("engine.precision=fp16", f"engine.weights={weights}", "optim.loss_scaling=64")
    run = commands.train(*same, *half)
    training = compiled(inspection)[1]
    own = torch.float16 if weights == "fp16" else torch.float32
    assert {weight.dtype for weight in training.model.parameters()} == {own}
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.losses == pytest.approx(expected.losses, rel=0, abs=5e-3)
    assert run.losses != pytest.approx(expected.losses, rel=0, abs=1e-7)
    saved = load_file(str(run.checkpoint() / "model.safetensors"))
    assert {weight.dtype for weight in saved.values()} == {torch.float32}
    if weights == "fp16" and poptorch.__version__.endswith("+stub"):
        return  # the moments of the checkpoint are fp32
    assert commands.resume_at(run, 2).losses == run.losses[2:]


def test_fp16_in_a_pipeline(commands, torch_run):
    """On the stand-in only: the harness would be too slow."""
    expected = torch_run()
    with loading.stand_in():
        run = commands.train("engine.precision=fp16", "optim.loss_scaling=64")
    assert run.losses == pytest.approx(expected.losses, rel=0, abs=5e-3)
    assert run.losses != pytest.approx(expected.losses, rel=0, abs=1e-7)


def test_default_precision_is_fp16(ipu, commands):
    with make_engine(commands.config("engine.precision=auto")) as engine:
        assert engine.precision == "fp16"
        assert "in fp16 with fp32 weights" in engine.describe()
        assert {stage.dtype for stage in engine.model.stages} == {torch.float16}


# The model after the engine


@pytest.mark.parametrize("weights", ["fp32", "fp16"])
def test_closed_engine_leaves_a_model_for_the_host_and_for_another_engine(ipu, commands, weights):
    small = ("model.patch_size=16", "pipeline.layers_per_stage=[2, 2]")
    config = commands.config(
        *small,
        "batch.gradient_accumulation=3",
        "engine.precision=fp16",
        f"engine.weights={weights}",
    )
    module = module_of(config, for_ipu=True)
    kinds = [type(part) for part in module.modules()]
    states = [module.model.weights()]
    for lr in (0.1, 0.0):
        engine = engine_of(config, module)
        try:
            batch = example(engine)
            engine.compile(batch)
            engine.train_step(batch, lr=lr)
            states.append(engine.state_dict().weights)
        finally:
            engine.close()
        assert [type(part) for part in module.modules()] == kinds
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
        fresh = module_of(config, for_ipu=True)
        fresh.model.load_weights(states[-1])
        with torch.no_grad():
            logits = module.eval()(batch.images)
            expected = fresh.eval()(batch.images)
        assert logits.dtype == torch.float32
        assert torch.equal(logits, expected)
    start, trained, same = (state["classifier.weight"] for state in states)
    assert not torch.equal(start.half(), trained.half())
    assert torch.equal(trained, same), "the second engine begins where the first ended"
