import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from cxr_vit.checkpoint_files import newest_whole, sha256, state_text, verify_checkpoint
from cxr_vit.engines.base import EngineState
from cxr_vit.errors import CheckpointError
from cxr_vit.training import checkpoint as module
from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint


def state(value=1.0):
    moments = {name: torch.full((2,), value) for name in ("exp_avg", "exp_avg_sq")}
    slots = {**moments, "step": torch.tensor(3.0)}
    weights = {"classifier.bias": torch.full((2,), value)}
    return EngineState(weights, {"classifier.bias": slots}, "torch.AdamW", {"updates": 3.0})


def save(store, step, value=1.0):
    return store.save(
        step,
        state(value),
        files={"config.json": "{}"},
        trainer_state={"labels": ["a", "b"], "callbacks": {}},
    )


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints")


def test_loaded_checkpoint_equals_the_saved_one(store):
    loaded, trainer_state = load_checkpoint(save(store, 7, 2.5))
    assert torch.equal(loaded.weights["classifier.bias"], torch.full((2,), 2.5))
    assert torch.equal(loaded.optimizer["classifier.bias"]["exp_avg"], torch.full((2,), 2.5))
    assert float(loaded.optimizer["classifier.bias"]["step"]) == 3.0
    assert (loaded.optimizer_kind, loaded.scalars) == ("torch.AdamW", {"updates": 3.0})
    assert (trainer_state["step"], trainer_state["labels"]) == (7, ["a", "b"])


def test_random_generator_of_a_device_is_saved(store):
    with_rng = state()
    with_rng.rng = torch.tensor([2**62, 0, 2**32 - 1])
    path = store.save(3, with_rng, files={}, trainer_state={})
    loaded, _ = load_checkpoint(path)
    assert torch.equal(loaded.rng, with_rng.rng)
    assert set(loaded.optimizer) == {"classifier.bias"}
    assert load_checkpoint(save(store, 4))[0].rng is None


def test_folder_has_the_documented_files(store):
    path = save(store, 1000)
    assert path.name == "step_00001000"
    assert {file.name for file in path.iterdir()} == {
        "model.safetensors",
        "config.json",
        "optimizer.safetensors",
        "trainer_state.json",
    }


def test_all_files_have_the_same_permissions(store):
    path = save(store, 1)
    modes = {os.stat(str(file)).st_mode for file in path.iterdir()}
    assert len(modes) == 1


def test_last_points_at_the_newest_and_best_at_its_target(store):
    first = save(store, 1)
    second = save(store, 2)
    store.link("best", first)
    assert store.linked("last") == second.resolve()
    assert store.linked("best") == first.resolve()
    assert not os.path.isabs(os.readlink(str(store.folder / "best"))), "a moved run keeps its links"


def test_prune_keeps_the_newest_and_the_best(store):
    paths = [save(store, step) for step in range(1, 6)]
    store.link("best", paths[0])
    store.prune(2)
    assert [path.name for path in store.steps()] == [
        "step_00000001",
        "step_00000004",
        "step_00000005",
    ]


def test_saving_a_step_again_replaces_it(store):
    save(store, 3, 1.0)
    path = save(store, 3, 9.0)
    assert torch.equal(
        load_file(str(path / "model.safetensors"))["classifier.bias"], torch.full((2,), 9.0)
    )
    assert sorted(file.name for file in store.folder.iterdir()) == ["last", "step_00000003"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
def test_flipped_bit_is_reported(store, name):
    path = save(store, 1)
    content = bytearray((path / name).read_bytes())
    content[-1] ^= 1
    (path / name).write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=rf"{name} is damaged"):
        load_checkpoint(path)


