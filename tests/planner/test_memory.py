"""Memory per stage, compared with published numbers and the largest micro-batch that fits."""

import pytest

from cxr_vit.config import BatchPlan, read_config
from cxr_vit.planner.costs import Formats, stage_memory
from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.hardware import ESTIMATES, PUBLISHED, find_target
from cxr_vit.planner.timeline import in_flight

from .shapes import MK2, base_shape, gpu4, pod4, quarters

#: fp16 weights and accumulators, AdamW's moments in fp16 and fp32.
TABLE = Formats(
    activation=2,
    weight=2,
    partial=2,
    accumulator=2,
    moments=6,
    on_chip=True,
    shards=1,
    accumulates=True,
    combined=False,
    proportion=(0.3,) * 4,
)


def memory(stage, micro_batch, *, keeps_all=True, formats=TABLE):
    return stage_memory(
        quarters(keeps_all=keeps_all)[stage],
        base_shape(),
        formats,
        MK2,
        stage=stage,
        depth=in_flight("lockstep", stage, 4, 128),
        micro_batch_size=micro_batch,
    )


@pytest.mark.parametrize(
    ("micro_batch", "stage", "held", "moments", "depth", "kept", "inputs"),
    [
        # From PopART's rules (pipeline.cpp), MB: weights + accumulators, AdamW, stash depth, stash
        # with each layer kept, stash of the stages' inputs only
        (1, 0, 88.0, 132.0, 7, 6.3, 2.1),
        (1, 1, 85.1, 127.6, 5, 4.5, 1.5),
        (1, 2, 85.1, 127.6, 3, 2.7, 0.9),
        (1, 3, 85.1, 127.7, 1, 1.2, 0.3),
        (8, 0, 88.0, 132.0, 7, 50.7, 16.9),
        (17, 0, 88.0, 132.0, 7, 107.8, 35.8),
        (17, 1, 85.1, 127.6, 5, 77.2, 25.7),
        (17, 3, 85.1, 127.7, 1, 20.6, 5.1),
    ],
)
def test_bytes_of_vit_base_on_four_ipus(micro_batch, stage, held, moments, depth, kept, inputs):
    assert in_flight("lockstep", stage, 4, 128) == depth
    every = memory(stage, micro_batch)
    assert (every.weights + every.accumulators) / 1e6 == pytest.approx(held, abs=0.06)
    assert every.optimizer / 1e6 == pytest.approx(moments, abs=0.06)
    assert every.stash / 1e6 == pytest.approx(kept, abs=0.06)
    few = memory(stage, micro_batch, keeps_all=False)
    assert few.stash / 1e6 == pytest.approx(inputs, abs=0.06)


@pytest.mark.parametrize(
    ("micro_batch", "one_layer", "three_layers"), [(1, 5.8, 17.3), (8, 46, 139), (17, 98, 294)]
)
def test_activations_live_in_backward(micro_batch, one_layer, three_layers):
    shape = base_shape()
    gradients = 2 * micro_batch * shape.layer_gradients()
    for keeps_all, expected in ((True, one_layer), (False, three_layers)):
        live = memory(1, micro_batch, keeps_all=keeps_all).live - gradients
        assert live / 1e6 == pytest.approx(expected, abs=0.5)


def test_moments_off_the_chip_leave_the_tensor_being_updated():
    off = memory(1, 1, formats=TABLE._replace(on_chip=False))
    assert off.optimizer == 6 * 768 * 3072


def test_only_large_tensors_are_sharded_over_replicas():
    # 8,192 elements or more (graphcore/popart, minElementsForReplicatedTensorSharding)
    whole, shared = memory(1, 1), memory(1, 1, formats=TABLE._replace(shards=4))
    small = 3 * (4 * 768 + 3072 + 768 + 4 * 768)
    large = 21_263_616 - small
    assert shared.optimizer == pytest.approx(6 * (small + large / 4))
    assert shared.optimizer < whole.optimizer / 3.9


def test_temporaries_grow_up_to_the_proportion():
    small, large = memory(1, 1), memory(1, 1000)
    assert small.temporaries < 0.3 * MK2.ipu.memory_bytes
    assert large.temporaries == pytest.approx(0.3 * MK2.ipu.memory_bytes)
    tight = memory(1, 1000, formats=TABLE._replace(proportion=(0.3, 0.1, 0.3, 0.3)))
    assert tight.temporaries == pytest.approx(0.1 * MK2.ipu.memory_bytes)


def test_fp32_weights_are_cast_for_fp16_products():
    cast = memory(1, 1, formats=TABLE._replace(weight=4)).temporaries - memory(1, 1).temporaries
    assert cast == 2 * sum(base_shape().layer_tensors())


def test_total_is_the_sum_with_the_tile_imbalance():
    found = memory(0, 8)
    counted = sum(found[:-2])
    assert found.total == pytest.approx(ESTIMATES["imbalance"].value * counted)
    assert found.headroom == pytest.approx(MK2.ipu.memory_bytes - found.total)


def test_without_recomputation_each_micro_batch_held_keeps_its_activations_and_weights():
    every, none = (make_plan(pod4(f"pipeline.recompute={own}")) for own in ("every_layer", "none"))
    shape = base_shape()
    activations, weights = (
        2 * 3 * elements for elements in (shape.layer_activations(), shape.product_weights())
    )
    for stage, depth in zip(none.stages[1:3], (5, 3)):
        assert stage.memory.stash == depth * (activations + weights)
    assert none.stages[0].memory.stash > 7 * (activations + weights)
    assert none.stages[3].memory.stash == 2 * shape.hidden_elements
    assert none.fullest.memory.verdict == "does not fit", "each IPU has room for its weights once"
    assert none.seconds < every.seconds


FINE_TUNING = PUBLISHED[0]


