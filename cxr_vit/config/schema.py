"""The sections of a configuration: their fields, types, ranges, defaults and help texts.

A field's description is its text in ``train.py --help``.
"""

import os
import re
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type, Union, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Annotated, Literal

from cxr_vit.config.popart_options import typed_options

__all__ = ["LARGEST_IMAGE", "SECTIONS", "SMALLEST_IMAGE", "Config", "PathText", "Section", "Words"]

#: Legal values of `data.image_size`, pixels.
SMALLEST_IMAGE, LARGEST_IMAGE = 8, 2048

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Words:
    """Describe what a field accepts, in place of its type: ``Annotated[type, Words("...")]``."""

    def __init__(self, text: str) -> None:
        self.text = text


def _expand(text: str) -> str:
    """Replace `${VARIABLE:-default}` and a leading `~`; an unset variable needs a default."""

    def value(match: "re.Match[str]") -> str:
        name, default = match.groups()
        # As in a shell, `:-` also covers a variable that is set but empty.
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(
                f"environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return found

    return os.path.expanduser(_VARIABLE.sub(value, text))


PathText = Annotated[str, Field(min_length=1), AfterValidator(_expand)]

FloatType = Literal["fp32", "fp16"]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are immutable and finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    #: Pairs of keys of which exactly one counts: giving the second replaces the first's default.
    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = ()

    #: Key -> owner: a later layer that gives the owner resets the key.
    belongs_to: ClassVar[Dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_pair(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for first, second in cls.exclusive:
            given = [key for key in (first, second) if data.get(key) is not None]
            if len(given) == 2:
                raise ValueError(f"give '{first}' or '{second}', not both")
            if given == [second]:
                data[first] = None
            elif first in data and not given:
                del data[first]  # `epochs: null` beside no `steps` means the default
        return data


class RunSection(Section):
    """Run folder and seed."""

    name: str = Field("run", pattern=r"^\w[\w.-]*$", description="name of the run")
    root: PathText = Field("runs", description="parent folder of the run folders")
    dir: Optional[PathText] = Field(
        None, description="the run folder itself, instead of <root>/<name>-<time>"
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="seed of weights, sample order, augmentation and dropout"
    )


class DataSection(Section):
    """Images and labels: files, split, size and cache."""

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
        None, description="CSV of the labels, if it is not in the root under one of NIH's names"
    )
    images: Optional[PathText] = Field(
        None, description="folder of the images, nested or not, if it is not the root"
    )
    boxes: Optional[PathText] = Field(None, description="BBox_List_2017.csv, if not in the root")
    relabels: Optional[PathText] = Field(
        None, description="Google's 2019 labels by radiologists, if not in the root"
    )
    split: Literal["auto", "official", "patient", "random"] = Field(
        "auto",
        description="official list files, random by patient, or random by image (leaks patients);"
        " auto: official if its list files exist, else patient",
    )
    train_list: Optional[PathText] = Field(
        None,
        description="the official split's training list (with or without the validation images),"
        " if it is not in the root under one of its names",
    )
    val_list: Optional[PathText] = Field(
        None,
        description="names of the validation images; null: val_list.txt (or val_list_NIH.txt,"
        " community_val_list.txt) of the root, else drawn from the training list by patient",
    )
    test_list: Optional[PathText] = Field(None, description="the official split's test list")
    split_seed: int = Field(1337, ge=0, lt=2**63, description="seed of all random splits")
    val_fraction: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="fraction of the images for validation (official: of its training list)",
    )
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="fraction of the images for testing (patient, random)"
    )
    image_size: int = Field(
        224,
        ge=SMALLEST_IMAGE,
        le=LARGEST_IMAGE,
        description="width and height of the model's input, pixels",
    )
    include_no_finding: bool = Field(
        False, description="make 'No Finding' a 15th label, as Graphcore's tutorial does"
    )
    on_missing: Literal["error", "skip"] = Field(
        "error", description="what to do with CSV rows whose image is missing"
    )
    on_bad_image: Literal["error", "skip"] = Field(
        "error",
        description="what to do with damaged or unexpected images: list them and stop, or leave"
        " them out and write skipped.csv",
    )
    max_megapixels: int = Field(
        64,
        ge=1,
        le=178,
        description="refuse larger images without reading them (a few kB can decode to gigabytes)",
    )
    cache: Literal["auto", "require", "off"] = Field(
        "auto",
        description="one file of the decoded and resized images: build it on first use, require a"
        " finished one, or decode in every epoch (and each image once at every start, to check it)",
    )
    cache_dir: Optional[PathText] = Field(
        None, description="folder of the cache; null: <data.root>/cxr_vit_cache"
    )
    cache_workers: Optional[int] = Field(
        None, ge=1, le=256, description="processes that build the cache; null: one per core"
    )
    num_workers: int = Field(
        0, ge=0, le=128, description="loader processes; 0: load in the main process"
    )
    sample_images: Optional[int] = Field(
        None,
        ge=20,
        description="number of images of a synthetic data set to write if the root does not exist;"
        " applies only to the root it is given with",
    )


