"""The public API: the ten lines of the documentation, on each engine."""

import csv
import json
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from processes.launch import HAS_PIPELINING, finish, fork
from safetensors.torch import save_file
from transformers import ViTForImageClassification, get_cosine_schedule_with_warmup

import cxr_vit
from conftest import ROOT, SMALL
from cxr_vit.commands import evaluate
from cxr_vit.errors import CheckpointError, DataError
from cxr_vit.evaluation.metrics import MACRO_LIMITS
from cxr_vit.training.callback import TrainOutputs
from fakes import loading
from ten_lines import ListLogger, Recorder, Result, WeightedFocalViT, head_only

STEPS, WARMUP, LR, DECAY, NORM = 5, 2, 2e-3, 0.1, 0.5
#: An epoch has six steps.
RUN = (
    *SMALL,
    "model.pooling=class",
    "augment.horizontal_flip=0",
    "batch.micro_batch_size=2",
    "batch.gradient_accumulation=4",
    f"train.steps={STEPS}",
    "train.eval_every_steps=3",
    "train.checkpoint_every_steps=2",
    "train.keep_last=9",
    "train.log_every_steps=1",
    "optim.name=adamw",
    f"optim.lr={LR}",
    f"optim.weight_decay={DECAY}",
    f"optim.max_grad_norm={NORM}",
    f"schedule.warmup_steps={WARMUP}",
    "schedule.name=cosine",
)
#: Engine -> overrides for four processes that make updates from the same eight images.
PROCESSES = {
    "pipeline": ("engine.name=pipeline",),
    "torch": ("engine.name=torch", "batch.replicas=4", "batch.gradient_accumulation=1"),
}
IPU = (
    "engine.name=poptorch",
    "engine.device=auto",
    "engine.executable_cache=null",
    "model.hidden_act=gelu_pytorch_tanh",
    "pipeline.layers_per_stage=[2, 2]",
    "batch.eval_micro_batch_size=2",
    "batch.eval_device_iterations=2",
)

#: The hooks of the ten lines, in the documented order.
ORDER = [
    "setup(fit)",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    *["on_train_batch_start", "on_train_batch_end"],
    *["on_train_batch_start", "on_train_batch_end", "on_save_checkpoint"],
    *["on_train_batch_start", "on_train_batch_end"],
    *["on_validation_start", "on_validation_end", "on_save_checkpoint"],
    *["on_train_batch_start", "on_train_batch_end", "on_save_checkpoint"],
    *["on_train_batch_start", "on_train_batch_end"],
    *["on_validation_start", "on_validation_end", "on_save_checkpoint"],
    *["on_train_epoch_end", "on_train_end", "on_fit_end"],
    "teardown(fit)",
    *["setup(validate)", "on_validation_start", "on_validation_end", "teardown(validate)"],
    *["setup(test)", "on_test_start", "on_test_end", "teardown(test)"],
    *["setup(predict)", "teardown(predict)"],
]


@pytest.fixture(scope="module")
def images(sample_root):
    """The files of the test split."""
    names = (sample_root / "test_list.txt").read_text(encoding="utf-8").split()
    return [sample_root / "images" / name for name in names]


@pytest.fixture(scope="module")
def overrides(sample_root):
    return [*RUN, f"data.root={sample_root}"]


@pytest.fixture(scope="module")
def ran(overrides, images, tmp_path_factory):
    """The ten lines on the torch engine."""
    folder = tmp_path_factory.mktemp("api") / "run"
    return Result([*overrides, f"run.dir={folder}"]).run(images)


@pytest.fixture
def again(overrides, tmp_path):
    """Make the objects of the ten lines once more, with a folder and more overrides."""

    def make(folder="run", *more, stop_at=None):
        where = folder if isinstance(folder, Path) else tmp_path / folder
        return Result([*overrides, f"run.dir={where}", *more], stop_at)

    return make


# The hand-written loop