def fine_tuning(micro_batch, *more, image_bytes=FINE_TUNING.image_bytes):
    """Plan Graphcore's own fine-tuning: SGD, fp16 momentum, sharded over four replicas."""
    overrides = [*FINE_TUNING.settings, f"batch.micro_batch_size={micro_batch}", *more]
    return make_plan(read_config([], overrides), image_bytes=image_bytes)


def test_largest_published_micro_batch_fits_and_the_next_does_not():
    # graphcore/examples, configs.yml: b16_imagenet1k and b16_cifar10 train with 17
    assert "17 x" in FINE_TUNING.what
    assert fine_tuning(17).fits
    assert not fine_tuning(18).fits


def test_twice_the_largest_does_not_fit():
    plan = fine_tuning(34)
    assert not plan.fits
    assert plan.fullest.memory.verdict == "does not fit"


@pytest.mark.parametrize(("micro_batch", "fits"), [(14, True), (15, False)])
def test_largest_micro_batch_of_pre_training_without_a_fit(micro_batch, fits):
    # graphcore/examples, README.md: "micro_batch_size can be set to 14"; configs.yml,
    # b16_in1k_pretrain: Adam with fp32 moments, and the output of one layer's attention per stage
    # (recompute_mid_layers) is kept besides the layers'.
    adam = ("optim.name=adamw", "optim.first_moment=fp32", "optim.second_moment=fp32")
    plan = fine_tuning(micro_batch, *adam)
    first = plan.stages[0]
    attention_too = first.cost._replace(kept=first.cost.kept + plan.work.shape.hidden_elements)
    found = stage_memory(
        attention_too,
        plan.work.shape,
        plan.work.formats,
        MK2,
        stage=0,
        depth=first.depth,
        micro_batch_size=micro_batch,
    )
    assert found.fits is fits


@pytest.mark.parametrize("micro_batch", [15, 17])
def test_published_micro_batches_of_adamw_fit(micro_batch):
    # optimum-graphcore's README: 17 for CIFAR10, 15 for cats and dogs; moments off the chip
    off_chip = ("optim.name=adamw", "engine.optimizer_state_on_chip=false")
    assert fine_tuning(micro_batch, *off_chip).fits


def test_gray_bytes_need_less_memory_than_fp16_colours():
    plan = fine_tuning(17, image_bytes=None)
    assert plan.fits
    assert plan.fullest.memory.total < fine_tuning(17).fullest.memory.total


@pytest.mark.parametrize(
    ("share", "verdict"),
    [
        (0.5, "fits"),
        (0.90, "fits"),
        (0.92, "fits, closely"),
        (1.0, "fits, closely"),
        (1.01, "may not fit"),
        (1.10, "may not fit"),
        (1.12, "does not fit"),
    ],
)
def test_verdict_includes_the_uncertainty(share, verdict):
    found = memory(0, 1)
    limit = found.total / share
    assert found._replace(limit=limit).verdict == verdict


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("engine.weights=fp16", "weight", 2),
        ("engine.precision=fp32", "activation", 4),
        ("optim.accumulator=fp16", "accumulator", 2),
        ("optim.first_moment=fp32", "moments", 8),
        ("optim.second_moment=fp16", "moments", 4),
        ("optim.name=sgd", "moments", 2),
        ("engine.partials=fp32", "partial", 4),
        ("batch.gradient_accumulation=1", "accumulates", False),
        ("pipeline.available_memory_proportion=0.2", "proportion", (0.2,) * 4),
        ("pipeline.available_memory_proportion=null", "proportion", None),
        ("engine.optimizer_state_on_chip=false", "on_chip", False),
    ],
)
def test_formats_follow_the_configuration(override, field, value):
    assert getattr(formats(pod4(override)), field) == value


def formats(config):
    return Formats.from_config(config, find_target(config), BatchPlan.from_section(config.batch))


def test_combined_accumulator_of_sgd_is_one_tensor():
    sgd = ["optim.name=sgd", "optim.first_moment=fp32"]
    apart, combined = (
        make_plan(pod4(*sgd, f"optim.use_combined_accum={use}")).stages[0].memory
        for use in ("false", "true")
    )
    assert apart.accumulators == apart.optimizer == combined.optimizer
    assert combined.accumulators == 0


def test_sgd_without_momentum_has_no_moments():
    assert formats(pod4("optim.name=sgd", "optim.momentum=0")).moments == 0
    assert formats(gpu4("optim.name=sgd", "optim.momentum=0")).moments == 0


@pytest.mark.parametrize(
    ("overrides", "size"),
    [
        (["engine.precision=fp32"], 4),
        (["engine.precision=bf16"], 2.5),
        ([], 2.5),
        (["engine.device=cpu"], 4),
    ],
)
def test_activations_of_torch_are_fp32_or_autocast(overrides, size):
    assert formats(gpu4(*overrides)).activation == size


def test_a_gpu_holds_all_activations_of_the_micro_batches_in_flight():
    plan = make_plan(gpu4())
    stash = [stage.memory.stash for stage in plan.stages]
    assert [stage.depth for stage in plan.stages] == [4, 3, 2, 1]
    assert stash == sorted(stash, reverse=True)
    gpipe = make_plan(gpu4("pipeline.schedule=gpipe"))
    assert gpipe.stages[3].memory.stash == pytest.approx(8 * stash[3])


def test_there_is_no_verdict_without_a_limit():
    plan = make_plan(gpu4("batch.micro_batch_size=4096"))
    assert [stage.memory.verdict for stage in plan.stages] == ["unknown"] * 4
    assert plan.fits
    small = make_plan(gpu4("batch.micro_batch_size=4096", "planner.device_memory_gib=24"))
    assert small.fullest.memory.verdict == "does not fit"
