"""The features of a linear probe on an IPU: those of the torch engine."""

import torch

from cxr_vit import ChestXrayDataModule, load_config
from cxr_vit.training.features import FeatureReader

from .commands import IPU, SMALL, TORCH


def features(sample_root, tmp_path, *overrides):
    words = [*SMALL, f"data.root={sample_root}", f"data.cache_dir={tmp_path}"]
    words += ["engine.precision=fp32", "model.hidden_act=gelu_pytorch_tanh", *overrides]
    config = load_config(["vit_demo_ipu"], words)
    return FeatureReader(config, ChestXrayDataModule(config)).read("val")


def test_features_equal_those_of_the_torch_engine(ipu, sample_root, tmp_path):
    own, other = (features(sample_root, tmp_path, *engine) for engine in (IPU, TORCH))
    assert not other.was_kept  # each engine has features of its own
    assert own.values.shape == other.values.shape
    assert torch.allclose(own.values, other.values, atol=1e-4)


def test_another_output_has_features_of_its_own(ipu, sample_root, tmp_path):
    features(sample_root, tmp_path, *IPU)
    assert features(sample_root, tmp_path, *IPU).was_kept
    other = features(sample_root, tmp_path, *IPU, "engine.eval_output=fp16")
    assert not other.was_kept