class AugmentSection(Section):
    """Augmentation of training images: each range is sampled uniformly, and 0 is off."""

    rotation: float = Field(
        0.0, ge=0, le=45, description="maximum rotation in either direction, degrees"
    )
    shift: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="maximum shift in either direction of each axis, as a fraction of the side",
    )
    scale: float = Field(
        0.0, ge=0, le=0.5, description="maximum change of size, larger or smaller, e.g. 0.1"
    )
    crop: float = Field(
        1.0,
        ge=0.5,
        le=1,
        description="random resized crop: smallest fraction of the area that is kept (1: off); less"
        " than half would cut the lungs",
    )
    crop_ratio: float = Field(
        1.1, ge=1, le=1.5, description="maximum aspect ratio of a crop, wide or high"
    )
    brightness: float = Field(
        0.0, ge=0, le=0.5, description="maximum change of the factor on gray levels"
    )
    contrast: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="maximum change of the factor on the distance from the image's mean",
    )
    gamma: float = Field(
        0.0, ge=0, le=0.5, description="maximum change of the exponent of gray levels"
    )
    horizontal_flip: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of mirroring, which puts the heart on the other side",
    )

    @property
    def moves(self) -> bool:
        """Whether images are rotated, shifted, scaled, cropped or flipped."""
        return self.shows_beyond or self.crop < 1 or self.horizontal_flip > 0

    @property
    def shows_beyond(self) -> bool:
        """Whether pixels beyond the border of an image may come into view."""
        return self.rotation > 0 or self.shift > 0 or self.scale > 0

    @property
    def recolours(self) -> bool:
        """Whether gray levels change."""
        return self.brightness > 0 or self.contrast > 0 or self.gamma > 0

    @property
    def is_on(self) -> bool:
        """Whether any augmentation is on."""
        return self.moves or self.recolours


class ModelSection(Section):
    """The Vision Transformer and its initial weights."""

    name: PathText = Field(
        "google/vit-base-patch16-224-in21k",
        description="hub name, local folder, or for random weights vit-micro, vit-tiny, vit-small,"
        " vit-base, vit-large, vit-huge",
    )
    patch_size: int = Field(
        16, ge=2, le=128, description="width and height of a patch, pixels (random weights only)"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="dropout after embeddings, attention and MLP"
    )
    hidden_act: Optional[Literal["gelu", "gelu_pytorch_tanh"]] = Field(
        None,
        description="activation of the MLP: exact GELU or its tanh form, the only one of an IPU;"
        " null: as in the config.json of the weights",
    )
    head_bias: Literal["prior", "zero"] = Field(
        "prior",
        description="initial head: bias at the log-odds of the training prevalence with small"
        " weights, or Hugging Face's default",
    )
    image_mean: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="mean to subtract from gray levels of 0 to 1 (a checkpoint's"
        " preprocessor_config.json is not read)",
    )
    image_std: float = Field(
        0.5, gt=0, le=1, description="standard deviation to divide gray levels by"
    )


LayerCounts = List[Annotated[int, Field(ge=0)]]

Proportion = Annotated[float, Field(gt=0, le=1)]

RecomputeWord = Literal["every_layer", "stage_inputs"]

RecomputeChoice = Union[RecomputeWord, List[Annotated[int, Field(ge=0)]]]

RecomputeText = Words(
    "every_layer, stage_inputs, or a list with one item per stage: one of these words, or a list of"
    " layers, integers >= 0"
)


