"""The command `probe`: a run folder that evaluate.py and transformers read; features are kept."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTForImageClassification

import families
from conftest import SMALL
from cxr_vit import ChestXrayDataModule, Trainer, ViTModule, load_config
from cxr_vit.cli import main
from cxr_vit.commands import evaluate as evaluate_command
from cxr_vit.engines import devices
from cxr_vit.errors import ConfigError, DataError, ModelError
from cxr_vit.training import features
from cxr_vit.training.features import FeatureReader


@pytest.fixture(scope="module")
def words(sample_root, tmp_path_factory):
    """The command line but for the run's folder."""
    cache = tmp_path_factory.mktemp("cache")
    return [*SMALL, f"data.root={sample_root}", f"data.cache_dir={cache}", "loggers=[jsonl]"]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "probe"
    assert main(["probe", *words, f"run.dir={folder}"]) == 0
    return folder


def reader_of(words, *more):
    config = load_config([], [*words, *more])
    return FeatureReader(config, ChestXrayDataModule(config))


def test_run_has_the_best_head_and_scores_as_the_probe_did(run, words):
    found = json.loads((run / "heads.json").read_text())
    scores = {head["weight_decay"]: head["val_auroc_macro"] for head in found["heads"]}
    assert len(scores) == 9
    best = scores[found["weight_decay"]]
    assert best == max(scores.values())
    (event,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert event["step"] == 0
    assert event["val/auroc_macro"] == best
    config = load_config([run / "config.yaml"])
    assert config.model.freeze == "trunk"
    module = ViTModule.load_from_checkpoint(run)
    data = ChestXrayDataModule(config)
    again = Trainer(module.config).validate(module, data)
    assert again["val/auroc_macro"] == pytest.approx(best, abs=1e-6)


def test_trunk_is_that_of_the_model(run, words):
    module = ViTModule(load_config([], words))
    module.setup()
    saved = load_file(str(run / "checkpoints" / "best" / "model.safetensors"))
    differing = [
        name for name, w in module.model.weights().items() if not torch.equal(w, saved[name])
    ]
    assert sorted(differing) == ["classifier.bias", "classifier.weight"]


def test_transformers_and_evaluate_read_the_checkpoint(run, words, capsys):
    checkpoint = run / "checkpoints" / "last"
    model = ViTForImageClassification.from_pretrained(str(checkpoint)).eval()
    images = families.images(32)
    module = ViTModule.load_from_checkpoint(checkpoint)
    module.setup()
    with torch.no_grad():
        own, theirs = module.eval()(images), model(families.pixels(images)).logits
    assert torch.allclose(own, theirs, atol=1e-4)
    assert evaluate_command.main(["--checkpoint", str(run)]) == 0
    report = json.loads((run / "report" / "metrics.json").read_text())
    assert report["step"] == 0
    assert report["changed_since_training"] == []


def test_features_are_kept_and_read_again(run, words, monkeypatch):
    computed = reader_of(words, "data.cache=off").read("val")
    assert (computed.path, computed.was_kept) == (None, False)
    monkeypatch.setattr(Trainer, "test", None)
    kept = reader_of(words).read("val")
    assert kept.was_kept
    assert torch.equal(kept.values, computed.values)


@pytest.mark.parametrize(
    "change",
    [
        ["run.seed=1"],  # random weights
        ["model.image_mean=0.4"],
        ["engine.precision=bf16"],
        ["data.val_fraction=0.3"],
    ],
    ids=" ".join,
)
def test_other_weights_images_or_precision_have_features_of_their_own(run, words, change):
    own, other = reader_of(words).read("val"), reader_of(words, *change).read("val")
    assert own.was_kept
    assert not other.was_kept
    assert own.path != other.path


def test_settings_that_do_not_change_features_keep_them(run, words):
    own = ["optim.lr=0.1", "model.freeze=trunk", "model.head_bias=zero", "model.drop_path=0.1"]
    own += ["data.include_no_finding=true", "model.dropout=0.1", "model.head_std=0.1"]
    assert reader_of(words, *own).read("val").was_kept


def test_precision_that_is_chosen_here_has_features_of_its_own(run, words, monkeypatch):
    paths = set()
    for has_bf16 in (False, True):
        monkeypatch.setattr(devices, "cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16)
        paths.add(reader_of(words, "engine.precision=auto").read("val").path)
    assert len(paths) == 2
    assert reader_of(words).read("val").path in paths  # fp32, as auto was first


def test_damaged_features_are_computed_again(run, words, caplog):
    first = reader_of(words).read("val")
    content = first.path.read_bytes()
    for damaged in (content[:-1], b"", content[:8] + b"?" + content[9:]):
        first.path.write_bytes(damaged)
        again = reader_of(words).read("val")
        assert not again.was_kept
        assert torch.equal(again.values, first.values)
        assert first.path.read_bytes() == content
    assert "computing the features again" in caplog.text
    save_file({"features": first.values[:1]}, str(first.path))
    assert not reader_of(words).read("val").was_kept


def test_features_that_cannot_be_kept_are_used(words, caplog, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "replacing", fail)
    values = reader_of(words, "run.seed=2").read("val").values
    assert values.shape[1] == 96
    assert "the features are not kept" in caplog.text


class TwoLayers(ViTModule):
    """Has a head that is not one layer."""

    def configure_model(self):
        vit = super().configure_model()
        vit.add_module("classifier", torch.nn.Sequential(vit.get_submodule("classifier")))
        return vit


def test_another_head_is_refused(words, monkeypatch):
    class Features(features.FeatureModule, TwoLayers):
        pass

    monkeypatch.setattr(features, "FeatureModule", Features)
    with pytest.raises(ModelError, match="its head is Sequential, and a linear probe replaces one"):
        reader_of(words).read("val")


def test_pipeline_engine_is_refused(words):
    with pytest.raises(ConfigError, match=re.escape("with engine.name=torch")):
        reader_of(words, "engine.name=pipeline")


def test_generated_images_are_refused(words):
    with pytest.raises(ConfigError, match="would not be those of the images"):
        reader_of(words, "engine.synthetic_data=true")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("loss.name=focal", "loss.name=focal: a linear probe is logistic regression"),
        ("model.freeze=2", "model.freeze=2: a linear probe freezes the whole trunk"),
    ],
)
def test_what_a_probe_cannot_do_is_refused(words, override, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        main(["probe", *words, override])


def test_validation_without_a_defined_finding_is_refused(words, tmp_path, monkeypatch):
    from cxr_vit.commands import probe_run

    monkeypatch.setattr(
        probe_run,
        "score_heads",
        lambda fits, *rest: [probe_run.Scored(f, {"auroc_macro": None}) for f in fits],
    )
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="no finding has both positive and negative validation"):
        main(["probe", *words, f"run.dir={folder}"])
    assert not folder.exists()


def test_run_is_not_written_over(run, words):
    before = sorted(path.name for path in run.iterdir())
    with pytest.raises(ConfigError, match="exists and is not empty"):
        main(["probe", *words, f"run.dir={run}"])
    assert sorted(path.name for path in run.iterdir()) == before
