"""torch.compile: the same numbers, no graph breaks, and few graphs."""

import contextlib
import importlib
import importlib.util
import re
import sysconfig

import pytest
import torch
from torch import nn

from conftest import engine_of, module_of
from cxr_vit.config.architectures import KINDS
from cxr_vit.config.plans import StagePlan
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import Batch
from cxr_vit.engines import compiled
from cxr_vit.engines.choice import choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import DeviceError, EngineUnavailable, ModelError
from cxr_vit.model.drop_path import DropPath
from cxr_vit.model.module import ViTModule
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import VitParts
from families import CURRENT, FAMILIES, images, make, needs_current, save
from plain_loop import UNKNOWN

#: Those of torch.compile itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]
can_compile = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < compiled._OLDEST,
    reason="this torch refuses engine.compile",
)
#: Everything that changes what is computed in training.
RICH = ("model.dropout=0.1", "model.drop_path=0.5", "optim.max_grad_norm=1")


# What is refused


@pytest.mark.parametrize("how", ["layers", "whole"])
def test_an_old_torch_is_refused_in_one_line(make_config, monkeypatch, how):
    monkeypatch.setattr(torch, "__version__", "2.0.1+cpu")
    with pytest.raises(EngineUnavailable) as raised:
        choose_engine(make_config(f"engine.compile={how}"), Launch())
    assert str(raised.value) == (
        f"engine.compile={how} needs torch 2.5 or later; this is 2.0.1+cpu. Install a newer torch,"
        " or set engine.compile=off."
    )
    assert choose_engine(make_config("engine.compile=off"), Launch()).name == "torch"


def test_a_machine_without_a_compiler_is_refused_in_one_line(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.5.0")
    config = make_config("engine.compile=layers")
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    with pytest.raises(EngineUnavailable, match=r"^engine\.compile=layers needs a C\+\+ comp.*"):
        choose_engine(config, Launch())
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(EngineUnavailable, match=r"the headers of Python .*, or set engine\.comp"):
        choose_engine(config, Launch())
    (tmp_path / "Python.h").write_text("")
    assert choose_engine(config, Launch()).name == "torch"


def test_a_gpu_needs_triton_a_c_compiler_and_headers(make_config, monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "2.5.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    engine = make_config("engine.compile=layers", "engine.device=cuda").engine
    with pytest.raises(EngineUnavailable, match=r"compile=layers needs triton on a GPU, .*=off"):
        compiled.check_compile(engine)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    with pytest.raises(EngineUnavailable, match=r"a C compiler on a GPU, .* variable CC, or set"):
        compiled.check_compile(engine)
    (tmp_path / "cc").write_text("#!/bin/sh\n")
    (tmp_path / "cc").chmod(0o755)
    with pytest.raises(EngineUnavailable, match="the headers of Python on a GPU"):
        compiled.check_compile(engine)
    (tmp_path / "Python.h").write_text("")
    compiled.check_compile(engine)


# Graphs


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are made, one entry each; they are not compiled further."""
    made = []

    def backend(graph, example_inputs):
        made.append(graph)
        return graph

    importlib.import_module("torch._dynamo").reset()
    monkeypatch.setattr(compiled, "_COMPILER", {"backend": backend})
    return made


def logits_and_gradients(kind, how, recompute="none", cut=(4,)):
    hub = make(kind, num_hidden_layers=4, hidden_dropout_prob=0.1)
    plan = StagePlan.from_list(cut)
    model = StagedViT(hub, plan, mean=0.5, std=0.5).train()
    model.recompute(plan.kept_outputs(recompute, on_ipus=False))
    compiled.compile_stages(model, how)
    torch.manual_seed(0)
    logits = model(images(32, 6), DropPath(0.5, 4, seed=0).factors(0, torch.arange(6), 6))
    logits.square().sum().backward()
    return [logits.detach(), *(weight.grad for _, weight in model.hub_parameters())]


def assert_same(results, expected):
    for one, other in zip(results, expected):
        assert (one is None) == (other is None)
        assert one is None or torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@can_compile
@pytest.mark.parametrize("kind", CURRENT)
def test_all_layers_have_one_graph_and_the_last_one_its_own_for_the_class_token(kind, graphs):
    expected = logits_and_gradients(kind, "off")
    assert graphs == []
    assert_same(logits_and_gradients(kind, "layers"), expected)
    assert len(graphs) == (1 if KINDS[kind].pooling == "both" else 2)


@can_compile
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_whole_stage_is_one_graph(kind, graphs):
    expected = logits_and_gradients(kind, "off", cut=(1, 3))
    assert_same(logits_and_gradients(kind, "whole", cut=(1, 3)), expected)
    assert len(graphs) == 2, "a graph break raises an error"


@can_compile
@needs_current("vit")
def test_every_recomputation_is_compiled(graphs):
    expected = logits_and_gradients("vit", "off")
    for recompute, count in (("every_layer", 2), ("attention_mlp", 6), ("stage_inputs", 6)):
        assert_same(logits_and_gradients("vit", "layers", recompute), expected)
        assert len(graphs) == count, recompute


class Scaled(nn.Linear):
    """Has a buffer."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(sizes[1]), persistent=False)

    def forward(self, input):
        return super().forward(input) * self.scale


def two_layers(width, labels):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 24), nn.GELU(), Scaled(24, labels))