def plain_loss(logits, labels, positive_weight):
    """Write the focal loss of the subclass by hand."""
    chance = logits.sigmoid()
    positive = (
        -positive_weight * labels * (1 - chance) ** 2 * torch.nn.functional.logsigmoid(logits)
    )
    negative = -(1 - labels) * chance**2 * torch.nn.functional.logsigmoid(-logits)
    return (positive + negative).mean()


def plain_losses(folder, data, positive_weight):
    """Train Hugging Face's model as anyone would; return the loss of each step."""
    model = ViTForImageClassification.from_pretrained(folder).train()
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and not name.endswith(("cls_token", "position_embeddings"))
    ]
    others = [
        parameter
        for parameter in model.parameters()
        if not any(parameter is matrix for matrix in matrices)
    ]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=LR)
    schedule = get_cosine_schedule_with_warmup(optimizer, WARMUP, STEPS)
    losses = []
    for _, batch in zip(range(STEPS), data.train_dataloader()):
        total = 0.0
        for pixels, labels in zip(batch.images.split(2), batch.labels.split(2)):
            normal = ((pixels.float() / 255 - 0.5) / 0.5).expand(-1, 3, -1, -1)
            loss = plain_loss(model(normal).logits, labels, positive_weight) / 4
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return losses


@pytest.fixture(scope="module")
def expected(overrides, tmp_path_factory):
    """Return the losses of the hand-written loop, for the function that computes GELU."""

    def losses(*more, for_ipu=False):
        folder = tmp_path_factory.mktemp("plain")
        config = cxr_vit.load_config("vit_demo", overrides=[*overrides, *more])
        data = cxr_vit.ChestXrayDataModule(config)
        module = cxr_vit.ViTModule(config, data)
        module.setup(for_ipu=for_ipu)
        save_file(module.model.weights(), str(folder / "model.safetensors"), {"format": "pt"})
        for name, text in module.model.hub_files().items():
            (folder / name).write_text(text, encoding="utf-8")
        labels = torch.stack([data.dataset("train")[row].labels for row in range(48)])
        prevalence = (labels.sum(dim=0) + 0.5) / (len(labels) + 1)
        weight = ((1 - prevalence) / prevalence).clamp(max=5)
        return plain_losses(folder, data, weight)

    return losses


def near(values, tolerance=1e-6):
    return pytest.approx(values, rel=0, abs=tolerance)


def test_losses_are_those_of_a_hand_written_loop(ran, expected):
    plain = expected()
    assert ran.callback.losses == near(plain)
    assert len(set(plain)) == STEPS
    assert max(plain) - min(plain) > 1e-3, "the loss changes"


def test_validation_loss_is_the_modules(ran):
    outputs = ran.trainer.validation_outputs
    loss = plain_loss(outputs.logits, outputs.labels, ran.module.positive_weight)
    assert ran.validated["val/loss"] == pytest.approx(loss.item(), abs=1e-6)


# What a callback sees


def test_hooks_come_in_the_documented_order(ran):
    assert ran.callback.hooks == ORDER


def test_batches_have_their_number_and_their_rows(ran):
    starts = ran.callback.of("on_train_batch_start")
    ends = ran.callback.of("on_train_batch_end")
    assert [step for step, _ in starts] == [0, 1, 2, 3, 4]
    assert [number for _, (_, number) in starts] == [0, 1, 2, 3, 4]
    for (step, (batch, number)), (_, (outputs, same, same_number)) in zip(starts, ends):
        assert batch is same and number == same_number
        assert batch.indices.tolist() == ran.trainer.rows(step)
        assert batch.images.shape == (8, 1, 32, 32)
        assert isinstance(outputs, TrainOutputs)
        assert (outputs.first_step, outputs.step, outputs.num_samples) == (step, step + 1, 8)
        assert outputs.losses.shape == outputs.grad_norm.shape == (1,)
        assert outputs.lr == ran.module.learning_rate(step, STEPS)
        assert outputs.seconds > 0 <= outputs.wait_s