def test_missing_file_is_reported(store):
    path = save(store, 1)
    (path / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is missing"):
        load_checkpoint(path)


def as_format_1(path, callbacks):
    """Rewrite a checkpoint's trainer_state.json as format 1 has it."""
    state = json.loads((path / "trainer_state.json").read_text())
    state.pop("best_score", None)
    state.update(format=1, callbacks=callbacks)
    (path / "trainer_state.json").write_text(json.dumps(state))


def test_format_1_is_read_with_its_callback_states_renamed(store):
    path = save(store, 7)
    window = {"losses": [0.5], "num_samples": 8}
    as_format_1(
        path,
        {
            "NonFiniteGuard": {},
            "EarlyStopping": {"best": 0.75, "since_best": 1},
            "MetricsLogging": window,
            "Checkpointing": {"best": 0.75},
        },
    )
    _, trainer_state = load_checkpoint(path)
    assert trainer_state["best_score"] == 0.75
    assert trainer_state["callbacks"] == {
        "early_stopping": {"best": 0.75, "since_best": 1},
        "metrics": window,
    }
    assert (trainer_state["step"], trainer_state["labels"]) == (7, ["a", "b"])


@pytest.mark.parametrize("major", ["4", "5"])
def test_stored_checkpoint_of_format_1_is_read(repository, major):
    path = repository / "tests" / "fixtures" / f"transformers_{major}" / "checkpoint"
    assert json.loads((path / "trainer_state.json").read_text())["format"] == 1
    _, trainer_state = load_checkpoint(path)
    assert (trainer_state["best_score"], trainer_state["callbacks"]) == (None, {})


@pytest.mark.parametrize("text", ["", "[", '{"format": 99}'])
def test_unreadable_state_is_reported(store, text):
    path = save(store, 1)
    (path / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json"):
        load_checkpoint(path)


def test_error_while_writing_keeps_the_last_checkpoint(store, monkeypatch):
    first = save(store, 1)
    write = module.save_file

    def full_disk(tensors, path, **settings):
        if path.endswith("optimizer.safetensors"):
            raise OSError(28, "No space left on device")
        write(tensors, path, **settings)

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(store, 2)
    assert store.linked("last") == first.resolve()
    assert store.steps() == [first]
    monkeypatch.undo()
    assert load_checkpoint(save(store, 2))[1]["step"] == 2, "the temporary folder is removed"


def test_copied_run_with_followed_links_can_save(store):
    save(store, 1)
    copied = CheckpointStore(store.folder.parent / "copied")
    shutil.copytree(str(store.folder), str(copied.folder), symlinks=False)
    assert not (copied.folder / "last").is_symlink()
    second = save(copied, 2)
    assert copied.linked("last") == second.resolve()


def test_prune_deletes_what_killed_processes_left(store):
    save(store, 1)
    (store.folder / ".step_00000007.writing").mkdir()
    store.prune(2)
    assert sorted(path.name for path in store.folder.iterdir()) == ["last", "step_00000001"]


def test_scoring_does_not_need_the_optimizer_state(store):
    path = save(store, 1)
    (path / "optimizer.safetensors").unlink()
    assert verify_checkpoint(path, needs_optimizer=False)["step"] == 1


def save_and_die(store, step, call):
    """Save in a process that is killed at a call of os.replace; return its signal."""
    pid = os.fork()  # a new interpreter would import torch
    if pid == 0:
        try:
            calls, replace = [], os.replace

            def die(*arguments):
                calls.append(arguments)
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return replace(*arguments)

            os.replace = die
            save(store, step)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("call", [1, 2])
def test_process_killed_between_the_renames_leaves_last_complete(store, call):
    save(store, 1)
    assert save_and_die(store, 2, call) == signal.SIGKILL
    assert load_checkpoint(store.folder / "last")[1]["step"] == 1
    save(store, 2)
    assert load_checkpoint(store.folder / "last")[1]["step"] == 2


def test_hashes_cover_every_other_file(store):
    path = save(store, 1)
    written = json.loads((path / "trainer_state.json").read_text())
    names = {file.name for file in path.iterdir()} - {"trainer_state.json"}
    assert set(written["sha256"]) == names


# What a stranger may have written: the hashes are right


def reseal(path, change=lambda state: None):
    """Write a state with the hashes of the files as they are, after a change."""
    state = json.loads((path / "trainer_state.json").read_text())
    del state["digest"]
    state["sha256"] = {name: sha256(path / name) for name in state["sha256"]}
    change(state)
    (path / "trainer_state.json").write_text(state_text(state))


def test_resealed_checkpoint_is_read(store):
    path = save(store, 1)
    reseal(path)
    assert load_checkpoint(path)[1]["step"] == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": -1}, "step: "),
        ({"step": "1"}, "step: "),
        ({"step": True}, "step: "),
        ({"step": 1.5}, "step: "),
        ({"step": 10**30}, "step: "),
        ({"step": 2}, "it is of step 2"),
        ({"evaluated_step": None}, "evaluated_step: "),
        ({"evaluated_step": 99}, "it was validated after its step"),
        ({"best_score": float("nan")}, "best_score: "),
        ({"scalars": {"updates": -1.0}}, "scalars.updates: "),
        ({"scalars": {"updates": float("inf")}}, "scalars.updates: "),
        ({"best_score": "0.5"}, "best_score: "),
        ({"scalars": {"updates": "3"}}, "scalars.updates: "),
        ({"scalars": []}, "scalars: "),
        ({"callbacks": {"early_stopping": 1}}, "callbacks.early_stopping: "),
        ({"optimizer_kind": None}, "optimizer_kind: "),
        ({"sha256": {}}, "it does not list a checkpoint's files"),
        ({"sha256": {"../../x": "0"}}, "it does not list a checkpoint's files"),
        ({"format": 2}, "it has changed since it was written"),
        ({"format": None}, "it is not the state of a checkpoint"),
        ({"format": 0}, "it has changed since it was written"),
    ],
)
def test_state_of_another_form_is_refused(store, change, words):
    path = save(store, 1)
    reseal(path, lambda state: state.update(change))
    with pytest.raises(CheckpointError, match=rf"trainer_state\.json: not readable \({words}") as e:
        load_checkpoint(path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "null", '"', "\0", "{}", "NaN"])
