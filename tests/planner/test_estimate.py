"""A configuration's plan as a whole."""

import pytest

from cxr_vit.config import load_config
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import choose_hardware, make_plan, processes_needed
from cxr_vit.planner.hardware import DECODED_PER_S, HARDWARE
from cxr_vit.planner.timeline import simulate

from .shapes import POD4, ROOT, pod4


def test_the_plan_of_the_tutorials_recipe():
    plan = make_plan(pod4())
    assert plan.work.schedule == "lockstep"
    assert plan.timeline.work_s == pytest.approx(134 * plan.by_speed()[0].time.micro_batch_s)
    assert plan.bubble == pytest.approx(6 / 134)
    assert [stage.depth for stage in plan.stages] == [7, 5, 3, 1]
    assert sum(stage.cost.parameters for stage in plan.stages) == 85_809_422
    assert plan.by_speed()[0].stage == 0, "the embedding makes the first the slowest"
    assert plan.fits
    assert plan.devices == 4


def test_the_time_of_an_update_is_that_of_the_timeline():
    for file in ("vit_pod4.yaml", "vit_gpu4.yaml", "vit_demo.yaml"):
        plan = make_plan(load_config([ROOT / "configs" / file]))
        assert plan.seconds == pytest.approx(plan.timeline.end_s), file


def test_three_stages_reserve_four_ipus():
    plan = make_plan(pod4("pipeline.layers_per_stage=[4,4,4]", "pipeline.recompute=every_layer"))
    assert len(plan.stages) == 3
    assert plan.devices == 4


def test_replicas_multiply_speed_and_devices():
    one = make_plan(pod4())
    four = make_plan(pod4("batch.replicas=4"))
    assert four.devices == 4 * one.devices
    assert 3.9 < four.samples_per_s / one.samples_per_s < 4


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ([], "mk2"),
        (["engine.name=poptorch"], "mk2"),
        (["engine.name=torch"], "gpu"),
        (["engine.name=pipeline"], "gpu"),
        (["engine.name=torch", "planner.hardware=bow"], "bow"),
    ],
)
def test_the_hardware_follows_the_engine(overrides, name):
    assert choose_hardware(pod4(*overrides)) is HARDWARE[name]


def test_the_torch_engine_holds_all_stages_on_one_device():
    plan = make_plan(load_config([ROOT / "configs" / "vit_demo.yaml"]))
    assert len(plan.stages) == 1
    assert plan.stages[0].cost.num_layers == 4


def test_processes_follow_their_schedule():
    for schedule, planned in (("gpipe", "gpipe"), ("1f1b", "1f1b"), ("interleaved_1f1b", "1f1b")):
        overrides = ["engine.name=pipeline", f"pipeline.schedule={schedule}"]
        plan = make_plan(pod4(*overrides))
        assert plan.work.schedule == planned
        assert plan.timeline == simulate(planned, [s.time for s in plan.stages], 128)


@pytest.mark.parametrize("cut", ["[3,3,3,3]", "[2,5,2,3]"])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_long_updates_of_processes_are_reckoned_from_short_ones(cut, schedule):
    overrides = [
        "engine.name=pipeline",
        f"pipeline.schedule={schedule}",
        "batch.micro_batch_size=2",
    ]
    plan = make_plan(
        pod4(
            *overrides,
            f"pipeline.layers_per_stage={cut}",
            "pipeline.recompute=every_layer",
            "batch.gradient_accumulation=1500",
        )
    )
    assert plan.seconds == pytest.approx(plan.timeline.end_s, rel=1e-9)
    slowest = max(stage.time.micro_batch_s for stage in plan.stages)
    assert plan.bubble == pytest.approx(1 - 1500 * slowest / plan.timeline.work_s)


def test_an_empty_stage_is_a_mistake_and_no_crash():
    cut = ["pipeline.layers_per_stage=[4,0,4,4]", "pipeline.recompute=every_layer"]
    with pytest.raises(ConfigError, match="leaves stage 1 without work"):
        make_plan(pod4(*cut))
    ends = make_plan(pod4("pipeline.layers_per_stage=[0,6,6,0]", "pipeline.recompute=every_layer"))
    assert [stage.cost.num_layers for stage in ends.stages] == [0, 6, 6, 0]


def test_a_list_of_proportions_of_another_length_is_planned_beside_its_refusal():
    short = make_plan(pod4("pipeline.available_memory_proportion=[0.3,0.2]"))
    assert short.formats.proportion == (0.3, 0.2, 0.2, 0.2)


def test_auto_on_a_gpu_is_the_torch_engine():
    plan = make_plan(pod4("planner.hardware=gpu"))
    assert (len(plan.stages), plan.work.schedule) == (1, "in_order")
    assert len(make_plan(pod4("planner.hardware=gpu"), engine="pipeline").stages) == 4


def test_every_four_ipus_have_a_link_of_their_own():
    assert (
        make_plan(pod4("batch.replicas=4")).host_bandwidth == 4 * make_plan(pod4()).host_bandwidth
    )


def images_of(root, *overrides):
    return make_plan(load_config([POD4], [f"data.root={root}", *overrides])).images


def write_names(path, numbers):
    path.write_text("".join(f"{number:08d}_000.png\n" for number in numbers))


def test_an_epoch_is_of_the_lists_images(tmp_path):
    write_names(tmp_path / "train_val_list.txt", range(200))
    write_names(tmp_path / "test_list.txt", range(200, 300))
    assert images_of(tmp_path, "data.val_fraction=0.1") == 180
    write_names(tmp_path / "val_list.txt", range(150, 200))
    assert images_of(tmp_path) == 150
    write_names(tmp_path / "mine.txt", range(120))
    assert images_of(tmp_path, f"data.train_list={tmp_path / 'mine.txt'}") == 120
    plan = make_plan(load_config([POD4], [f"data.root={tmp_path}"]))
    assert plan.epoch_minutes == pytest.approx(150 / plan.samples_per_s / 60)


def test_lists_that_cannot_be_read_are_trainings_business(tmp_path):
    (tmp_path / "train_val_list.txt").write_bytes(b"\xff\xfe\x00")
    write_names(tmp_path / "test_list.txt", range(5))
    assert images_of(tmp_path) == images_of(tmp_path, "data.train_list=nowhere") == 82_197


def test_without_lists_it_is_of_nihs():
    assert make_plan(pod4()).images == 82_197  # 95 % of 86,524
    assert make_plan(pod4(), images=1000).images == 1000
    patients = make_plan(pod4("data.split=patient", "data.val_fraction=0.1"))
    assert patients.images == 78_484  # 70 % of 112,120


def test_the_host_sends_gray_bytes_and_labels():
    plan = make_plan(pod4())
    assert plan.host_bytes_per_s == pytest.approx(plan.samples_per_s * (224 * 224 + 4 * 14))


def test_how_many_cores_decode_at_the_devices_speed():
    assert processes_needed(DECODED_PER_S.value * 3.2, DECODED_PER_S) == 4