#: Pooling, head and recomputation; what else a stage computes.
PLAIN = ("class", nn.Linear, "none", ("model.attention_dropout=0.1",))
ALL = [
    PLAIN,
    ("mean", two_layers, "every_layer", ("model.drop_path=0.5",)),
    ("both", Scaled, "attention_mlp", ("model.drop_path=0.5", "model.hidden_dropout=0.1")),
]


@can_compile
@pytest.mark.parametrize(
    ("kind", "case"), [*((kind, case) for kind in FAMILIES for case in ALL), ("vit-micro", ALL[2])]
)
def test_no_model_breaks_the_graph(make_config, tmp_path, kind, case):
    """The loss is not compiled, so that unknown labels do not matter here."""
    pooling, head, recompute, more = case
    if kind in FAMILIES:
        save(kind, tmp_path)
        more = (f"model.name={tmp_path}", "pipeline.layers_per_stage=[1, 1]", *more)
    config = make_config(f"model.pooling={pooling}", *more)
    hub = ViTModule(config).configure_model()
    hub.classifier = head(hub.classifier.in_features, hub.classifier.out_features)
    plan = StagePlan.from_list(config.pipeline.layers_per_stage)
    model = StagedViT(hub, plan, mean=0.5, std=0.5)
    model.recompute(plan.kept_outputs(recompute, on_ipus=False))
    depth = sum(plan.layers_per_stage)
    paths = DropPath(config.model.drop_path, depth, seed=0).factors(0, torch.arange(6), 6)
    found = []

    def explain(function):
        def run(*arguments):
            found.append(torch._dynamo.explain(function)(*arguments))
            return function(*arguments)

        return run

    model.compile_with(explain, whole=True)
    for trains in (True, False) if case is PLAIN else (True,):
        with torch.set_grad_enabled(trains):
            model.train(trains)(images(32, 6), paths)
    assert len(found) >= len(model.stages)
    assert [each.break_reasons for each in found if each.graph_break_count] == []
    assert {each.graph_count for each in found} == {1}


@can_compile
def test_a_copy_computes_with_its_own_weights(graphs):
    import copy

    hub = make("vit")
    plan = StagePlan.from_list([2])
    model = StagedViT(hub, plan, mean=0.5, std=0.5)
    compiled.compile_stages(model, "layers")
    with torch.no_grad():
        other = copy.deepcopy(model)
        for weight in other.parameters():
            weight.zero_()
        assert model(images(32)).abs().max() > 0
        assert not other(images(32)).any()


@can_compile
@needs_current("vit")
def test_a_model_is_compiled_only_as_its_last_engine_says(graphs):
    model = StagedViT(make("vit"), StagePlan.from_list([1, 1]), mean=0.5, std=0.5)
    config = torch._dynamo.config

    def settings():
        return config.cache_size_limit, config.optimize_ddp

    def graphs_of_a_pass():
        torch._dynamo.reset()
        graphs.clear()
        with torch.no_grad():
            model(images(32))
        return len(graphs)

    before = settings()
    for how, count in (("layers", 2), ("whole", 2)):
        undo = compiled.compile_stages(model, how, with_ddp=how == "whole")
        assert settings() == (max(64, before[0]), before[1] and how != "whole")
        assert graphs_of_a_pass() == count
        undo()
        assert settings() == before and graphs_of_a_pass() == 0
    with contextlib.ExitStack() as stack:
        for how, count in (("layers", 2), ("whole", 2), ("layers", 2), ("off", 0)):  # none closed
            stack.callback(compiled.compile_stages(model, how))
            assert graphs_of_a_pass() == count


