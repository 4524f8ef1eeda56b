"""Views and models whose probabilities are averaged."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.views import VIEWS
from cxr_vit.errors import ConfigError
from cxr_vit.evaluation.metrics import MACRO_LIMITS
from cxr_vit.training.scoring import ensemble, mean_logits


def test_logits_are_those_of_the_mean_probability():
    logits = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0)) * 4
    expected = torch.logit(torch.sigmoid(logits.double()).mean(dim=0)).float()
    assert torch.allclose(mean_logits(list(logits)), expected, rtol=1e-6)
    extreme = torch.tensor([[[200.0, -200.0]], [[180.0, -180.0]]])
    assert mean_logits(list(extreme)).abs().max() < 200
    assert torch.isfinite(mean_logits(list(extreme))).all()
    assert mean_logits([logits[0]]).allclose(logits[0], rtol=1e-6)


@pytest.fixture
def tested(make_config, sample_root):
    """Test with random weights; return the outputs."""

    def test(*overrides):
        config = make_config("data.resize=40", *overrides)
        module = ViTModule(config)
        trainer = Trainer(config)
        trainer.test(module, ChestXrayDataModule(config), split="val")
        return trainer.test_outputs

    return test


def test_test_averages_the_views(tested, make_config, capsys):
    config = make_config("data.resize=40", "evaluation.views=ten_crop")
    data, module, trainer = ChestXrayDataModule(config), ViTModule(config), Trainer(config)
    trainer.test(module, data, split="val")
    outputs = trainer.test_outputs
    line = "evaluation.views=ten_crop: 10 views of each image, 10 times the time of one\n"
    assert capsys.readouterr().out.count(line) == 1

    whole = torch.from_numpy(data.dataset("val").read_images(range(len(outputs.labels))))
    parts = [whole[:, y : y + 32, x : x + 32] for y, x in [(0, 0), (0, 8), (8, 0), (8, 8), (4, 4)]]
    with torch.no_grad():
        each = [
            torch.sigmoid(module(part.unsqueeze(1)))
            for part in [*parts, *(part.flip(-1) for part in parts)]
        ]
    mean = torch.stack(each).mean(dim=0)
    assert torch.allclose(torch.sigmoid(outputs.logits), mean, atol=1e-6)
    assert not torch.allclose(mean, each[4], atol=1e-6)
    assert outputs.loss == pytest.approx(
        float(torch.nn.functional.binary_cross_entropy(mean, outputs.labels)), rel=1e-4
    )
    trainer.validate(module, data)
    assert torch.allclose(torch.sigmoid(trainer.validation_outputs.logits), each[4], atol=1e-6)
    names = data.dataset("val").image_names[:3]
    files = [str(next(Path(config.data.root).rglob(name))) for name in names]
    assert torch.allclose(trainer.predict(module, files), mean[:3], atol=1e-6)


def test_a_view_keeps_the_class_of_the_dataset(make_config):
    class Own(ChestXrayDataset):
        pass

    data = ChestXrayDataModule(make_config("augment.rotation=5")).dataset("train", augmented=True)
    data.__class__ = Own
    view = data.seen_from(VIEWS["flip"][1])
    assert isinstance(view, Own) and view.augmentation is None and data.augmentation is not None
    assert torch.equal(view[0].image[0], torch.from_numpy(data.read_images([0])[0]).flip(-1))


def test_an_ensemble_averages_probabilities_of_the_same_labels(tested):
    first, second = tested(), tested("run.seed=1")
    both = ensemble([first, second])
    mean = (torch.sigmoid(first.logits) + torch.sigmoid(second.logits)) / 2
    assert torch.allclose(torch.sigmoid(both.logits), mean, atol=1e-6)
    assert both.scores.keys() == first.scores.keys() - set(MACRO_LIMITS) and both.split == "val"
    assert both.loss == pytest.approx(
        float(torch.nn.functional.binary_cross_entropy(mean, first.labels)), rel=1e-4
    )
    other = dataclasses.replace(second, labels=1 - second.labels)
    with pytest.raises(ConfigError, match="members 1 and 3 of the ensemble were scored on other"):
        ensemble([first, second, other])
