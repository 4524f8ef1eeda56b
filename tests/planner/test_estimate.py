"""The plan of a configuration as a whole."""

import pytest

from cxr_vit.config import read_config
from cxr_vit.data.synthetic.dataset import TEST_SHARE
from cxr_vit.errors import ConfigError
from cxr_vit.planner import estimate
from cxr_vit.planner.estimate import make_plan, plan_evaluation
from cxr_vit.planner.hardware import find_target
from cxr_vit.planner.speed import RELATIVE
from cxr_vit.planner.timeline import simulate

from .shapes import DEMO, GPU4, POD4, gpu4, pod4


def test_plan_of_the_tutorials_recipe():
    plan = make_plan(pod4())
    assert plan.work.schedule == "lockstep"
    assert plan.timeline.work_s == pytest.approx(134 * plan.by_speed()[0].time.micro_batch_s)
    assert plan.bubble == pytest.approx(6 / 134)
    assert [stage.depth for stage in plan.stages] == [7, 5, 3, 1]
    assert sum(stage.cost.parameters for stage in plan.stages) == 85_809_422
    assert plan.by_speed()[0].stage == 0, "the embedding makes the first the slowest"
    assert plan.fits and plan.has_time
    assert plan.devices == 4


@pytest.mark.parametrize("file", [POD4, GPU4, DEMO], ids=lambda file: file.stem)
def test_time_of_an_update_is_that_of_the_timeline(file):
    plan = make_plan(read_config([file]))
    assert plan.seconds == pytest.approx(plan.timeline.end_s)


def test_three_stages_reserve_four_ipus():
    plan = make_plan(pod4("pipeline.layers_per_stage=[4,4,4]", "pipeline.recompute=every_layer"))
    assert len(plan.stages) == 3
    assert plan.devices == 4


def test_replicas_multiply_speed_and_devices():
    one = make_plan(pod4())
    four = make_plan(pod4("batch.replicas=4"))
    assert four.devices == 4 * one.devices
    assert 3.9 < four.samples_per_s / one.samples_per_s < 4


def test_torch_engine_holds_all_stages_on_one_device():
    plan = make_plan(read_config([DEMO]))
    assert len(plan.stages) == 1
    assert plan.stages[0].cost.num_layers == 4
    assert plan.work.schedule == "in_order"


def test_other_devices_have_a_bubble_but_no_time():
    plan = make_plan(gpu4())
    assert plan.model is RELATIVE and not plan.has_time
    assert plan.bubble == pytest.approx(3 / 11, abs=0.01), "1F1B of four almost even stages"
    # Only the ratios of the operations count.
    faster = RELATIVE._replace(constants=RELATIVE.constants._replace(flops_per_s=1e12))
    assert make_plan(gpu4(), model=faster).bubble == pytest.approx(plan.bubble)


def test_processes_follow_their_schedule():
    for schedule, planned in (("gpipe", "gpipe"), ("1f1b", "1f1b"), ("interleaved_1f1b", "1f1b")):
        plan = make_plan(pod4("engine.name=pipeline", f"pipeline.schedule={schedule}"))
        assert plan.work.schedule == planned
        assert plan.timeline == simulate(planned, [s.time for s in plan.stages], 128)


