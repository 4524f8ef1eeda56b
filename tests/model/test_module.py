"""ViTModule and its overrides, on the torch engine and on both implementations of PopTorch."""

import contextlib
import json
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cxr_vit
from conftest import SMALL, engine_of, module_of
from cxr_vit import Callback, ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.config import load_config
from cxr_vit.data.dataset import Batch
from cxr_vit.errors import CheckpointError, ConfigError, DataError, ModelError
from cxr_vit.training.checkpoint import load_checkpoint
from fakes import loading

#: What the stand-in and the front end need: an accumulation for two stages.
IPU = (
    "engine.name=poptorch",
    "engine.device=auto",
    "engine.executable_cache=null",
    "model.hidden_act=gelu_pytorch_tanh",
    "batch.micro_batch_size=1",
    "batch.gradient_accumulation=3",
    "batch.eval_micro_batch_size=2",
    "batch.eval_device_iterations=2",
    "pipeline.layers_per_stage=[2, 2]",
)
TORCH = (*IPU, "engine.name=torch", "engine.device=cpu")
FOUR_STEPS = (
    "train.steps=4",
    "train.eval_every_steps=100",
    "train.checkpoint_every_steps=2",
    "train.keep_last=9",
)


@contextlib.contextmanager
def place_of(name):
    """Yield the overrides of a place to train, and PopTorch's inspection there."""
    if name == "torch":
        yield TORCH, None
        return
    reason = loading.available() if name == "front end" else None
    if reason:
        pytest.skip(reason)
    context = loading.stand_in if name == "stand-in" else loading.frontend
    with torch.random.fork_rng(devices=[]), context() as (_, inspection):
        yield IPU, inspection


@pytest.fixture(params=["torch", "stand-in", "front end"])
def place(request):
    with place_of(request.param) as (overrides, _):
        yield overrides


@pytest.fixture(params=["stand-in", "front end"])
def ipu(request):
    with place_of(request.param) as found:
        yield found


@pytest.fixture(scope="module")
def data(sample_root):
    return ChestXrayDataModule(load_config([], [*SMALL, f"data.root={sample_root}"]))


@pytest.fixture
def configure(make_config, tmp_path):
    """Make the configuration of a run of four steps."""

    def make(*overrides, folder="run"):
        return make_config(*FOUR_STEPS, *overrides, f"run.dir={tmp_path / folder}")

    return make


class Losses(Callback):
    """Records the losses and the rates of the parameter groups."""

    def __init__(self):
        self.losses = []
        self.rates = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.extend(outputs.losses.tolist())
        self.rates.append([group["lr"] for group in trainer.engine.optimizer.param_groups])


def fit(config, module, data, ckpt_path=None):
    """Train; return the trainer and what was recorded."""
    recorded = Losses()
    trainer = Trainer(config, callbacks=[recorded], loggers=[])
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer, recorded


def cut_after(run, step, folder):
    """Copy a run as if it had been killed after a step."""
    shutil.copytree(str(run), str(folder), symlinks=True)
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(str(path))
    return folder


def assert_resumes(config_of, kind, data, tmp_path):
    """Assert that a run of `kind` resumes bit for bit; return the trainer of the whole run."""
    config = config_of(folder="whole")
    trainer, whole = fit(config, kind(config, data), data)
    cut = cut_after(trainer.run.path, 2, tmp_path / "cut")
    config = config_of(folder="cut")
    _, resumed = fit(config, kind(config, data), data, ckpt_path=cut)
    assert len(whole.losses) == 4
    assert len(set(whole.losses)) == 4
    assert resumed.losses == whole.losses[2:]
    (one, _), (other, _) = (
        load_checkpoint(path / "checkpoints" / "last") for path in (trainer.run.path, cut)
    )
    assert one.optimizer_kind == other.optimizer_kind
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    assert one.optimizer.keys() == other.optimizer.keys()
    for name, slots in one.optimizer.items():
        assert all(torch.equal(slots[slot], other.optimizer[name][slot]) for slot in slots), name
    return trainer