def test_host_batches_are_counted_within_the_epoch(again):
    result = again("run", "batch.device_iterations=2", "train.steps=8", "train.epochs=null")
    result.trainer.fit(result.module, result.data)
    ends = [arguments for _, arguments in result.callback.of("on_train_batch_end")]
    assert [(outputs.first_step, number) for outputs, _, number in ends] == [
        (0, 0), (2, 1), (4, 2), (6, 0),
    ]  # fmt: skip
    assert [len(outputs.losses) for outputs, _, _ in ends] == [2] * 4
    assert [step for step, _ in result.callback.of("on_train_epoch_start")] == [0, 6]
    assert [step for step, _ in result.callback.of("on_train_epoch_end")] == [6, 8]
    assert result.trainer.current_epoch == 1


def test_checkpoint_hook_gets_what_is_written(ran):
    saved = ran.callback.of("on_save_checkpoint")
    assert [step for step, _ in saved] == [2, 3, 4, 5]
    ((_, (content,)),) = saved[-1:]
    file = ran.trainer.run.checkpoints / "last" / "trainer_state.json"
    written = json.loads(file.read_text())
    assert written["note of mine"] == {"step": 5}
    assert written["labels"] == content["labels"] == ran.module.names
    assert written["callbacks"]["Recorder"] == {"count": 5}