@pytest.mark.parametrize("cut", ["[3,3,3,3]", "[2,5,2,3]"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_long_updates_of_processes_are_extrapolated(cut, schedule):
    plan = make_plan(
        pod4(
            "engine.name=pipeline",
            f"pipeline.schedule={schedule}",
            "batch.micro_batch_size=2",
            f"pipeline.layers_per_stage={cut}",
            "pipeline.recompute=every_layer",
            "batch.gradient_accumulation=1500",
        )
    )
    assert plan.seconds == pytest.approx(plan.timeline.end_s, rel=1e-9)
    slowest = max(stage.time.micro_batch_s for stage in plan.stages)
    assert plan.bubble == pytest.approx(1 - 1500 * slowest / plan.timeline.work_s)


def test_empty_stage_is_refused():
    cut = ["pipeline.layers_per_stage=[4,0,4,4]", "pipeline.recompute=every_layer"]
    with pytest.raises(ConfigError, match="leaves stage 1 without work"):
        make_plan(pod4(*cut))
    ends = make_plan(pod4("pipeline.layers_per_stage=[0,6,6,0]", "pipeline.recompute=every_layer"))
    assert [stage.cost.num_layers for stage in ends.stages] == [0, 6, 6, 0]


def test_list_of_proportions_of_another_length_is_planned_beside_its_refusal():
    short = make_plan(pod4("pipeline.available_memory_proportion=[0.3,0.2]"))
    assert short.work.formats.proportion == (0.3, 0.2, 0.2, 0.2)


def test_chosen_engine_is_planned():
    config = pod4("engine.device=cpu")
    torch = make_plan(config, target=find_target(config, "torch"))
    assert (len(torch.stages), torch.work.schedule) == (1, "in_order")
    assert len(make_plan(config, target=find_target(config, "pipeline")).stages) == 4


def images_of(root, *overrides):
    return make_plan(read_config([POD4], [f"data.root={root}", *overrides])).images


def write_names(path, numbers):
    path.write_text("".join(f"{number:08d}_000.png\n" for number in numbers))


def test_images_per_epoch_are_those_of_the_lists(tmp_path):
    write_names(tmp_path / "train_val_list.txt", range(200))
    write_names(tmp_path / "test_list.txt", range(200, 300))
    assert images_of(tmp_path, "data.val_fraction=0.1") == 180
    write_names(tmp_path / "val_list.txt", range(150, 200))
    assert images_of(tmp_path) == 150
    write_names(tmp_path / "mine.txt", range(120))
    assert images_of(tmp_path, f"data.train_list={tmp_path / 'mine.txt'}") == 120
    plan = make_plan(read_config([POD4], [f"data.root={tmp_path}"]))
    assert plan.epoch_minutes == pytest.approx(150 / plan.samples_per_s / 60)


def test_unreadable_lists_are_left_to_training(tmp_path):
    (tmp_path / "train_val_list.txt").write_bytes(b"\xff\xfe\x00")
    write_names(tmp_path / "test_list.txt", range(5))
    assert images_of(tmp_path) == images_of(tmp_path, "data.train_list=nowhere") == 82_197


def test_images_per_epoch_are_nihs_without_lists():
    assert make_plan(pod4()).images == 82_197  # 95 % of 86,524
    assert make_plan(pod4(), images=1000).images == 1000
    patients = make_plan(pod4("data.split=patient", "data.val_fraction=0.1"))
    assert patients.images == 78_484  # 70 % of 112,120
    assert make_plan(pod4("data.train_fraction=0.1")).images == 8_220  # of 82,197


def test_images_of_a_table_are_assumed_and_the_plan_says_so():
    plan = make_plan(pod4("data.format=table", "data.labels=[A, B]"))
    assert plan.images == 82_197
    assert "--images N" in plan.images_source


def test_images_of_the_synthetic_sample_leave_out_its_test_images():
    assert estimate._SAMPLE_TEST_SHARE == TEST_SHARE
    assert images_of("nowhere", "data.sample_images=1000", "data.val_fraction=0.1") == 675


def test_host_sends_gray_bytes_and_labels():
    plan = make_plan(pod4())
    assert plan.host_bytes_per_s == pytest.approx(plan.samples_per_s * (224 * 224 + 4 * 14))


def evaluated(*overrides):
    """Plan evaluation of 8 images x 16 device iterations."""
    batch = ("batch.eval_micro_batch_size=8", "batch.eval_device_iterations=16")
    return plan_evaluation(pod4(*batch, *overrides))


@pytest.mark.parametrize("ipus", [1, 2, 4])
@pytest.mark.parametrize("iterations", [4, 16, 64])
def test_bubble_of_evaluation_is_that_of_the_simulated_timeline(ipus, iterations):
    cut = str([12 // ipus] * ipus).replace(" ", "")
    plan = evaluated(
        f"pipeline.eval_layers_per_stage={cut}", f"batch.eval_device_iterations={iterations}"
    ).plan
    timeline = plan.timeline
    assert plan.seconds == pytest.approx(timeline.work_s)
    slowest = max(range(ipus), key=lambda stage: plan.stages[stage].time.forward_s)
    busy_s = sum(slot.end_s - slot.start_s for slot in timeline.slots if slot.stage == slowest)
    assert len(timeline.slots) == ipus * iterations
    assert plan.bubble == pytest.approx(1 - busy_s / timeline.work_s)
    assert plan.bubble == pytest.approx((ipus - 1) / (iterations + ipus - 1))


def test_evaluation_keeps_no_state_of_training():
    training, evaluation = make_plan(pod4()), evaluated("batch.eval_micro_batch_size=1").plan
    for stage, own in zip(training.stages, evaluation.stages):
        memory = own.memory
        assert memory.weights == stage.memory.weights
        assert memory.accumulators == memory.optimizer == memory.stash == 0
        assert 0 < memory.live < stage.memory.live
        assert memory.total < stage.memory.total / 2


def test_memory_of_evaluation_follows_its_own_settings():
    def stage(index, *overrides):
        return evaluated(*overrides).plan.stages[index].memory

    proportion = "pipeline.eval_available_memory_proportion=0.05"
    assert stage(0, proportion).temporaries < stage(0).temporaries
    assert make_plan(pod4(proportion)).stages == make_plan(pod4()).stages
    assert stage(3).io - stage(3, "engine.eval_output=fp16").io == 8 * 14 * 2
    large = stage(0, "batch.eval_micro_batch_size=16")
    assert large.live == 2 * stage(0).live and large.weights == stage(0).weights
    other = evaluated("pipeline.eval_layers_per_stage=[6,6]").plan
    assert [own.cost.num_layers for own in other.stages] == [6, 6]
    assert other.devices == 2


def test_replicas_of_evaluation_are_its_own():
    one, two = evaluated(), evaluated("batch.eval_replicas=2")
    assert two.images_per_call == 2 * one.images_per_call == 256
    assert two.plan.seconds == one.plan.seconds
    assert two.plan.devices == 2 * one.plan.devices
    assert evaluated("batch.replicas=2").plan.devices == 8, "as in training"


def test_sharded_evaluation_adds_up_its_stages():
    plan = evaluated("pipeline.eval_execution=sharded").plan
    assert plan.seconds == pytest.approx(16 * sum(own.time.forward_s for own in plan.stages))
    assert plan.seconds > 2 * evaluated().plan.seconds


def test_a_call_of_evaluation_is_between_part_of_the_overhead_and_all():
    plan, training = evaluated().plan, make_plan(pod4())
    whole_s, part_s = (model.constants.overhead_s for model in (training.model, plan.model))
    assert part_s == pytest.approx(whole_s / 4)
    low, high = plan.speed_range
    cycle_s = plan.seconds / 19
    assert low <= 128 / (19 * (cycle_s + whole_s - part_s)) < plan.samples_per_s < high


def test_host_calls_of_the_splits():
    found = evaluated()
    assert (found.plan.images, found.test_images) == (4327, 25596)
    assert [found.calls(images) for images in (1, 128, 129, 4327, 25596)] == [1, 1, 2, 34, 200]
    assert found.splits_s == pytest.approx(234 * found.plan.seconds)


def test_images_of_evaluation_are_those_of_the_lists(tmp_path):
    write_names(tmp_path / "train_val_list.txt", range(200))
    write_names(tmp_path / "test_list.txt", range(200, 300))

    def images(*overrides):
        found = plan_evaluation(read_config([POD4], [f"data.root={tmp_path}", *overrides]))
        return found.plan.images, found.test_images

    assert images("data.val_fraction=0.1") == (20, 100)
    write_names(tmp_path / "val_list.txt", range(150, 200))
    assert images() == (50, 100)
    assert images("data.split=random", "data.test_fraction=0") == (5606, 0)
    sample = ("data.root=nowhere", "data.sample_images=1000", "data.val_fraction=0.1")
    assert images(*sample) == (75, 250)


def test_other_devices_have_no_plan_of_evaluation():
    assert plan_evaluation(gpu4()) is None
    assert plan_evaluation(read_config([DEMO])) is None
