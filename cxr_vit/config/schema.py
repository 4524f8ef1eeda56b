"""The sections of a configuration: every field's type, range and meaning.

`--help`, the checks and the error messages are all made from this one description. Types are read
at run time, also by Python 3.8: `Optional[int]`, not `int | None`. Imports no torch.
"""

from typing import Any, ClassVar, Dict, Optional, Tuple, Type, Union

from pydantic import Field
from typing_extensions import Annotated, Literal

from cxr_vit.config.augment_schema import AugmentSection
from cxr_vit.config.device_schema import EngineSection, PipelineSection
from cxr_vit.config.section import PathText, Section

__all__ = ["SECTIONS", "Config", "Section"]

#: Sides of the square the model sees, pixels.
SMALLEST_IMAGE, LARGEST_IMAGE = 8, 2048


class RunSection(Section):
    """Where a run is written, and its seed."""

    name: str = Field("run", pattern=r"^\w[\w.-]*$", description="name of the run")
    root: PathText = Field("runs", description="folder that holds the runs' folders")
    dir: Optional[PathText] = Field(
        None, description="the run's folder outright, instead of <root>/<name>-<time>"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="seeds weights, sample order and dropout")


class DataSection(Section):
    """Where the films and labels are, how they are split and at what size they are read."""

    belongs_to: ClassVar[Dict[str, str]] = dict.fromkeys(
        (
            "sample_images",
            "csv",
            "images",
            "train_list",
            "val_list",
            "test_list",
            "boxes",
            "relabels",
            "cache_dir",
        ),
        "root",
    )

    root: PathText = Field(
        "${DATASET_DIR:-.}/chest-xray-nihcc",
        description="folder with the CSV, the list files and the images",
        validate_default=True,
    )
    csv: Optional[PathText] = Field(
        None, description="the CSV, where it is not in the root under one of NIH's names"
    )
    images: Optional[PathText] = Field(
        None, description="the folder of the images (any nesting), where it is not the root"
    )
    boxes: Optional[PathText] = Field(
        None, description="NIH's BBox_List_2017.csv, where it is not in the root"
    )
    relabels: Optional[PathText] = Field(
        None, description="Google's 2019 labels by radiologists, where they are not in the root"
    )
    split: Literal["auto", "official", "patient", "random"] = Field(
        "auto",
        description="official list files, seeded by patient, or seeded by image (leaks patients);"
        " auto: official where its list files are, else patient",
    )
    train_list: Optional[PathText] = Field(
        None,
        description="the official split's training list (with or without the validation films),"
        " where it is not in the root under one of its names",
    )
    val_list: Optional[PathText] = Field(
        None,
        description="names of the validation films; null: val_list.txt (or val_list_NIH.txt,"
        " community_val_list.txt) of the root, else drawn out of the training list by patient",
    )
    test_list: Optional[PathText] = Field(None, description="the official split's test list")
    split_seed: int = Field(1337, ge=0, lt=2**63, description="seed of everything the split draws")
    val_fraction: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="part of the films for validation (official: of its training list)",
    )
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="part of the films for testing (patient and random splits)"
    )
    image_size: int = Field(
        224,
        ge=SMALLEST_IMAGE,
        le=LARGEST_IMAGE,
        description="side of the square the model sees, pixels",
    )
    include_no_finding: bool = Field(
        False, description="make 'No Finding' a 15th class, as the tutorial has it"
    )
    on_missing: Literal["error", "skip"] = Field(
        "error", description="what to do about CSV rows whose image is not there"
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error",
        description="what to do about films that are damaged or not what they should be: list them"
        " and stop, or leave them out and write skipped.csv",
    )
    max_megapixels: int = Field(
        64,
        ge=1,
        le=178,
        description="films of more pixels are refused unread (a file of a few kB can hold them)",
    )
    cache: Literal["auto", "require", "off"] = Field(
        "auto",
        description="keep the films, decoded and resized, in one file: build it on first use,"
        " insist on a finished one, or decode in every epoch (and all once at each start, to see"
        " that they can be)",
    )
    cache_dir: Optional[PathText] = Field(
        None, description="folder of the cache; null: <data.root>/cxr_vit_cache"
    )
    cache_workers: Optional[int] = Field(
        None, ge=1, le=256, description="processes that decode films for it; null: one a core"
    )
    num_workers: int = Field(
        0, ge=0, le=128, description="loader processes; 0 reads in the main one"
    )
    sample_images: Optional[int] = Field(
        None,
        ge=20,
        description="if the root does not exist, write a synthetic data set of so many films there;"
        " holds for the root it was given with",
    )


class ModelSection(Section):
    """Which ViT, and from where."""

    name: PathText = Field(
        "google/vit-base-patch16-224-in21k",
        description="hub name, local folder, or for random weights vit-micro, vit-tiny, vit-small,"
        " vit-base, vit-large, vit-huge",
    )
    patch_size: int = Field(
        16, ge=2, le=128, description="side of a patch, pixels (random weights only)"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout after embeddings, attention and MLP"
    )
    hidden_act: Optional[Literal["gelu", "gelu_pytorch_tanh"]] = Field(
        None,
        description="the MLP's activation: exact GELU or its tanh form, which is all an IPU has;"
        " null: as in the weights' config.json",
    )
    head_bias: Literal["prior", "zero"] = Field(
        "prior",
        description="a new head starts at the training prevalence (bias log-odds, small weights),"
        " or as Hugging Face makes it",
    )
    image_mean: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="gray level subtracted, of 0..1 (a checkpoint's"
        " preprocessor_config.json is not read)",
    )
    image_std: float = Field(0.5, gt=0, le=1, description="gray level divided by, of 0..1")