# A head of one's own


class TwoLayers(ViTModule):
    """Has a hidden layer before the logits."""

    def configure_model(self):
        model = super().configure_model()
        width = model.config.hidden_size
        model.classifier = nn.Sequential(
            nn.Linear(width, 24), nn.GELU(approximate="tanh"), nn.Linear(24, len(self.names))
        )
        return model


def test_head_of_several_layers_trains_resumes_and_is_scored(place, configure, data, tmp_path):
    trainer = assert_resumes(
        lambda folder: configure(*place, folder=folder), TwoLayers, data, tmp_path
    )
    saved = load_checkpoint(trainer.run.path / "checkpoints" / "last")[0]
    head = {"classifier.0.weight", "classifier.0.bias", "classifier.2.weight", "classifier.2.bias"}
    assert {name for name in saved.weights if name.startswith("classifier")} == head
    assert float(saved.optimizer["classifier.2.bias"]["step"]) == 4
    expected = trainer.test(trainer.module, data)
    logits = trainer.test_outputs.logits
    config = configure(*place, folder="other")
    module = TwoLayers.load_from_checkpoint(trainer.run.path, data, config)
    scoring = Trainer(config)
    assert scoring.test(module, data) == expected
    assert torch.equal(scoring.test_outputs.logits, logits)


def test_head_of_ones_own_trains_as_on_torch(ipu, configure, data):
    overrides, _ = ipu
    losses = []
    for folder, more in (("ipu", overrides), ("torch", TORCH)):
        config = configure(*more, folder=folder)
        losses.append(fit(config, TwoLayers(config, data), data)[1].losses)
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-5)


