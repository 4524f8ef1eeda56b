"""Section: the base of a configuration's sections, and the types their fields share.

Imports no torch.
"""

import os
import re
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Annotated, Literal

from cxr_vit.config.popart_options import typed_options

__all__ = [
    "SECTIONS",
    "AugmentSection",
    "Config",
    "EngineSection",
    "PathText",
    "PipelineSection",
    "Section",
    "Words",
]


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Words:
    """Says what a field takes where its type does not: `Annotated[type, Words("...")]`."""

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


class Section(BaseModel):
    """Base of all sections: closed, immutable, finite numbers only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    #: Pairs of keys of which exactly one counts: giving the second replaces the first's default.
    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = ()

    #: Keys that mean something only beside another: a later layer that gives the other resets them.
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


class AugmentSection(Section):
    """How training images are varied: each range is drawn from evenly, and 0 is off."""

    rotation: float = Field(0.0, ge=0, le=45, description="up to so many degrees either way")
    shift: float = Field(
        0.0, ge=0, le=0.5, description="up to this part of the side, either way, along each axis"
    )
    scale: float = Field(
        0.0, ge=0, le=0.5, description="larger or smaller by up to this part, e.g. 0.1"
    )
    crop: float = Field(
        1.0,
        ge=0.5,
        le=1,
        description="random resized crop: the least part of the image's area that stays (1: off);"
        " less than half would cut the lungs",
    )
    crop_ratio: float = Field(
        1.1, ge=1, le=1.5, description="a crop is at most so many times wider than high, or higher"
    )
    brightness: float = Field(
        0.0, ge=0, le=0.5, description="gray levels times 1 plus or minus up to this"
    )
    contrast: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="distance from the image's mean times 1 plus or minus up to this",
    )
    gamma: float = Field(
        0.0, ge=0, le=0.5, description="gray levels to the power of 1 plus or minus up to this"
    )
    horizontal_flip: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a mirrored image; it puts the heart on the other side",
    )

    @property
    def moves(self) -> bool:
        """Whether images are rotated, shifted, scaled, cropped or flipped."""
        return self.shows_beyond or self.crop < 1 or self.horizontal_flip > 0

    @property
    def shows_beyond(self) -> bool:
        """Whether what lies beyond an image's border may come into view."""
        return self.rotation > 0 or self.shift > 0 or self.scale > 0

    @property
    def recolours(self) -> bool:
        """Whether gray levels change."""
        return self.brightness > 0 or self.contrast > 0 or self.gamma > 0

    @property
    def is_on(self) -> bool:
        """Whether anything is varied."""
        return self.moves or self.recolours


LayerCounts = List[Annotated[int, Field(ge=0)]]

Proportion = Annotated[float, Field(gt=0, le=1)]

#: What is kept of a stage's forward pass for its backward pass.
RecomputeWord = Literal["every_layer", "stage_inputs"]

RecomputeChoice = Union[RecomputeWord, List[Annotated[int, Field(ge=0)]]]

RecomputeText = Words(
    "every_layer, stage_inputs, or a list with an item a stage: one of these words, or a list of"
    " layers, integers >= 0"
)


class PipelineSection(Section):
    """How the layers are cut into stages."""

    layers_per_stage: LayerCounts = Field(
        [3, 3, 3, 3],
        min_length=1,
        description="encoder layers of each stage; embedding on the first, head on the last",
    )
    eval_layers_per_stage: Optional[LayerCounts] = Field(
        None, min_length=1, description="the cut in evaluation; null: as in training (IPU)"
    )
    execution: Literal["pipelined", "sharded"] = Field(
        "pipelined",
        description="training: stages at work on different micro-batches, or one after another"
        " (IPU)",
    )
    eval_execution: Literal["pipelined", "sharded"] = Field(
        "pipelined", description="the same in evaluation (IPU)"
    )
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = Field(
        "1f1b",
        description="the order of the stages' work in training: all forward passes before all"
        " backward passes, one forward and one backward in turn (which holds fewer activations),"
        " or that with several stages in each process (pipeline engine)",
    )
    recompute: Annotated[Union[RecomputeWord, List[RecomputeChoice]], RecomputeText] = Field(
        "every_layer",
        description="pipelined: layers whose output is kept for the backward pass, the rest is"
        " computed again from there; a stage's inputs are always kept (IPU)",
    )
    available_memory_proportion: Optional[Union[Proportion, List[Proportion]]] = Field(
        None,
        description="part of an IPU's memory that one matrix product may take for its working"
        " data, or one number a stage; null: PopLibs' own (IPU)",
    )