# Engines


def random_batch(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size, 1, 32, 32), dtype=torch.uint8, generator=generator)
    labels = (torch.rand(size, 14, generator=generator) < 0.2).float()
    labels[::2, :3] = -1  # unknown, which one of the configurations leaves out
    return Batch(pixels, labels, torch.arange(size))


def train(config, steps=4, start=None):
    """Make updates, with a validation between them; return losses, logits and state."""
    with engine_of(config, module_of(config)) as engine:
        if start is not None:
            engine.load_state_dict(start)
        seconds = engine.compile(random_batch(engine.batch.host_batch_size))
        assert (seconds > 0) == (config.engine.compile != "off")
        losses = []
        for step in range(engine.updates, engine.updates + steps):
            batch = random_batch(engine.batch.host_batch_size, step)
            losses.append(engine.train_step(batch, lr=1e-3).losses)
            logits = engine.predict(random_batch(8))
        return torch.cat(losses), logits, engine.state_dict()


@can_compile
@pytest.mark.parametrize(
    ("how", "overrides"),
    [
        ("layers", ("pipeline.recompute=every_layer", "pipeline.layers_per_stage=[2, 2]")),
        ("whole", (*UNKNOWN, "model.pooling=mean", "pipeline.layers_per_stage=[4]")),
    ],
)
def test_compiled_training_is_the_same_and_resumes_exactly(
    make_config, monkeypatch, how, overrides
):
    if how == "whole":  # the kernels of one way are enough: their compilation takes long
        monkeypatch.setattr(compiled, "_COMPILER", {"backend": "aot_eager"})
    plain, expected, _ = train(make_config(*RICH, *overrides))
    torch._dynamo.reset()
    config = make_config(*RICH, *overrides, f"engine.compile={how}")
    losses, logits, end = train(config)
    assert torch.allclose(losses, plain, rtol=0, atol=1e-5)
    assert torch.allclose(logits, expected, atol=1e-4)
    first, _, state = train(config, steps=2)
    second, again, resumed = train(config, steps=2, start=state)
    assert torch.equal(torch.cat([first, second]), losses) and torch.equal(again, logits)
    assert all(torch.equal(resumed.weights[name], end.weights[name]) for name in end.weights)


@can_compile
@needs_current("vit")
def test_validations_compile_nothing_further(make_config, graphs):
    config = make_config("engine.compile=layers", "engine.precision=bf16", "model.freeze=2")
    data = ChestXrayDataModule(config)
    with engine_of(config, module_of(config, data)) as engine:
        assert "in bf16 with engine.compile=layers (" in engine.describe()
        engine.compile(random_batch(8))
        counts = [len(graphs)]
        assert engine.prepare_scoring(data.dataset("val")) > 0
        counts.append(len(graphs))
        for step in range(2):
            engine.train_step(random_batch(8, step), lr=1e-3)
            engine.predict_dataset(data.dataset("val"))
            assert engine.prepare_scoring(data.dataset("val")) == 0
        counts.append(len(graphs))
    # In training the frozen layers, the first trained one, whose input has no gradient, and the
    # last one; in evaluation frozen ones, trained ones and the last one.
    assert counts == [3, 6, 6]


def set_forward(layer):
    forward = layer.forward
    layer.forward = lambda hidden, **named: forward(hidden)


def subclass(layer):
    class Own(type(layer)):
        def forward(self, hidden, *values, **named):
            return super().forward(hidden, *values, **named)

    layer.__class__ = Own


def with_own_layer(config, change):
    class WithOwnLayer(ViTModule):
        def configure_model(self):
            model = super().configure_model()
            change(VitParts(model).layers[1][1])
            return model

    module = WithOwnLayer(config)
    module.setup()
    return module