class PipelineSection(Section):
    """The cut of the model into stages, and how stages run."""

    layers_per_stage: LayerCounts = Field(
        [3, 3, 3, 3],
        min_length=1,
        description="encoder layers of each stage; embedding on the first, head on the last",
    )
    eval_layers_per_stage: Optional[LayerCounts] = Field(
        None, min_length=1, description="layers per stage in evaluation; null: as in training (IPU)"
    )
    execution: Literal["pipelined", "sharded"] = Field(
        "pipelined",
        description="training: stages work on different micro-batches at once, or one after"
        " another (IPU)",
    )
    eval_execution: Literal["pipelined", "sharded"] = Field(
        "pipelined", description="the same in evaluation (IPU)"
    )
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = Field(
        "1f1b",
        description="order of the stages' work in training: all forward passes before all backward"
        " passes, alternating forward and backward passes (holds fewer activations), or alternating"
        " with several stages per process (pipeline engine)",
    )
    recompute: Annotated[Union[RecomputeWord, List[RecomputeChoice]], RecomputeText] = Field(
        "every_layer",
        description="pipelined: layers whose output is kept for the backward pass, which recomputes"
        " the rest from there; the inputs of a stage are always kept (IPU)",
    )
    available_memory_proportion: Optional[Union[Proportion, List[Proportion]]] = Field(
        None,
        description="fraction of an IPU's memory that a matrix product may use as working memory,"
        " or one number per stage; null: PopLibs' default (IPU)",
    )


class BatchSection(Section):
    """Samples per forward pass, per weight update and per host call."""

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
        description="decay all parameters, with biases, norms, class token, position embeddings",
    )
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment (adamw, lamb)")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment (adamw, lamb)")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum (sgd)")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: Optional[float] = Field(
        None, gt=0, description="maximum global gradient norm; null: no clipping"
    )
    loss_scaling: Union[Literal["auto"], Annotated[float, Field(gt=0)]] = Field(
        1.0,
        description="factor on the loss that keeps fp16 gradients from underflow, removed before"
        " the update; auto: adjusted by PopART (IPU; the torch engine has its own scaler)",
    )
    accumulator: FloatType = Field("fp32", description="dtype of the accumulated gradients (IPU)")
    first_moment: FloatType = Field(
        "fp32", description="dtype of the first moment, for sgd of the velocity (IPU)"
    )
    second_moment: FloatType = Field("fp32", description="dtype of the second moment (IPU)")


class ScheduleSection(Section):
    """The learning rate over the steps."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (("warmup_ratio", "warmup_steps"),)
    name: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="decay after the warm-up, to 0 at the last step (constant: none)"
    )
    warmup_ratio: Optional[float] = Field(
        0.0, ge=0, le=1, description="fraction of all steps in which the rate rises from 0"
    )
    warmup_steps: Optional[int] = Field(None, ge=0, description="the same as a number of steps")


class TrainSection(Section):
    """Length of the training, and intervals of logging, validation and checkpoints."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (
        ("epochs", "steps"),
        ("eval_every_epochs", "eval_every_steps"),
        ("checkpoint_every_epochs", "checkpoint_every_steps"),
    )
    epochs: Optional[float] = Field(3, gt=0, description="length of the training, epochs")
    steps: Optional[int] = Field(None, ge=1, description="length of the training, weight updates")
    log_every_steps: int = Field(50, ge=1, description="steps between logged metrics")
    eval_every_epochs: Optional[float] = Field(1, gt=0, description="epochs between validations")
    eval_every_steps: Optional[int] = Field(None, ge=1, description="steps between validations")
    checkpoint_every_epochs: Optional[float] = Field(
        1, gt=0, description="epochs between checkpoints (best and last are saved as well)"
    )
    checkpoint_every_steps: Optional[int] = Field(
        None, ge=1, description="steps between checkpoints"
    )
    keep_last: int = Field(2, ge=1, description="number of checkpoints kept beside the best")
    resume_weights_only: bool = Field(
        False,
        description="--resume loads the weights and the step and resets the optimizer: for a"
        " checkpoint whose optimizer state this engine cannot load",
    )
    early_stopping_patience: Optional[int] = Field(
        None, ge=1, description="validations without a better macro AUROC before training stops"
    )