class EngineSection(Section):
    """What computes, and in which arithmetic."""

    name: Literal["auto", "poptorch", "torch", "pipeline"] = Field(
        "auto",
        description="the back end: IPUs; one torch device (a process under torchrun); a stage a"
        " process under torchrun; auto: IPUs where they answer, else a GPU, else the CPU",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="the device of the torch and pipeline engines"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="arithmetic of the forward pass; auto: bf16 where the processor has it,"
        " else fp32 (fp16 on older GPUs and on IPUs)",
    )
    timeout_s: float = Field(
        600,
        gt=0,
        description="under torchrun: a process that waits longer for another ends the run, seconds",
    )
    weights: Literal["fp32", "fp16"] = Field(
        "fp32", description="dtype the weights are held and updated in (IPU)"
    )
    partials: Literal["fp32", "fp16"] = Field(
        "fp16", description="dtype of partial sums; fp32 arithmetic always has fp32 ones (IPU)"
    )
    stochastic_rounding: bool = Field(
        True, description="round fp16 up or down by chance in training, never in evaluation (IPU)"
    )
    floating_point_exceptions: bool = Field(
        False, description="stop at the first NaN or overflow on the device (IPU)"
    )
    optimizer_state_on_chip: bool = Field(
        True, description="hold the moments in the IPU's own memory, not in Streaming Memory (IPU)"
    )
    replicated_tensor_sharding: bool = Field(
        False, description="each replica holds its share of the moments only (IPU)"
    )
    loader_mode: Literal["sync", "async", "async_rebatched"] = Field(
        "sync",
        description="where host batches of training are put together: in the main process, ahead"
        " of time in another one, or there from smaller pieces (IPU)",
    )
    prefetch_depth: int = Field(
        1, ge=1, description="host batches streamed to the device ahead of need (IPU)"
    )
    executable_cache: Optional[PathText] = Field(
        "${POPTORCH_CACHE_DIR:-exe_cache}",
        validate_default=True,
        description="folder of compiled graphs, a subfolder a configuration; null: none (IPU)",
    )
    ipu_version: Literal["mk2", "c600"] = Field(
        "mk2", description="the IPU that --compile-only compiles for; Bow counts as mk2 (IPU)"
    )
    profile_dir: Optional[PathText] = Field(
        None, description="write PopVision's reports there (IPU)"
    )
    log_cycles: bool = Field(
        False, description="count the device's clock cycles: perf/ipu_cycles (IPU)"
    )
    synthetic_data: bool = Field(
        False,
        description="the device makes up its own input, to time it without the host: losses and"
        " scores then mean nothing (IPU)",
    )
    popart_options: Annotated[
        Dict[str, Any],
        AfterValidator(typed_options),
        Words("PopART session options, name: value"),
    ] = Field(default={}, description="set last, over what the keys above set (IPU)")


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
    """Where the images and labels are, how they are split and at what size they are read."""

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
        description="the official split's training list (with or without the validation images),"
        " where it is not in the root under one of its names",
    )
    val_list: Optional[PathText] = Field(
        None,
        description="names of the validation images; null: val_list.txt (or val_list_NIH.txt,"
        " community_val_list.txt) of the root, else drawn out of the training list by patient",
    )
    test_list: Optional[PathText] = Field(None, description="the official split's test list")
    split_seed: int = Field(1337, ge=0, lt=2**63, description="seed of everything the split draws")
    val_fraction: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="part of the images for validation (official: of its training list)",
    )
    test_fraction: float = Field(
        0.2, ge=0, lt=1, description="part of the images for testing (patient and random splits)"
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
        description="what to do about images that are damaged or not what they should be: list them"
        " and stop, or leave them out and write skipped.csv",
    )
    max_megapixels: int = Field(
        64,
        ge=1,
        le=178,
        description="images of more pixels are refused unread (a file of a few kB can hold them)",
    )
    cache: Literal["auto", "require", "off"] = Field(
        "auto",
        description="keep the images, decoded and resized, in one file: build it on first use,"
        " insist on a finished one, or decode in every epoch (and all once at each start, to see"
        " that they can be)",
    )
    cache_dir: Optional[PathText] = Field(
        None, description="folder of the cache; null: <data.root>/cxr_vit_cache"
    )
    cache_workers: Optional[int] = Field(
        None, ge=1, le=256, description="processes that decode images for it; null: one a core"
    )
    num_workers: int = Field(
        0, ge=0, le=128, description="loader processes; 0 reads in the main one"
    )
    sample_images: Optional[int] = Field(
        None,
        ge=20,
        description="if the root does not exist, write a synthetic data set of so many images there;"
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
