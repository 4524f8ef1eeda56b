"""The files in configs/recipes, and overrides that make each a run of five steps."""

from pathlib import Path
from typing import List

FOLDER = Path(__file__).parents[1] / "configs" / "recipes"
#: Behind a recipe, for four IPUs.
POD4 = FOLDER / "pod4.yaml"
RECIPES = sorted(path for path in FOLDER.glob("*.yaml") if path != POD4)
#: Those that train.py runs.
TRAINED = [path for path in RECIPES if path.stem != "rad_dino_probe"]
#: Those whose small runs differ: medical_mae_vit_b has another model than medical_mae_vit_s only.
RUN = [path for path in TRAINED if path.stem != "medical_mae_vit_b"]

#: A model of four layers on 32 pixels, 16 images per update. The rest is the recipe's.
SMALL = (
    *("model.name=vit-micro", "model.patch_size=8", "data.image_size=32", "data.num_workers=0"),
    *("pipeline.layers_per_stage=[1,1,1,1]", "pipeline.available_memory_proportion=null"),
    *("batch.micro_batch_size=2", "batch.gradient_accumulation=8"),
    *("batch.eval_micro_batch_size=4", "batch.eval_device_iterations=4"),
    *("engine.device=auto", "engine.precision=fp32", "engine.executable_cache=null"),
    *("engine.loader_mode=sync", "optim.loss_scaling=1"),
    *("train.log_every_steps=1", "loggers=[jsonl]", "data.cache=off"),
    "model.hidden_act=gelu_pytorch_tanh",
)
FIVE_STEPS = ("train.steps=5", "train.eval_every_steps=5", "train.checkpoint_every_steps=5")


def files(recipe: Path) -> List[Path]:
    """Return the configuration files of a recipe on four IPUs."""
    return [recipe] if recipe.stem == "tutorial" else [recipe, POD4]


def small(recipe: Path, root: Path) -> List[str]:
    """Return the overrides of a small run of a recipe on the sample."""
    overrides = [*SMALL, *FIVE_STEPS, f"data.root={root}"]
    text = recipe.read_text(encoding="utf-8")
    if "resize:" in text:
        overrides.append("data.resize=36")
    if "warmup_epochs:" in text:  # of epochs, and this is a run of steps
        overrides.append("schedule.warmup_steps=2")
    return overrides
