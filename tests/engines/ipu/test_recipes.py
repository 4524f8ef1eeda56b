"""Five steps of the recipes and of vit_pod4.yaml on IPUs, compared with the torch engine."""

from __future__ import annotations

from typing import Dict, List, Tuple

import pytest

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.config import load_config
from recipes import FOLDER, RUN, files, small
from runs import Recorder


@pytest.fixture(scope="module")
def losses(sample_root, tmp_path_factory):
    """Return the losses of a recipe on an engine; those of the torch engine are kept."""
    kept: Dict[Tuple[str, str], List[float]] = {}

    def find(recipe, engine):
        folder = tmp_path_factory.mktemp(engine) / "run"
        overrides = [*small(recipe, sample_root), f"engine.name={engine}", f"run.dir={folder}"]
        config, recorder = load_config(files(recipe), overrides), Recorder()
        data = ChestXrayDataModule(config)
        Trainer(config, callbacks=[recorder]).fit(ViTModule(config, data), data)
        return recorder.losses

    def find_or_keep(recipe, engine):
        key = (recipe.stem, engine)
        if engine == "torch" and key in kept:
            return kept[key]
        kept[key] = find(recipe, engine)
        return kept[key]

    return find_or_keep


@pytest.mark.parametrize(
    "recipe", [*RUN, FOLDER.parent / "vit_pod4.yaml"], ids=lambda path: path.stem
)
def test_five_steps_equal_the_torch_engines(ipu, losses, recipe):
    expected = losses(recipe, "torch")
    assert len(set(expected)) == 5
    assert losses(recipe, "poptorch") == pytest.approx(expected, rel=0, abs=1e-5)