class EngineSection(Section):
    """The engine, its device and its arithmetic."""

    name: Literal["auto", "poptorch", "torch", "pipeline"] = Field(
        "auto",
        description="IPUs; one torch device (per process under torchrun); one or more stages per"
        " process under torchrun; auto: IPUs if any answer, else a GPU, else the CPU",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the torch and pipeline engines"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="arithmetic of the forward pass; auto: bf16 if the processor supports it, else"
        " fp32 (fp16 on older GPUs and on IPUs)",
    )
    timeout_s: float = Field(
        600,
        gt=0,
        description="under torchrun: seconds to wait for another process before the run ends",
    )
    weights: FloatType = Field("fp32", description="dtype of the weights and their update (IPU)")
    partials: FloatType = Field(
        "fp16", description="dtype of partial sums; always fp32 in fp32 arithmetic (IPU)"
    )
    stochastic_rounding: bool = Field(
        True, description="round fp16 stochastically in training, never in evaluation (IPU)"
    )
    floating_point_exceptions: bool = Field(
        False, description="stop at the first NaN or overflow on the device (IPU)"
    )
    optimizer_state_on_chip: bool = Field(
        True, description="keep the moments in the IPU's memory, not in Streaming Memory (IPU)"
    )
    replicated_tensor_sharding: bool = Field(
        False, description="divide the moments among the replicas (IPU)"
    )
    loader_mode: Literal["sync", "async", "async_rebatched"] = Field(
        "sync",
        description="where host batches of training are assembled: in the main process, ahead of"
        " time in another one, or there from smaller pieces (IPU)",
    )
    prefetch_depth: int = Field(
        1, ge=1, description="host batches streamed to the device ahead of use (IPU)"
    )
    executable_cache: Optional[PathText] = Field(
        "${POPTORCH_CACHE_DIR:-exe_cache}",
        validate_default=True,
        description="folder of compiled graphs, one subfolder per configuration; null: none (IPU)",
    )
    ipu_version: Literal["mk2", "c600"] = Field(
        "mk2", description="IPU that --compile-only compiles for; Bow counts as mk2 (IPU)"
    )
    profile_dir: Optional[PathText] = Field(
        None, description="folder for PopVision's reports (IPU)"
    )
    log_cycles: bool = Field(
        False, description="count the device's clock cycles: perf/ipu_cycles (IPU)"
    )
    synthetic_data: bool = Field(
        False,
        description="generate the input on the device, to time it without the host; losses and"
        " scores are then meaningless (IPU)",
    )
    popart_options: Annotated[
        Dict[str, Any],
        AfterValidator(typed_options),
        Words("PopART session options, name: value"),
    ] = Field(default={}, description="set last, after the options of the keys above (IPU)")


class PlannerSection(Section):
    """The prediction of memory and speed before a run starts (python -m cxr_vit plan)."""

    hardware: Literal["auto", "mk2", "bow"] = Field(
        "auto",
        description="device to plan for: an IPU of the second generation or a Bow; auto: mk2 for"
        " engine.name=auto and poptorch, this machine's own device for torch and pipeline",
    )
    device_memory_gib: Optional[float] = Field(
        None,
        gt=0,
        description="memory of each GPU, or of each process on CPUs, GiB; null: read from this"
        " machine (torch and pipeline engines)",
    )
    strict: bool = Field(
        False,
        description="stop if the model is predicted not to fit into the IPUs' memory, instead of"
        " warning",
    )


class Config(Section):
    """A complete configuration."""

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
        """Return a copy with some keys of some sections replaced, without validation."""
        new = {name: getattr(self, name).model_copy(update=keys) for name, keys in sections.items()}
        return self.model_copy(update=new)

    def flat(self) -> Dict[str, Any]:
        """Return `section.key` -> value for TensorBoard's hparams; lists become text."""
        return {
            f"{section}.{key}": value if isinstance(value, (bool, int, float)) else str(value)
            for section, values in self.model_dump().items()
            for key, value in values.items()
        }


#: Name of a section -> its class.
SECTIONS: Dict[str, Type[Section]] = {
    name: cast(Type[Section], field.annotation) for name, field in Config.model_fields.items()
}