class BatchSection(Section):
    """How many samples meet when."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (
        ("gradient_accumulation", "global_batch_size"),
    )
    micro_batch_size: int = Field(1, ge=1, description="samples in one forward pass of one replica")
    gradient_accumulation: Optional[int] = Field(
        1, ge=1, description="micro-batches per weight update, per replica"
    )
    global_batch_size: Optional[int] = Field(
        None, ge=1, description="samples per weight update, instead of gradient_accumulation"
    )
    replicas: int = Field(1, ge=1, description="data-parallel copies of the whole pipeline")
    device_iterations: int = Field(1, ge=1, description="weight updates per host call in training")
    eval_micro_batch_size: int = Field(
        1, ge=1, description="samples in one forward pass of evaluation"
    )
    eval_device_iterations: int = Field(
        1, ge=1, description="micro-batches per host call in evaluation"
    )


class OptimSection(Section):
    """The optimizer."""

    name: Literal["adamw", "lamb", "sgd"] = Field(
        "adamw", description="the optimizer (lamb: IPU only)"
    )
    lr: float = Field(2e-4, gt=0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    decay_all: bool = Field(
        False,
        description="decay every parameter, also biases, norms, class token, position embeddings",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment (adamw, lamb)")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment (adamw, lamb)")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum (sgd)")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: Optional[float] = Field(
        None, gt=0, description="clip the global gradient norm to this; null: no clipping"
    )
    loss_scaling: Union[Literal["auto"], Annotated[float, Field(gt=0)]] = Field(
        1.0,
        description="factor on the loss that keeps fp16 gradients from underflowing, undone before"
        " the update; auto lets PopART adjust it (IPU; the torch engine has a scaler of its own)",
    )
    accumulator: Literal["fp32", "fp16"] = Field(
        "fp32", description="dtype of the accumulated gradients (IPU)"
    )
    first_moment: Literal["fp32", "fp16"] = Field(
        "fp32", description="dtype of the first moment, sgd's velocity (IPU)"
    )
    second_moment: Literal["fp32", "fp16"] = Field(
        "fp32", description="dtype of the second moment (IPU)"
    )


class ScheduleSection(Section):
    """The learning rate over the steps."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (("warmup_ratio", "warmup_steps"),)
    name: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay after the warm-up, to 0 at the last step (constant: none)"
    )
    warmup_ratio: Optional[float] = Field(
        0.0, ge=0, le=1, description="part of all steps in which the rate rises from 0"
    )
    warmup_steps: Optional[int] = Field(None, ge=0, description="the same as a number of steps")


class TrainSection(Section):
    """How long to train, and how often to look, score and save."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (
        ("epochs", "steps"),
        ("eval_every_epochs", "eval_every_steps"),
        ("checkpoint_every_epochs", "checkpoint_every_steps"),
    )
    epochs: Optional[float] = Field(3, gt=0, description="length of the training, in epochs")
    steps: Optional[int] = Field(
        None, ge=1, description="length of the training, in weight updates"
    )
    log_every_steps: int = Field(50, ge=1, description="scalars are logged every so many steps")
    eval_every_epochs: Optional[float] = Field(1, gt=0, description="validate every so many epochs")
    eval_every_steps: Optional[int] = Field(None, ge=1, description="validate every so many steps")
    checkpoint_every_epochs: Optional[float] = Field(
        1, gt=0, description="save every so many epochs (best and last are saved besides)"
    )
    checkpoint_every_steps: Optional[int] = Field(
        None, ge=1, description="save every so many steps"
    )
    keep_last: int = Field(2, ge=1, description="checkpoints kept beside the best")
    resume_weights_only: bool = Field(
        False,
        description="--resume takes the weights and the step, and starts the optimizer anew: for a"
        " checkpoint whose optimizer state this engine cannot take up",
    )
    early_stopping_patience: Optional[int] = Field(
        None, ge=1, description="stop after so many validations without a better macro AUROC"
    )


class PlannerSection(Section):
    """What a run is predicted to take, before it starts (python -m cxr_vit plan)."""

    hardware: Literal["auto", "mk2", "bow", "gpu"] = Field(
        "auto",
        description="the device that is planned for: an IPU of the second generation, a Bow, or a"
        " GPU; auto: gpu for engine.name=torch and pipeline, else mk2",
    )
    strict: bool = Field(
        False,
        description="stop where the IPUs' memory is predicted not to hold the model, instead of"
        " warning",
    )


class Config(Section):
    """A whole configuration."""

    run: RunSection = Field(default_factory=RunSection)
    data: DataSection = Field(default_factory=DataSection)
    augment: AugmentSection = Field(default_factory=AugmentSection)
    model: ModelSection = Field(default_factory=ModelSection)
    pipeline: PipelineSection = Field(default_factory=PipelineSection)
    batch: BatchSection = Field(default_factory=BatchSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    planner: PlannerSection = Field(default_factory=PlannerSection)

    def changed(self, **sections: Dict[str, Any]) -> "Config":
        """Return a copy with keys of sections set anew; nothing is checked."""
        new = {name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()}
        return self.model_copy(update=new)

    def flat(self) -> Dict[str, Any]:
        """Return `section.key` -> value, lists as text: what TensorBoard's hparams page takes."""
        return {
            f"{section}.{key}": value if isinstance(value, (bool, int, float)) else str(value)
            for section, values in self.model_dump().items()
            for key, value in values.items()
        }


SECTIONS: Dict[str, Type[Section]] = {
    "run": RunSection,
    "data": DataSection,
    "augment": AugmentSection,
    "model": ModelSection,
    "pipeline": PipelineSection,
    "batch": BatchSection,
    "optim": OptimSection,
    "schedule": ScheduleSection,
    "train": TrainSection,
    "engine": EngineSection,
    "planner": PlannerSection,
}