DROPPING, IN_HALVES = "model.drop_path=0.5", "pipeline.recompute=attention_mlp"


@pytest.mark.parametrize("how", ["off", pytest.param("layers", marks=can_compile)])
@pytest.mark.parametrize("change", [subclass, set_forward])
@pytest.mark.parametrize("option", [DROPPING, IN_HALVES])
def test_an_own_layer_is_refused_before_it_is_compiled(make_config, graphs, change, option, how):
    how = "whole" if how != "off" and option == IN_HALVES else how
    config = make_config(f"engine.compile={how}", option)
    with engine_of(config, with_own_layer(config, change)) as engine:
        with pytest.raises(ModelError) as raised:
            engine.compile(random_batch(8))
        if option == IN_HALVES and how != "off":
            with pytest.raises(ModelError, match="has a forward pass of its own"):
                engine.prepare_scoring(ChestXrayDataModule(config).dataset("val"))
    assert graphs == []
    text = r"(Own|ViTLayer), in an encoder layer, has a forward pass of its own, .* Set model\.drop"
    assert re.match(text, str(raised.value))


@pytest.mark.parametrize("how", ["off", pytest.param("layers", marks=can_compile)])
@pytest.mark.parametrize("change", [subclass, set_forward])
def test_an_own_layer_runs_where_it_is_not_left_out(make_config, graphs, change, how):
    config = make_config(f"engine.compile={how}", "pipeline.recompute=every_layer")
    with engine_of(config, with_own_layer(config, change)) as engine:
        is_compiled = how != "off"
        assert (engine.compile(random_batch(8)) > 0) == is_compiled == bool(graphs)
        assert torch.isfinite(engine.train_step(random_batch(8), lr=1e-3).losses).all()


class Printing(nn.Linear):
    """Does what torch.compile cannot do without a graph break."""

    def forward(self, input):
        torch._dynamo.graph_break()
        return super().forward(input)


class WithPrintingHead(ViTModule):
    def configure_model(self):
        model = super().configure_model()
        head = model.classifier
        model.classifier = Printing(head.in_features, head.out_features)
        return model


@can_compile
def test_a_graph_break_is_an_error_of_one_line(make_config, graphs):
    for how in ("layers", "whole"):
        config = make_config(f"engine.compile={how}")
        module = WithPrintingHead(config)
        module.setup()
        with engine_of(config, module) as engine:
            if how == "layers":
                assert engine.compile(random_batch(8)) > 0, "it does not compile the head"
                continue
            with pytest.raises(DeviceError) as raised:
                engine.compile(random_batch(8))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("engine.compile=whole: torch cannot compile the model (")
    assert str(raised.value).endswith("). Set engine.compile=off.")


@can_compile
@pytest.mark.parametrize(
    ("how", "frozen"), [("layers", "3"), ("layers", "none"), ("whole", "none")]
)
def test_hooks_that_come_after_compilation_change_nothing(make_config, graphs, how, frozen):
    config = make_config(f"engine.compile={how}", f"model.freeze={frozen}")
    seen = []

    def hook(layer, inputs, output):
        torch._dynamo.graph_break()
        seen.append(output.shape[1])

    with engine_of(config, module_of(config)) as engine:
        engine.compile(random_batch(8))
        engine.train_step(random_batch(8), lr=1e-3)
        count, model = len(graphs), engine.model
        model.layers[-1].register_forward_hook(hook)
        engine.train_step(random_batch(8), lr=1e-3)
        assert len(graphs) == count and not seen
    with torch.no_grad():
        model(random_batch(2).images)
    assert seen == [model.hidden_shape[0]]


@can_compile
@pytest.mark.parametrize("how", ["layers", "whole"])
def test_hooks_before_compilation_see_every_token(make_config, graphs, how):
    """On all layers: with `layers` they share the graph of the first one, and its hooks."""
    config = make_config(f"engine.compile={how}")
    seen = []
    with engine_of(config, module_of(config)) as engine:
        for layer in engine.model.layers:
            layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.shape[1]))
        engine.compile(random_batch(8))
        assert len(seen) >= 4 and set(seen) == {engine.model.hidden_shape[0]}