def test_text_that_is_no_state_is_refused(store, text):
    path = save(store, 1)
    (path / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: not readable"):
        load_checkpoint(path)


def test_state_that_is_no_file_is_refused(store):
    path = save(store, 1) / "trainer_state.json"
    path.unlink()
    os.mkfifo(str(path))
    with pytest.raises(CheckpointError, match="a named pipe, not a regular file"):
        load_checkpoint(path.parent)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("classifier.bias/exp_avg", torch.zeros(3), r"exp_avg of classifier\.bias is \[3\]"),
        ("classifier.bias/exp_avg", torch.zeros(2, dtype=torch.int32), r"int32, not a floating"),
        ("classifier.bias/step", torch.zeros(2), r"step of classifier\.bias is \[2\]"),
        ("classifier.bias/step", torch.tensor(-1.0), r"step of classifier\.bias is -1"),
        ("classifier.bias/step", torch.tensor(float("nan")), r"step of classifier\.bias is nan"),
        (
            "classifier.bias/step",
            torch.tensor(True),
            r"step of classifier\.bias is \[\] of torch.b",
        ),
        ("classifier.bias/evil", torch.zeros(2), r"AdamW has other slots than evil, exp_avg"),
        ("*/exp_avg", torch.zeros(2), r"has state of \*, which is no weight"),
        ("classifier.weight/exp_avg", torch.zeros(2), r"classifier\.weight, which is no weight"),
        ("a/b/c", torch.zeros(2), "has state of a, which is no weight"),
        ("exp_avg", torch.zeros(2), "has state of exp_avg, which is no weight"),
    ],
)
def test_optimizer_state_of_another_shape_is_refused(store, key, value, words):
    path = save(store, 1)
    file = path / "optimizer.safetensors"
    save_file({**load_file(str(file)), key: value}, str(file))
    reseal(path)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def test_empty_optimizer_state_is_refused(store):
    path = save(store, 1)
    save_file({}, str(path / "optimizer.safetensors"))
    reseal(path)
    with pytest.raises(CheckpointError, match="state of the optimizer is empty"):
        load_checkpoint(path)


def test_weights_of_another_type_are_refused(store):
    path = save(store, 1)
    weights = {"classifier.bias": torch.zeros(2, dtype=torch.int32)}
    save_file(weights, str(path / "model.safetensors"))
    reseal(path)
    with pytest.raises(CheckpointError, match=r"classifier\.bias is torch\.int32, not float32"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_file_of_another_kind_is_refused(store, name):
    path = save(store, 1)
    (path / name).write_bytes(b"\xff" * 100)
    reseal(path)
    with pytest.raises(CheckpointError, match="Use another checkpoint"):
        load_checkpoint(path)


def test_nothing_is_parsed_before_its_hash_is_right(store, monkeypatch):
    path = save(store, 1)
    (path / "model.safetensors").write_bytes(b"\xff" * 100)
    monkeypatch.setattr(module, "load_file", None)  # calling it would be another error
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_checkpoint(path)


# Kills and failures within a save


def test_failed_replacement_keeps_the_old_checkpoint(store, monkeypatch):
    path = save(store, 3, 1.0)
    replace = os.replace

    def fail(source, target):
        if str(source).endswith(".writing") and str(target) == str(path):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save(store, 3, 9.0)
    assert float(load_checkpoint(path)[0].weights["classifier.bias"][0]) == 1.0
    assert sorted(file.name for file in store.folder.iterdir()) == ["last", "step_00000003"]


def test_checkpoint_that_a_kill_left_hidden_is_found_and_restored(store):
    path = save(store, 3)
    path.rename(path.with_name(f".{path.name}.replaced"))
    assert newest_whole(store.folder.parent).checkpoint == path.with_name(f".{path.name}.replaced")
    assert store.prune(1) is None
    assert store.restore(3, None) is False
    assert newest_whole(store.folder.parent).checkpoint == path
    assert store.linked("last") == path


def test_damaged_checkpoints_are_kept_under_names_of_their_own(store):
    for step in (1, 2):
        save(store, step)
    for name in ("step_00000002.damaged", "step_00000002.damaged-2"):
        assert store.restore(1, 1) is True
        assert (store.folder / name).is_dir()
        save(store, 2)
    store.prune(1)
    assert len(list(store.folder.glob("*.damaged*"))) == 2


@pytest.mark.parametrize("best", [1, 2])
def test_best_is_the_one_the_state_knows(store, best):
    paths = [save(store, step) for step in (1, 2)]
    store.link("best", paths[0])
    assert store.restore(2, best) is True
    assert store.linked("best") == paths[best - 1]


def test_best_that_is_gone_is_forgotten(store):
    first, second = save(store, 1), save(store, 2)
    store.link("best", first)
    shutil.rmtree(str(first))
    assert store.restore(2, 1) is False
    assert not os.path.lexists(str(store.folder / "best"))
    assert store.linked("last") == second


def test_copy_of_the_best_checkpoint_is_not_removed(store):
    first, _ = save(store, 1), save(store, 2)
    shutil.copytree(str(first), str(store.folder / "best"))
    shutil.rmtree(str(first))
    assert store.restore(2, 1) is True
    assert load_checkpoint(store.folder / "best")[1]["step"] == 1


def test_process_that_does_not_write_restores_nothing(store):
    save(store, 3)
    assert CheckpointStore(store.folder, writes=False).restore(1, None) is True
    assert [path.name for path in store.steps()] == ["step_00000003"]