def test_new_parameters_are_set_by_the_seed_and_leave_the_generator_alone(make_config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    heads = []
    for seed in (0, 0, 1):
        module = TwoLayers(make_config(f"run.seed={seed}"))
        module.setup()
        heads.append(module.model.weights()["classifier.0.weight"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_plain_module_does_not_take_the_weights_of_another_head(configure, data, make_config):
    config = configure("train.steps=2")
    trainer, _ = fit(config, TwoLayers(config, data), data)
    plain = ViTModule.load_from_checkpoint(trainer.run.path, data)
    with pytest.raises(CheckpointError, match=r"the weights are of another model: missing class"):
        plain.setup()


# Groups


class SlowTrunk(ViTModule):
    """Trains all but the head at a tenth of the rate."""

    def parameter_groups(self):
        trunk, head = [], []
        for name, parameter in self.model.hub_parameters():
            (head if name.startswith("classifier") else trunk).append(parameter)
        groups = [
            {"params": head, "weight_decay": 0.1},
            {"params": trunk, "lr": 0.1 * self.config.optim.lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


SCHEDULE = ("optim.lr=0.01", "schedule.warmup_steps=2", "schedule.name=linear")


def test_group_keeps_the_ratio_of_its_rate(place, configure, data):
    config = configure(*place, *SCHEDULE)
    _, recorded = fit(config, SlowTrunk(config, data), data)
    assert [rates[0] for rates in recorded.rates] == pytest.approx([0, 0.005, 0.01, 0.005])
    assert [rates[1] for rates in recorded.rates] == pytest.approx([0, 0.0005, 0.001, 0.0005])


def test_rates_of_groups_reach_the_device(ipu, configure, data):
    overrides, _ = ipu
    losses = {}
    for name, kind, more in (
        ("ipu", SlowTrunk, overrides),
        ("torch", SlowTrunk, TORCH),
        ("one rate", ViTModule, TORCH),
    ):
        config = configure(*more, *SCHEDULE, folder=name)
        losses[name] = fit(config, kind(config, data), data)[1].losses
    assert losses["ipu"] == pytest.approx(losses["torch"], rel=0, abs=1e-5)
    assert losses["one rate"] != pytest.approx(losses["torch"], rel=0, abs=1e-3)


class HeadOnly(ViTModule):
    """Trains the head alone; the other parameters are in no group."""

    def parameter_groups(self):
        named = self.model.hub_parameters()
        head = [parameter for name, parameter in named if name.startswith("classifier")]
        return [{"params": head}]


class FrozenTrunk(ViTModule):
    """Trains the head alone; the trunk is frozen."""

    def configure_model(self):
        model = super().configure_model()
        model.vit.requires_grad_(False)
        return model


@pytest.mark.parametrize("kind", [HeadOnly, FrozenTrunk])
def test_head_alone_trains_and_resumes(place, configure, data, tmp_path, kind):
    trainer = assert_resumes(lambda folder: configure(*place, folder=folder), kind, data, tmp_path)
    state, _ = load_checkpoint(trainer.run.path / "checkpoints" / "last")
    start = ViTModule(configure(*place, folder="new"), data)
    start.setup(for_ipu=trainer.choice.is_ipu)
    first = start.model.weights()
    changed = {name for name in first if not torch.equal(first[name], state.weights[name])}
    assert changed == {"classifier.weight", "classifier.bias"}


def test_frozen_parameters_do_not_count_in_the_gradient_norm(configure, data):
    norms = []
    for kind in (HeadOnly, FrozenTrunk):
        config = configure(*TORCH, "optim.max_grad_norm=0.01", folder=kind.__name__)

        class Norms(Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                norms.append(outputs.grad_norm.item())

        Trainer(config, callbacks=[Norms()], loggers=[]).fit(kind(config, data), data)
    assert norms[:4] == pytest.approx(norms[4:], rel=1e-4)


# Optimizers


class OwnOptimizer(ViTModule):
    """Has one of torch's optimizers."""

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameter_groups(), lr=self.config.optim.lr)


class PlainSgd(ViTModule):
    """Has an optimizer without state."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameter_groups(), lr=self.config.optim.lr)


@pytest.mark.parametrize(
    ("kind", "name", "slots"),
    [
        (OwnOptimizer, "torch.Adam", {"exp_avg", "exp_avg_sq", "step"}),
        (PlainSgd, "torch.SGD", {"no_state"}),
    ],
)
def test_optimizer_of_torch_trains_and_resumes(configure, data, tmp_path, kind, name, slots):
    trainer = assert_resumes(
        lambda folder: configure(*TORCH, "optim.lr=0.01", folder=folder), kind, data, tmp_path
    )
    state, _ = load_checkpoint(trainer.run.path / "checkpoints" / "last")
    assert state.optimizer_kind == name
    assert set(state.optimizer.get("classifier.bias", {})) == slots


def test_optimizer_of_torch_is_refused_on_ipus_before_compiling(ipu, configure, data, tmp_path):
    overrides, inspection = ipu
    config = configure(*overrides)
    with pytest.raises(ConfigError) as caught:
        fit(config, OwnOptimizer(config, data), data)
    message = str(caught.value)
    assert message.startswith("OwnOptimizer.configure_optimizers returns torch.optim.adam.Adam.")
    assert "PopTorch takes only optimizers of poptorch.optim (AdamW, Adam, LAMB" in message
    assert "where self.for_ipu is true, or set engine.name=torch" in message
    assert inspection.log().calls("compiled") == []
    assert not (tmp_path / "run").exists()


class EitherOptimizer(ViTModule):
    """Has AdamW with betas of its own on every device."""

    def configure_optimizers(self):
        if self.for_ipu:
            from poptorch import optim
        else:
            optim = torch.optim
        groups, lr = self.parameter_groups(), self.config.optim.lr
        return optim.AdamW(groups, lr=lr, betas=(0.5, 0.6))


def test_optimizer_of_poptorch_is_used_on_ipus(ipu, configure, data, tmp_path):
    overrides, _ = ipu
    settings = ("optim.max_grad_norm=null", "optim.lr=0.01")
    trainer = assert_resumes(
        lambda folder: configure(*overrides, *settings, folder=folder),
        EitherOptimizer,
        data,
        tmp_path,
    )
    state, _ = load_checkpoint(trainer.run.path / "checkpoints" / "last")
    assert state.optimizer_kind == "poptorch.AdamW"
    moments = {}
    for kind in (EitherOptimizer, ViTModule):
        config = configure(*TORCH, *settings, folder=kind.__name__)
        other, _ = fit(config, kind(config, data), data)
        slots = load_checkpoint(other.run.path / "checkpoints" / "last")[0].optimizer
        moments[kind] = slots["classifier.bias"]["exp_avg_sq"]
    ours = state.optimizer["classifier.bias"]["exp_avg_sq"]
    assert torch.allclose(ours, moments[EitherOptimizer], rtol=1e-3, atol=0)
    assert not torch.allclose(ours, moments[ViTModule], rtol=1e-1, atol=0)


class OwnSettings(ViTModule):
    """Has an optimizer of PopTorch with settings of its own."""

    kind, settings = "AdamW", None

    def configure_optimizers(self):
        import poptorch

        kind = getattr(poptorch.optim, self.kind)
        return kind(self.parameter_groups(), lr=self.config.optim.lr, **self.settings)


@pytest.fixture
def optimizer_on_ipus(ipu, make_config, monkeypatch):
    """Return the kind that the engine records for an optimizer of PopTorch."""
    overrides, _ = ipu

    def make(*more, kind="AdamW", **settings):
        monkeypatch.setattr(OwnSettings, "kind", kind)
        monkeypatch.setattr(OwnSettings, "settings", settings)
        config = make_config(*overrides, "optim.max_grad_norm=null", *more)
        module = OwnSettings(config)
        module.setup(for_ipu=True)
        engine = engine_of(config, module)
        engine.close()
        return engine.optimizer_kind

    return make


def test_clipping_that_the_optimizer_does_not_do_is_refused(optimizer_on_ipus):
    message = r"optim\.max_grad_norm=0\.5, but the optimizer of configure_optimizers \(AdamW\) does"
    with pytest.raises(ConfigError, match=message):
        optimizer_on_ipus("optim.max_grad_norm=0.5")
    optimizer_on_ipus("optim.max_grad_norm=0.5", max_grad_norm=0.5)


def test_settings_that_the_optimizer_does_not_use_are_warned_of(optimizer_on_ipus, caplog):
    changed = ("optim.loss_scaling=8", "optim.accumulator=fp16", "optim.first_moment=fp16")
    optimizer_on_ipus()
    own = {"accum_type": torch.float16, "first_order_momentum_accum_type": torch.float16}
    optimizer_on_ipus(*changed, loss_scaling=8.0, **own)
    assert "configure_optimizers does not use" not in caplog.text
    changed = (*changed, "optim.second_moment=fp16", "optim.eps=1e-3")
    optimizer_on_ipus(*changed, loss_scaling=8.0)
    ignored = "optim.accumulator=fp16, optim.first_moment=fp16, optim.second_moment=fp16"
    assert f"configure_optimizers does not use {ignored}\n" in caplog.text


def test_recorded_kind_has_the_scale_of_the_optimizer(optimizer_on_ipus):
    own = {"use_combined_accum": False, "momentum": 0.9}
    scaled = optimizer_on_ipus("optim.loss_scaling=8", kind="SGD", loss_scaling=4.0, **own)
    assert scaled == "poptorch.SGD with loss scaling 4.0"
    assert optimizer_on_ipus("optim.name=sgd", "optim.loss_scaling=8") == "poptorch.AdamW"


# Schedule and metrics


class Constant(ViTModule):
    """Has a rate and a metric of its own."""

    def learning_rate(self, step, total_steps):
        return 0.01 * (step + 1) / total_steps

    def compute_metrics(self, logits, labels):
        return {"positives": labels.sum().item()}


def test_schedule_and_metrics_of_ones_own(configure, data, caplog):
    config = configure(*TORCH, "optim.lr=0.01")
    trainer, recorded = fit(config, Constant(config, data), data)
    assert [rates[0] for rates in recorded.rates] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    positives = trainer.callback_metrics["val/positives"]
    assert positives == trainer.validation_outputs.labels.sum().item() > 0
    assert "val/auroc_macro is undefined at step 4: best follows the last one" in caplog.text
    assert trainer.checkpoints.linked("best") == trainer.checkpoints.linked("last")


# What is refused


class Temperature(ViTModule):
    """Has a parameter outside the model."""

    def __init__(self, config, data=None, **options):
        super().__init__(config, data, **options)
        self.temperature = nn.Parameter(torch.ones(1))


def test_parameter_outside_the_model_is_refused(configure, data, tmp_path):
    config = configure()
    with pytest.raises(ModelError, match=r"Temperature has parameters outside .*: temperature\."):
        fit(config, Temperature(config, data), data)
    assert not (tmp_path / "run").exists()


class NormalisedHead(ViTModule):
    """Has a layer with buffers in its head."""

    layer = nn.BatchNorm1d

    def configure_model(self):
        model = super().configure_model()
        model.classifier = nn.Sequential(self.layer(model.config.hidden_size), model.classifier)
        return model


class Scaled(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("scale", torch.ones(width), persistent=False)

    def forward(self, value):
        return value * self.scale


def test_batch_norm_in_the_head_is_refused(configure, data, tmp_path):
    config = configure()
    message = r"buffers in its head: classifier\.0\.running_mean, .*nn\.LayerNorm"
    with pytest.raises(ModelError, match=message):
        fit(config, NormalisedHead(config, data), data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("layer", [nn.LayerNorm, Scaled])
def test_head_without_state_in_buffers_is_accepted(make_config, monkeypatch, layer):
    monkeypatch.setattr(NormalisedHead, "layer", layer)
    module = NormalisedHead(make_config())
    module.setup()
    assert module(torch.zeros(2, 1, 32, 32, dtype=torch.uint8)).shape == (2, 14)


class NothingTrained(ViTModule):
    """Has no groups."""

    def parameter_groups(self):
        return []


def test_module_that_trains_nothing_is_refused(configure, data, tmp_path):
    config = configure()
    with pytest.raises(ConfigError, match=r"NothingTrained\.parameter_groups returned no group"):
        fit(config, NothingTrained(config, data), data)
    assert not (tmp_path / "run").exists()


def test_misspelt_hub_name_is_refused_by_the_constructor(make_config, tmp_path):
    """Before the data are opened."""
    config = make_config(
        "model.name=google/vit-bse-patch8", f"data.root={tmp_path}", f"data.cache_dir={tmp_path}"
    )
    data = ChestXrayDataModule(config)
    with pytest.raises(ModelError, match=r"cannot load model\.name='google/vit-bse-patch8'"):
        ViTModule(config, data)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def trained(sample_root, tmp_path_factory, data):
    """The folder of a run of two steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    overrides = [*SMALL, "train.steps=2", f"data.root={sample_root}", f"run.dir={run}"]
    config = load_config([], overrides)
    fit(config, ViTModule(config, data), data)
    return run


def test_module_of_a_run_has_its_best_weights_and_configuration(trained):
    module = ViTModule.load_from_checkpoint(trained)
    module.setup()
    assert module.config.train.steps == 2
    assert module.checkpoint == trained / "checkpoints" / "best"
    saved = load_checkpoint(trained / "checkpoints" / "best")[0].weights
    assert all(torch.equal(saved[name], weight) for name, weight in module.model.weights().items())


def test_checkpoint_loads_although_the_initial_weights_are_gone(trained, make_config, tmp_path):
    """A run that began from a folder of weights, which was deleted."""
    config = load_config([trained / "config.yaml"], [f"model.name={tmp_path / 'gone'}"])
    ViTModule.load_from_checkpoint(trained / "checkpoints" / "last", config=config).setup()


def test_checkpoint_with_other_labels_is_refused(trained, make_config):
    config = make_config("data.include_no_finding=true")
    with pytest.raises(ModelError, match=r"has the labels .*data\.include_no_finding"):
        ViTModule.load_from_checkpoint(trained, config=config)


def test_checkpoint_knows_the_labels_that_a_pattern_matched(trained):
    """The table need not be there: its labels are those of the checkpoint."""
    table = ["data.format=table", "data.csv=gone.csv", "data.columns={image: a, patient: b}"]
    config = load_config([trained / "config.yaml"], [*table, "data.labels='*'"])
    module = ViTModule.load_from_checkpoint(trained, config=config)
    module.setup()
    assert module.names == ViTModule.load_from_checkpoint(trained).names
    with pytest.raises(DataError, match=r"data\.csv=gone\.csv: no such file"):
        ViTModule(config)


def test_checkpoint_of_another_size_is_refused(trained, make_config):
    with pytest.raises(ModelError, match=r"takes images of 32 pixels.*Set data\.image_size=32"):
        ViTModule.load_from_checkpoint(trained, config=make_config("data.image_size=64"))


def test_path_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"it has no trainer_state\.json"):
        ViTModule.load_from_checkpoint(tmp_path)


# Details


class WithBuffers(ViTModule):
    """Has buffers of its own, and a child module with one."""

    def __init__(self, config, data=None, **options):
        super().__init__(config, data, **options)
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("nothing", None)
        self.criterion = nn.BCEWithLogitsLoss(pos_weight=torch.ones(14))


def test_buffers_move_to_the_device_and_are_not_saved(make_config):
    module = WithBuffers(make_config())
    module.setup()
    module.to_device(torch.device("meta"))
    assert module.scale.is_meta
    assert module.criterion.pos_weight.is_meta
    assert module.nothing is None
    assert not [name for name, _ in module.model.hub_parameters() if "scale" in name]


def test_forward_maps_images_to_logits(make_config):
    module = ViTModule(make_config())
    module.setup()
    images = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    assert module(images).shape == (2, len(module.names))


def test_module_without_data_has_a_head_without_prior(make_config, data):
    bare, informed = ViTModule(make_config()), ViTModule(make_config(), data)
    for module in (bare, informed):
        module.setup()
    assert bare.model.weights()["classifier.bias"].abs().max() == 0
    prevalence = torch.from_numpy(data.prevalence()).float()
    bias = informed.model.weights()["classifier.bias"]
    assert torch.allclose(bias.sigmoid(), prevalence, atol=1e-6)


def test_second_setup_keeps_the_model(make_config):
    module = ViTModule(make_config())
    module.setup()
    model = module.model
    module.setup()
    assert module.model is model


def test_public_name_is_the_class(make_config):
    assert cxr_vit.ViTModule is ViTModule
    assert json.dumps(ViTModule(make_config()).names[0]) == '"Atelectasis"'


@pytest.mark.parametrize(
    ("name", "advice"),
    [("training_step", "Override loss"), ("forward", "override configure_model")],
)
def test_method_that_is_never_called_is_refused(name, advice):
    with pytest.raises(ModelError, match=f"Mine.{name} is never called. .*{advice}"):
        type("Mine", (ViTModule,), {name: lambda self: None})


def test_loss_that_is_no_scalar_is_refused_before_training(make_config):
    class PerSample(ViTModule):
        def loss(self, logits, labels):
            return (logits - labels).square().mean(dim=1)

    with pytest.raises(ModelError, match=r"PerSample\.loss returned a tensor of shape \[2\]"):
        PerSample(make_config()).setup()


def test_optimizer_with_a_scheduler_is_refused(make_config):
    class Lightning(ViTModule):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameter_groups(), lr=0.1)], []

    config = make_config()
    module = Lightning(config)
    module.setup()
    with pytest.raises(ConfigError, match=r"returned tuple\. Return one optimizer"):
        engine_of(config, module)


def test_loss_knows_whether_it_trains(make_config):
    seen = []

    class Smooths(ViTModule):
        def loss(self, logits, labels):
            seen.append(self.training)
            return super().loss(logits, labels)

    config = make_config()
    module = Smooths(config)
    module.setup()
    with engine_of(config, module) as engine:
        engine.train_step(Batch.zeros(8, image_size=32, num_classes=14), lr=0.1)
        del seen[:-1]
        engine.loss(torch.zeros(4, 14), torch.zeros(4, 14))
    assert seen == [True, False]


def test_hook_of_a_module_is_refused():
    with pytest.raises(ModelError, match=r"Mine.on_fit_start is never called\. Hooks belong to"):
        type("Mine", (ViTModule,), {"on_fit_start": lambda self: None})


def test_another_rate_for_all_parameters_is_refused(make_config):
    class OwnRate(ViTModule):
        def configure_optimizers(self):
            return torch.optim.Adam(self.model.parameters(), lr=1e-5)

    config = make_config("optim.lr=1e-3")
    module = OwnRate(config)
    module.setup()
    with pytest.raises(ConfigError, match=r"passes lr=1e-05 to Adam, and 0\.001 is what"):
        engine_of(config, module)


# Weights of rare positives


@pytest.mark.parametrize("loss", ["{name: bce}", "{name: weighted_bce, max_positive_weight: 3}"])
def test_new_bias_is_the_constant_with_the_least_loss(make_config, loss):
    config = make_config(f"loss={loss}")
    data = ChestXrayDataModule(config)
    module = module_of(config, data)
    bias = module.model.weights()["classifier.bias"][None].requires_grad_()
    share = torch.from_numpy(data.prevalence()).float()[None]
    module.loss(bias, share).backward()  # linear in the labels: the mean over the images
    assert bias.grad.abs().max() < 1e-7
    other = bias.detach() + 0.1
    assert module.loss(other, share) > module.loss(bias, share)


def test_checkpoint_has_the_weights_of_its_training_images(make_config, tmp_path):
    shared = ("loss.name=weighted_bce", "loss.max_positive_weight=4", f"run.dir={tmp_path / 'run'}")
    config = make_config(*shared, "train.steps=1")
    data = ChestXrayDataModule(config)
    trainer = Trainer(config, loggers=[])
    module = ViTModule(config, data)
    trainer.fit(module, data)
    prevalence = torch.from_numpy(data.prevalence())
    weight = ((1 - prevalence) / prevalence).clamp(max=4).float()
    logits, labels = torch.randn(8, 14), torch.randint(0, 2, (8, 14)).float()
    expected = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
    assert torch.equal(module.loss(logits, labels), expected)

    other = make_config("data.val_fraction=0.5", "run.seed=3")  # other training images
    scored = ViTModule.load_from_checkpoint(tmp_path / "run", ChestXrayDataModule(other))
    validated = Trainer(scored.config, loggers=[]).validate(scored, data)
    assert torch.equal(scored.loss(logits, labels), expected)
    assert validated["val/loss"] == pytest.approx(trainer.callback_metrics["val/loss"], abs=1e-6)


def test_weights_of_positives_need_training_images(make_config):
    module = ViTModule(make_config("loss.name=weighted_bce"))
    with pytest.raises(ModelError, match=r"weighted_bce needs the training images.*ViTModule\(con"):
        module.setup()