def test_failing_run_tells_callbacks_and_loggers(again):
    result = again()

    class Broken(cxr_vit.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise ZeroDivisionError("mine")

    trainer = cxr_vit.Trainer(
        result.config, callbacks=[Broken(), result.callback], loggers=[result.logger]
    )
    with pytest.raises(ZeroDivisionError):
        trainer.fit(result.module, result.data)
    ((step, (error,)),) = result.callback.of("on_exception")
    assert step == 1 and isinstance(error, ZeroDivisionError)
    assert result.callback.hooks[-1] == "on_exception"
    assert result.logger.calls[-1] == ("finalize", "failed")


# Attributes of the trainer


def test_trainer_has_the_documented_attributes(ran):
    trainer = ran.trainer
    assert trainer.global_step == trainer.estimated_stepping_batches == STEPS
    assert trainer.current_epoch == 0
    assert trainer.is_global_zero and trainer.is_complete
    assert not trainer.should_stop and not trainer.interrupted
    assert trainer.loggers == [ran.logger]
    assert trainer.callbacks[-1] is ran.callback
    assert trainer.module is ran.module and trainer.datamodule is ran.data
    assert trainer.run.path == Path(ran.config.run.dir)
    assert {"train/loss", "train/lr", "val/loss", "test/loss"} <= set(trainer.callback_metrics)


# What a logger sees


def test_logger_gets_folder_settings_metrics_and_figures(ran):
    calls = ran.logger.calls
    assert calls[0] == ("setup", ran.trainer.run.path, 0, True)
    assert calls[1] == ("log_hyperparams", ran.config.flat())
    assert calls[1][1]["optim.lr"] == LR
    metrics = [(call[1], call[2]) for call in calls if call[0] == "log_metrics"]
    assert [step for values, step in metrics if "train/loss" in values] == [1, 2, 3, 4, 5]
    assert [step for values, step in metrics if "val/loss" in values] == [3, 5]
    losses = [values["train/loss"] for values, _ in metrics if "train/loss" in values]
    assert losses == pytest.approx(ran.callback.losses)
    figures = [(call[1], call[2]) for call in calls if call[0] == "log_figures"]
    assert figures == [(["train/images"], 0), (["val/roc"], 3), (["val/roc"], 5)]
    assert calls[-1] == ("finalize", "success"), "nothing is logged outside a fit"


def test_callback_can_log_numbers_and_figures(again):
    class Logs(cxr_vit.Callback):
        def on_train_end(self, trainer, module):
            trainer.log_metrics({"mine/number": 3.0, "mine/undefined": None})
            trainer.log_figures({"mine/figure": Figure()})

    result = again("run", "train.steps=1", "schedule.warmup_steps=0")
    trainer = cxr_vit.Trainer(result.config, callbacks=[Logs()], loggers=[result.logger])
    trainer.fit(result.module, result.data)
    assert ("log_metrics", {"mine/number": 3.0, "mine/undefined": None}, 1) in result.logger.calls
    assert ("log_figures", ["mine/figure"], 1) in result.logger.calls
    assert trainer.callback_metrics["mine/number"] == 3.0


# validate, test, predict


def test_scores_have_tags(ran):
    for scores, split in ((ran.validated, "val"), (ran.tested, "test")):
        assert {f"{split}/loss", f"{split}/auroc_macro", f"{split}/auroc/Hernia"} <= set(scores)
        assert all(tag.startswith(f"{split}/") for tag in scores)
    assert ran.validated == ran.trainer.validation_outputs.tagged()
    last = [values for name, values, *_ in ran.logger.calls if name == "log_metrics"][-1]
    assert last == ran.validated, "the module still has the weights of the last step"


def predictions(checkpoint, out):
    assert evaluate.main(["--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["image"]: [float(row[name]) for name in row if name.endswith("_probability")]
        for row in rows
    }


def test_predictions_are_those_of_evaluate(ran, images, tmp_path):
    evaluated = predictions(ran.trainer.run.checkpoints / "last", tmp_path)
    assert ran.predicted.dtype == torch.float32
    assert ran.predicted.shape == (len(images), len(ran.module.names))
    for row, path in zip(ran.predicted.tolist(), images):
        assert row == near(evaluated[path.name])


def test_predictions_come_in_the_order_of_the_files(ran, images):
    few = [images[7], str(images[2]), images[7]]
    scored = ran.trainer.predict(ran.module, few)
    assert torch.allclose(scored, ran.predicted[[7, 2, 7]], rtol=0, atol=1e-6)


def test_missing_file_is_refused_before_the_engine_is_built(ran, images):
    count = len(ran.callback.calls)
    with pytest.raises(DataError, match=r"no such image: absent\.png\. Correct the path"):
        ran.trainer.predict(ran.module, [images[0], "absent.png"])
    assert len(ran.callback.calls) == count


def test_another_split_can_be_tested(ran):
    scores = ran.trainer.test(ran.module, ran.data, split="val")
    limits = {f"val/{name}" for name in MACRO_LIMITS}  # of validations of a fit alone
    assert scores == {name: ran.validated[name] for name in ran.validated.keys() - limits}


def test_new_module_is_scored_by_a_trainer_that_trained_nothing(ran, again):
    result = again()
    tested = result.trainer.test(result.module, result.data)
    assert tested["test/loss"] != ran.tested["test/loss"]
    assert not Path(result.config.run.dir).exists(), "scoring makes no run"


# ckpt_path


def test_best_and_last_are_those_of_the_own_run(ran, images):
    folder = ran.trainer.run.checkpoints
    for name in ("best", "last"):
        module = WeightedFocalViT.load_from_checkpoint(folder / name, ran.data, ran.config)
        expected = cxr_vit.Trainer(ran.config, loggers=[]).test(module, ran.data)
        assert ran.trainer.test(ran.module, ran.data, ckpt_path=name) == expected
    assert torch.equal(ran.trainer.predict(ran.module, images), ran.predicted)


def test_run_folder_is_scored_by_its_best(ran, again):
    result = again()
    tested = result.trainer.test(result.module, result.data, ckpt_path=ran.trainer.run.path)
    assert tested == ran.trainer.test(ran.module, ran.data, ckpt_path="best")
    ran.trainer.test(ran.module, ran.data, ckpt_path="last")


def test_path_without_a_checkpoint_is_refused(ran, tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint: there is no such folder"):
        ran.trainer.validate(ran.module, ran.data, ckpt_path=tmp_path / "absent")


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_checkpoint_begins_a_new_run_with_its_state(ran, again):
    original = ran.trainer.run.path
    before = contents(original)
    result = again("new")
    path = original / "checkpoints" / "step_00000002"
    result.trainer.fit(result.module, result.data, ckpt_path=str(path))
    assert result.trainer.run.path != original
    assert result.callback.losses == ran.callback.losses[2:]
    assert contents(original) == before
    assert result.logger.calls[0][2] == 2, "the log goes on"
    ((step, (content,)),) = result.callback.of("on_load_checkpoint")
    assert (step, content["step"], content["note of mine"]) == (2, 2, {"step": 2})
    assert result.callback.count == 5


@pytest.mark.parametrize("ckpt_path", ["last", "folder"])
def test_stopped_run_goes_on_in_its_folder(ran, again, ckpt_path):
    first = again(stop_at=2)
    first.trainer.fit(first.module, first.data)
    assert (first.trainer.global_step, first.trainer.stop_reason) == (2, "should_stop was set")
    assert first.logger.calls[-1] == ("finalize", "success")
    assert not first.trainer.interrupted and not first.trainer.is_complete
    folder = first.trainer.run.path
    second = again()
    second.trainer.fit(
        second.module, second.data, ckpt_path="last" if ckpt_path == "last" else folder
    )
    assert second.trainer.run.path == folder
    assert first.callback.losses + second.callback.losses == ran.callback.losses
    assert second.callback.count == 5, "the state of the callback survives"
    assert second.callback.hooks[:3] == ["setup(fit)", "on_load_checkpoint", "on_fit_start"]
    assert second.logger.calls[0][:3] == ("setup", folder, 2)


def test_weights_of_a_resumed_run_are_those_of_the_uninterrupted_one(ran, again):
    first = again(stop_at=3)
    first.trainer.fit(first.module, first.data)
    second = again()
    second.trainer.fit(second.module, second.data, ckpt_path="last")
    ran.trainer.test(ran.module, ran.data, ckpt_path="last")
    one, other = second.module.model.weights(), ran.module.model.weights()
    assert all(torch.equal(one[name], other[name]) for name in one)


# Four processes


@pytest.fixture(scope="module")
def launched(overrides, tmp_path_factory):
    """The folder of four processes that used each engine, and what they printed for it."""
    folder = tmp_path_factory.mktemp("processes")
    engines = {name: own for name, own in PROCESSES.items() if name == "torch" or HAS_PIPELINING}
    for name in engines:
        (folder / name).mkdir()
    program = (ROOT / "tests" / "ten_lines.py", folder, json.dumps(engines), *overrides)
    done = finish(fork(4, *program), timeout=300)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    printed, text = {}, done.stdout
    for name in reversed(list(engines)):
        before, first, after = text.partition(f"{folder / name / 'run'}\n")
        printed[name], text = first + after, before
    assert text == ""
    return folder, printed


@pytest.fixture(scope="module", params=PROCESSES)
def processes(request, launched):
    """What each of four processes saw: those of the pipeline engine, or four replicas."""
    if request.param == "pipeline" and not HAS_PIPELINING:
        pytest.skip("the pipeline engine needs torch 2.10")
    printed = launched[1][request.param]
    folder = launched[0] / request.param
    assert printed.splitlines()[0] == str(folder / "run")
    assert f"{request.param} engine on CPU in 4 processes" in printed
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]


def test_four_processes_train_as_the_hand_written_loop(processes, expected):
    plain = expected()
    for saw in processes[1]:
        assert saw["losses"] == near(plain)


def test_head_alone_trains_as_in_one_process(processes, overrides, tmp_path):
    """The stages of the other processes are frozen."""
    alone = head_only(overrides, tmp_path / "alone")
    for saw in processes[1]:
        assert saw["head only"] == near(alone)


def test_hooks_come_in_the_same_order_in_every_process(processes):
    for rank, saw in enumerate(processes[1]):
        assert saw["hooks"] == ORDER
        assert saw["is_global_zero"] == (rank == 0)


def test_only_the_main_process_logs(processes):
    assert [saw["logged"] > 0 for saw in processes[1]] == [True, False, False, False]


def test_every_process_returns_the_scores(processes, ran):
    for saw in processes[1]:
        for scores, alone in ((saw["validated"], ran.validated), (saw["tested"], ran.tested)):
            assert scores.keys() == alone.keys()
            assert all(
                value == (None if alone[tag] is None else near(alone[tag], 1e-5))
                for tag, value in scores.items()
            )
        predicted = torch.tensor(saw["predicted"])
        assert torch.allclose(predicted, ran.predicted, rtol=0, atol=1e-5)


def test_wish_of_one_process_stops_all_at_the_same_step(processes):
    folder, saw = processes
    reasons = [reason for _, reason in (one["stopped"] for one in saw)]
    assert [step for step, _ in (one["stopped"] for one in saw)] == [2] * 4
    assert reasons[2] == "should_stop was set"
    assert {reason for rank, reason in enumerate(reasons) if rank != 2} == {
        "another process asked for it"
    }
    assert not any(one["interrupted"] for one in saw)
    last = (folder / "stopped" / "checkpoints" / "last" / "trainer_state.json").read_text()
    assert json.loads(last)["step"] == 2


# IPUs


@pytest.fixture(scope="module", params=["stand-in", "front end"])
def on_ipus(request, overrides, images, tmp_path_factory):
    """The ten lines on an implementation of PopTorch."""
    reason = loading.available() if request.param == "front end" else None
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("ipu") / "run"
    context = loading.stand_in if request.param == "stand-in" else loading.frontend
    with torch.random.fork_rng(devices=[]), context():
        return Result([*overrides, *IPU, f"run.dir={folder}"]).run(images)


def test_ipus_train_as_the_hand_written_loop(on_ipus, expected):
    assert on_ipus.callback.losses == near(expected(*IPU, for_ipu=True))


def test_hooks_come_in_the_same_order_on_ipus(on_ipus):
    assert on_ipus.callback.hooks == ORDER
    outputs = on_ipus.callback.of("on_train_batch_end")[0][1][0]
    assert outputs.grad_norm is None


def test_predictions_of_ipus_are_those_of_the_torch_engine(on_ipus, overrides, images):
    """From the checkpoint, so the weights came back from the device."""
    config = cxr_vit.load_config(
        "vit_demo", overrides=[*overrides, *IPU, "engine.name=torch", "engine.device=cpu"]
    )
    checkpoint = on_ipus.trainer.run.checkpoints / "last"
    module = WeightedFocalViT.load_from_checkpoint(checkpoint, config=config)
    predicted = cxr_vit.Trainer(config).predict(module, images)
    assert torch.allclose(on_ipus.predicted, predicted, rtol=0, atol=1e-5)
    assert on_ipus.tested.keys() == on_ipus.trainer.test_outputs.tagged().keys()


# The interfaces


def test_every_method_of_a_plain_callback_and_logger_does_nothing(again):
    result = again("run", "train.steps=1", "schedule.warmup_steps=0")
    trainer = cxr_vit.Trainer(
        result.config, callbacks=[cxr_vit.Callback()], loggers=[cxr_vit.Logger()]
    )
    trainer.fit(result.module, result.data)
    assert trainer.is_complete


def test_recorder_overrides_every_hook_there_is():
    """A hook without a test would not be noticed."""
    hooks = {name for name in vars(cxr_vit.Callback) if name.startswith("on_")}
    assert hooks | {"setup", "teardown"} <= set(vars(Recorder))
    methods = {name for name in vars(cxr_vit.Logger) if not name.startswith("_")}
    assert methods == {name for name in vars(ListLogger) if not name.startswith("_")}
