"""The sections of a configuration: their fields, types, ranges, defaults and help texts."""

import os
import re
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type, Union, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    model_validator,
)
from typing_extensions import Annotated, Literal

from cxr_vit.config.columns import (
    COLUMNS_WORDS,
    LABEL_MAP_WORDS,
    LABELS_WORDS,
    Columns,
    LabelMap,
    Labels,
    Meaning,
    SplitName,
    Words,
)
from cxr_vit.config.poptorch_options import SCOPES, typed_options, with_popart_options

#: Legal values of `data.image_size`, pixels.
SMALLEST_IMAGE, LARGEST_IMAGE = 8, 2048

#: Characters of a path, Linux's limit.
_LONGEST_PATH = 4096
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def option(default: Any, text: str, **limits: Any) -> Any:
    """Make a field; `text` is its description in ``train.py --help``."""
    return Field(default, description=text, **limits)


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

    path = os.path.expanduser(_VARIABLE.sub(value, text)) if len(text) <= _LONGEST_PATH else text
    if len(path) > _LONGEST_PATH:
        raise ValueError(f"longer than a path can be, {_LONGEST_PATH} characters")
    if re.search("[\0\ud800-\udfff]", path):
        raise ValueError("a path must be UTF-8 text; rename the file or its folder")
    return path


PathText = Annotated[str, Field(min_length=1), AfterValidator(_expand)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Change = Annotated[float, Field(ge=0, le=0.5)]
Probability = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]
FloatType = Literal["fp32", "fp16"]
OnProblem = Literal["error", "skip"]
Execution = Literal["pipelined", "sharded"]
TableFiles = Union[PathText, Dict[SplitName, PathText]]
LayerCounts = Annotated[List[Annotated[int, Field(ge=-1)]], Field(min_length=1)]
RecomputeWord = Literal["stage_inputs", "every_layer", "attention_mlp"]
ChannelMeans = Annotated[List[InnerFraction], Field(min_length=1)]
ChannelDeviations = Annotated[List[Proportion], Field(min_length=1)]
Proportions = Optional[Union[Proportion, List[Proportion]]]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are immutable and finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    #: Pairs of keys of which exactly one counts: giving the second replaces the first's default.
    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = ()

    #: Key -> owner: a later layer that gives the owner resets the key.
    belongs_to: ClassVar[Dict[str, str]] = {}
    #: Keys with a mapping of which a later file or an override may give single keys.
    merged: ClassVar[Dict[str, Type[BaseModel]]] = {}

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

    name: str = option("run", "name of the run", pattern=r"^\w[\w.-]*$")
    root: PathText = option("runs", "parent folder of the run folders")
    dir: Optional[PathText] = option(None, "run folder, instead of <root>/<name>-<time>")
    seed: Seed = option(0, "seed of weights, sample order, augmentation and dropout")


class DataSection(Section):
    """Images and labels: files, columns, split, size and cache."""

    merged: ClassVar[Dict[str, Type[BaseModel]]] = {"columns": Columns}
    belongs_to: ClassVar[Dict[str, str]] = {
        **dict.fromkeys(["csv", "join", "images", "boxes", "relabels", "cache_dir"], "root"),
        **dict.fromkeys(["train_list", "val_list", "test_list", "sample_images"], "root"),
        **dict.fromkeys(["columns", "labels", "label_map", "label_separator"], "format"),
        **dict.fromkeys(["uncertain", "blank", "repeated_images", "split"], "format"),
    }

    root: PathText = option(
        "${DATASET_DIR:-.}/chest-xray-nihcc",
        "folder with the CSV, the list files and the images",
        validate_default=True,
    )
    format: Literal["nih", "table"] = option(
        "nih", "NIH's CSV, or any table whose columns data.columns names"
    )
    csv: Annotated[Optional[TableFiles], Words("a path, or train, val, test: a path each")] = (
        option(
            None,
            "file of the labels, relative to the current folder or to the root; null: NIH's in the"
            " root. A table is CSV, TSV or Parquet (also .gz), one file or one per split",
        )
    )
    join: List[PathText] = option(
        [],
        "tables that add columns to those of data.csv, joined on the columns they share (table)",
    )
    columns: Annotated[Optional[Columns], Words(COLUMNS_WORDS)] = option(
        None, "where the table has what is read of it (table)"
    )
    labels: Annotated[Optional[Labels], Words(LABELS_WORDS)] = option(
        None,
        "the labels to learn, in the order of the logits; null: NIH's findings; a table needs them",
    )
    label_separator: Annotated[str, Field(min_length=1, max_length=10)] = option(
        "|", "text between two labels in the column of all labels (table)"
    )
    uncertain: Meaning = option(
        "unknown",
        "what -1 means as a label; an unknown label counts neither in the loss nor in a score"
        " (table)",
    )
    blank: Meaning = option("unknown", "what an empty field means as a label (table)")
    repeated_images: Literal["error", "any", "majority"] = option(
        "error",
        "several rows of an image, as by several readers: refuse them, or a label is positive if"
        " any of its known values is, or if more than half are; half of them is uncertain (table)",
    )
    label_map: Annotated[LabelMap, Words(LABEL_MAP_WORDS)] = option(
        {},
        "for evaluate.py --data: labels of this data set and the labels of the model that they are"
        " compared with, the most probable one of several; the others are compared by name",
    )
    images: Optional[PathText] = option(
        None, "folder of the images (may be nested), if not the root"
    )
    boxes: Optional[PathText] = option(
        None, "BBox_List_2017.csv, if not in the root; none: boxes are not read"
    )
    relabels: Optional[PathText] = option(
        None, "Google's 2019 labels by radiologists, if not in the root; none: they are not read"
    )
    split: Literal["auto", "table", "official", "patient", "random", "all"] = option(
        "auto",
        "the table's split column or its files by split, list files, random by patient, or random"
        " by image (leaks patients); all: every image is a test image, for evaluation; auto:"
        " official if lists are given, else table if it has splits, else official if the list files"
        " exist, else patient",
    )
    train_list: Optional[PathText] = option(
        None,
        "the official split's training list (with or without the validation images),"
        " if it is not in the root under one of its names",
    )
    val_list: Optional[PathText] = option(
        None,
        "names of the validation images; null: val_list.txt (or val_list_NIH.txt,"
        " community_val_list.txt) of the root, else drawn from the training list by patient",
    )
    test_list: Optional[PathText] = option(None, "the official split's test list")
    split_seed: Seed = option(1337, "seed of all random splits")
    val_fraction: InnerFraction = option(
        0.05, "fraction of the images for validation (official: of its training list)"
    )
    test_fraction: Fraction = option(0.2, "fraction of the images for testing (patient, random)")
    train_fraction: Proportion = option(
        1.0,
        "fraction of the training images to use, drawn by patient with split_seed; a smaller"
        " fraction is part of a larger one",
    )
    image_size: int = option(
        224, "side of the model's input, pixels", ge=SMALLEST_IMAGE, le=LARGEST_IMAGE
    )
    include_no_finding: bool = option(
        False, "make 'No Finding' a 15th label, as Graphcore's tutorial does"
    )
    on_missing: OnProblem = option("error", "what to do with CSV rows whose image is missing")
    on_bad_image: OnProblem = option(
        "error",
        "damaged or unexpected images: list them and stop, or skip them and write skipped.csv",
    )
    resample: Literal["bilinear", "bicubic", "lanczos"] = option(
        "bilinear", "filter that resizes images, antialiased; part of the cache's settings"
    )
    max_megapixels: Annotated[int, Field(ge=1, le=178)] = option(
        64, "refuse larger images without reading them (a few kB can decode to gigabytes)"
    )
    cache: Literal["auto", "require", "off"] = option(
        "auto",
        "one file of the decoded and resized images: build it on first use, require a"
        " finished one, or decode in every epoch (and each image once at every start, to check it)",
    )
    cache_dir: Optional[PathText] = option(None, "cache folder; null: <data.root>/cxr_vit_cache")
    cache_workers: Optional[Annotated[int, Field(ge=1, le=256)]] = option(
        None, "processes that build the cache; null: one per core"
    )
    num_workers: int = option(0, "loader processes; 0: load in the main process", ge=0, le=128)
    worker_timeout_s: Optional[Annotated[float, Field(gt=0, le=1e6)]] = option(
        300,  # less than engine.timeout_s, after which the other processes would end first
        "seconds to wait for a batch of the loader processes before the run ends; null: without"
        " limit. With num_workers=0 a file system that hangs is not noticed",
    )
    sample_images: Optional[Annotated[int, Field(ge=20)]] = option(
        None,
        "number of images of a synthetic data set to write if the root does not exist;"
        " applies only to the root it is given with",
    )

    @property
    def has_unknown(self) -> bool:
        """Whether labels may be unknown, which the loss then leaves out."""
        return self.format == "table" and "unknown" in (self.uncertain, self.blank)


class AugmentSection(Section):
    """Augmentation of training images: each range is sampled uniformly, and 0 is off."""

    rotation: float = option(0.0, "maximum rotation in either direction, degrees", ge=0, le=45)
    shift: Change = option(0.0, "maximum shift along each axis, either way: fraction of the side")
    scale: Change = option(0.0, "maximum change of size, larger or smaller, e.g. 0.1")
    crop: float = option(
        1.0,
        "random resized crop: smallest fraction of the area that is kept (1: off); less than half"
        " would cut the lungs",
        ge=0.5,
        le=1,
    )
    crop_ratio: float = option(1.1, "maximum aspect ratio of a crop, wide or high", ge=1, le=1.5)
    brightness: Change = option(0.0, "maximum change of the factor on gray levels")
    contrast: Change = option(
        0.0, "maximum change of the factor on the distance from the image's mean"
    )
    gamma: Change = option(0.0, "maximum change of the exponent of gray levels")
    horizontal_flip: Probability = option(
        0.0, "probability of mirroring, which puts the heart on the other side"
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

    name: PathText = option(
        "google/vit-base-patch16-224-in21k",
        "hub name, local folder, or for random weights vit-micro, vit-tiny, vit-small, vit-base,"
        " vit-large, vit-huge",
    )
    revision: Optional[Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")]] = option(
        None, "branch, tag or commit of a hub name; null: main"
    )
    patch_size: int = option(16, "side of a patch, pixels (random weights only)", ge=2, le=128)
    dropout: Fraction = option(0.0, "dropout of hidden states and of attention")
    hidden_dropout: Optional[Fraction] = option(
        None, "dropout after embeddings, attention and MLP; null: dropout"
    )
    attention_dropout: Optional[Fraction] = option(
        None, "dropout of the attention's probabilities; null: dropout"
    )
    layer_norm_eps: Optional[PositiveFloat] = option(
        None, "added to the variance in layer norms; null: as in the weights' config.json, or 1e-12"
    )
    hidden_act: Optional[Literal["gelu", "gelu_pytorch_tanh"]] = option(
        None,
        "activation of the MLP: exact GELU or its tanh form, the only one of an IPU; null: as in"
        " the config.json of the weights",
    )
    head_bias: Literal["prior", "zero"] = option(
        "prior",
        "bias of a new head: log-odds of the training prevalence, or zero (Hugging Face's default)",
    )
    image_mean: Optional[Union[InnerFraction, ChannelMeans]] = option(
        None,
        "mean to subtract from gray levels of 0 to 1, for all channels or for each; null: as in the"
        " preprocessor_config.json of the weights, or 0.5",
    )
    image_std: Optional[Union[Proportion, ChannelDeviations]] = option(
        None, "standard deviation to divide gray levels by; null: as for image_mean"
    )


class PipelineSection(Section):
    """The cut of the model into stages, and how stages run."""

    layers_per_stage: LayerCounts = option(
        [3, 3, 3, 3],
        "encoder layers of each stage (-1: those that are left, divided among all -1); embedding"
        " on the first, head on the last",
    )
    eval_layers_per_stage: Optional[LayerCounts] = option(
        None, "layers per stage in evaluation; null: as in training (IPU)"
    )
    execution: Execution = option(
        "pipelined",
        "training: stages work on different micro-batches at once, or one after another (IPU)",
    )
    eval_execution: Execution = option("pipelined", "the same in evaluation (IPU)")
    schedule: Literal["gpipe", "1f1b", "interleaved_1f1b"] = option(
        "1f1b",
        "order of the stages' work in training: all forward passes before all backward passes,"
        " alternating forward and backward passes (holds fewer activations), or alternating with"
        " several stages per process (pipeline engine)",
    )
    recompute: Annotated[
        Union[Literal["none"], RecomputeWord, List[Union[RecomputeWord, List[NonNegativeInt]]]],
        Words(
            "none, stage_inputs, every_layer, attention_mlp, or a list with one item per stage: one"
            " of the last three, or a list of layers, integers >= 0"
        ),
    ] = option(
        "every_layer",
        "pipelined: what is kept for the backward pass, which recomputes the rest from there: the"
        " inputs of a stage (always), the outputs of its layers or of some, also those of"
        " attention, or everything (none: nothing is recomputed) (IPU)",
    )
    available_memory_proportion: Proportions = option(
        None,
        "fraction of an IPU's memory that a matrix product may use as working memory, or one"
        " number per stage; null: PopLibs' default (IPU)",
    )
    eval_available_memory_proportion: Proportions = option(
        None, "the same in evaluation; null: as in training (IPU)"
    )


class BatchSection(Section):
    """Samples per forward pass, per weight update and per host call."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (
        ("gradient_accumulation", "global_batch_size"),
    )
    micro_batch_size: Count = option(1, "samples in one forward pass of one replica")
    gradient_accumulation: Optional[Count] = option(1, "micro-batches per update, per replica")
    global_batch_size: Optional[Count] = option(
        None, "samples per weight update, instead of gradient_accumulation"
    )
    replicas: Count = option(1, "data-parallel copies of the whole pipeline")
    device_iterations: Count = option(1, "weight updates per host call in training")
    eval_micro_batch_size: Count = option(1, "samples in one forward pass of evaluation")
    eval_device_iterations: Count = option(1, "micro-batches per host call in evaluation")
    eval_replicas: Optional[Count] = option(
        None, "replicas in evaluation; null: as in training (IPU)"
    )


class OptimSection(Section):
    """The optimizer."""

    name: Literal["adamw", "lamb", "sgd"] = option("adamw", "the optimizer (lamb: IPU only)")
    lr: PositiveFloat = option(2e-4, "peak learning rate")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled weight decay")
    decay_all: bool = option(
        False, "decay all parameters, with biases, norms, class token, position embeddings"
    )
    beta1: Fraction = option(0.9, "decay of the first moment (adamw, lamb)")
    beta2: Fraction = option(0.999, "decay of the second moment (adamw, lamb)")
    momentum: Fraction = option(0.9, "momentum (sgd)")
    eps: PositiveFloat = option(1e-8, "added to the root of the second moment")
    max_grad_norm: Optional[PositiveFloat] = option(
        None, "maximum global gradient norm; null: no clipping"
    )
    loss_scaling: Union[Literal["auto"], PositiveFloat] = option(
        1.0,
        "factor on the loss that keeps fp16 gradients from underflow, removed before the update;"
        " auto: adjusted by PopART (IPU; the torch engine has its own scaler)",
    )
    bias_correction: bool = option(True, "correct the moments' bias towards 0 (lamb)")
    max_weight_norm: Optional[PositiveFloat] = option(
        None, "largest norm of a weight that scales its update; null: 65,500 (lamb)"
    )
    use_combined_accum: bool = option(
        False, "one tensor for accumulated gradients and velocity, to save memory (sgd, IPU)"
    )
    accumulator: FloatType = option("fp32", "dtype of the accumulated gradients (IPU)")
    first_moment: FloatType = option("fp32", "dtype of the first moment or sgd's velocity (IPU)")
    second_moment: FloatType = option("fp32", "dtype of the second moment (IPU)")


class ScheduleSection(Section):
    """The learning rate over the steps."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (("warmup_ratio", "warmup_steps"),)
    name: Literal["cosine", "linear", "constant"] = option(
        "cosine", "decay after the warm-up, to 0 at the last step (constant: none)"
    )
    warmup_ratio: Optional[Probability] = option(
        0.0, "fraction of all steps in which the rate rises from 0"
    )
    warmup_steps: Optional[NonNegativeInt] = option(None, "the same as a number of steps")


class TrainSection(Section):
    """Length of the training, and intervals of logging, validation and checkpoints."""

    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = (
        ("epochs", "steps"),
        ("eval_every_epochs", "eval_every_steps"),
        ("checkpoint_every_epochs", "checkpoint_every_steps"),
    )
    epochs: Optional[PositiveFloat] = option(3, "length of the training, epochs")
    steps: Optional[Annotated[int, Field(ge=1, lt=10**8)]] = option(
        None, "length of the training, weight updates"
    )
    log_every_steps: Count = option(50, "steps between logged metrics")
    eval_every_epochs: Optional[PositiveFloat] = option(1, "epochs between validations")
    eval_every_steps: Optional[Count] = option(None, "steps between validations")
    checkpoint_every_epochs: Optional[PositiveFloat] = option(
        1, "epochs between checkpoints (best and last are saved as well)"
    )
    checkpoint_every_steps: Optional[Count] = option(None, "steps between checkpoints")
    keep_last: Count = option(2, "number of checkpoints kept beside the best")
    resume_weights_only: bool = option(
        False,
        "--resume loads the weights and the step and resets the optimizer: for a checkpoint whose"
        " optimizer state this engine cannot load",
    )
    max_minutes: Optional[PositiveFloat] = option(
        None,
        "minutes after which a start of the run is saved and ends with status 75, to be resumed;"
        " leave time to save before a limit of the scheduler",
    )
    on_nonfinite: Literal["stop", "skip_update"] = option(
        "stop",
        "a NaN or infinite loss or gradient: stop and describe it in a file of the run, or leave"
        " the weights as they are and go on (torch and pipeline engines)",
    )
    early_stopping_patience: Optional[Count] = option(
        None, "validations without a better macro AUROC before training stops"
    )


class EngineSection(Section):
    """The engine, its device and its arithmetic."""

    name: Literal["auto", "poptorch", "torch", "pipeline"] = option(
        "auto",
        "IPUs; one torch device (per process under torchrun); one or more stages per process under"
        " torchrun; auto: IPUs if any answer, else a GPU, else the CPU",
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "device of torch and pipeline engines")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = option(
        "auto",
        "arithmetic of the forward pass; auto: bf16 if the processor supports it, else fp32 (fp16"
        " on older GPUs and on IPUs)",
    )
    timeout_s: PositiveFloat = option(
        600, "under torchrun: seconds to wait for another process before the run ends"
    )
    weights: FloatType = option("fp32", "dtype of the weights and their update (IPU)")
    partials: FloatType = option("fp16", "dtype of partial sums; fp32 if precision is fp32 (IPU)")
    stochastic_rounding: bool = option(True, "stochastic rounding of fp16, in training only (IPU)")
    floating_point_exceptions: bool = option(False, "stop at the first NaN or overflow (IPU)")
    optimizer_state_on_chip: bool = option(
        True, "keep the moments in the IPU's memory, not in Streaming Memory (IPU)"
    )
    replicated_tensor_sharding: bool = option(False, "divide the moments among replicas (IPU)")
    loader_mode: Literal["sync", "async", "async_rebatched"] = option(
        "sync",
        "where host batches of training are assembled: in the main process, ahead of time in"
        " another one, or there from smaller pieces (IPU)",
    )
    loader_buffer_size: Count = option(
        3, "host batches that an asynchronous loader holds in shared memory (IPU)"
    )
    loader_early_preload: bool = option(
        False,
        "start an asynchronous loader's reading when it is made, not at the first batch (IPU)",
    )
    rebatched_worker_size: Optional[Count] = option(
        None,
        "samples that a worker reads at a time for async_rebatched; null: a host batch divided by"
        " data.num_workers (IPU)",
    )
    eval_output: FloatType = option("fp32", "dtype of the logits that evaluation returns (IPU)")
    prefetch_depth: Count = option(1, "host batches streamed to the device ahead of use (IPU)")
    executable_cache: Optional[PathText] = option(
        "${POPTORCH_CACHE_DIR:-exe_cache}",
        "folder of compiled graphs, one subfolder per configuration; null: none (IPU)",
        validate_default=True,
    )
    ipu_version: Literal["mk2", "c600"] = option(
        "mk2", "IPU that --compile-only compiles for; Bow counts as mk2 (IPU)"
    )
    profile_dir: Optional[PathText] = option(None, "folder for PopVision's reports (IPU)")
    log_cycles: bool = option(False, "count the device's clock cycles: perf/ipu_cycles (IPU)")
    synthetic_data: bool = option(
        False,
        "generate the input on the device, to time it without the host; losses and scores are then"
        " meaningless (IPU)",
    )
    poptorch_options: Annotated[
        Dict[str, Any],
        AfterValidator(typed_options),
        Words("a mapping of both, training, inference: options of PopTorch, name: arguments"),
    ] = option(
        {scope: {} for scope in SCOPES},
        "options of both graphs or of one, set last, after those of the keys above (IPU)",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_former_key(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "popart_options" not in data:
            return data
        data = dict(data)
        old = data.pop("popart_options")
        data["poptorch_options"] = with_popart_options(data.get("poptorch_options"), old)
        return data


class PlannerSection(Section):
    """The prediction of memory and speed before a run starts (python -m cxr_vit plan)."""

    hardware: Literal["auto", "mk2", "bow"] = option(
        "auto",
        "device to plan for: an IPU of the second generation or a Bow; auto: mk2 for"
        " engine.name=auto and poptorch, this machine's own device for torch and pipeline",
    )
    device_memory_gib: Optional[PositiveFloat] = option(
        None,
        "memory of each GPU, or of each process on CPUs, GiB; null: read from this machine (torch"
        " and pipeline engines)",
    )
    strict: bool = option(
        False, "stop, not warn, if the model is predicted not to fit into the IPUs' memory"
    )


class Extension(BaseModel):
    """A class of the user's own, by its import path."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    path: str = Field(alias="class", pattern=r"^\w+(\.\w+)+$")
    args: Dict[str, Any] = {}

    def __str__(self) -> str:
        return self.path


LoggerName = Literal["tensorboard", "jsonl", "csv", "wandb", "mlflow"]
_EXTENSION_WORDS = "a list of {class: package.Name, args: {name: value}}"
_LOGGER_WORDS = (
    "a list of tensorboard, jsonl, csv, wandb, mlflow or {class: package.Name, args: {name: value}}"
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
    callbacks: Annotated[List[Extension], Words(_EXTENSION_WORDS)] = option(
        [], "callbacks of your own, after the built-in ones: subclasses of cxr_vit.Callback"
    )
    loggers: Annotated[List[Union[LoggerName, Extension]], Words(_LOGGER_WORDS)] = option(
        ["tensorboard", "jsonl"], "loggers: built-in ones, or subclasses of cxr_vit.Logger"
    )

    def changed(self, **values: Any) -> "Config":
        """Return a copy with some keys of sections and some lists replaced, without validation.

        Each argument is a section with its new keys, ``optim={"lr": 0.1}``, or a list.
        """
        new = {
            name: value if name in LISTS else getattr(self, name).model_copy(update=value)
            for name, value in values.items()
        }
        return self.model_copy(update=new)

    def flat(self) -> Dict[str, Any]:
        """Return `section.key` -> value, for loggers; lists become text."""
        values = self.model_dump(by_alias=True)
        flat = {name: str(values[name]) for name in LISTS}
        for section in SECTIONS:
            for key, value in values[section].items():
                is_number = isinstance(value, (bool, int, float))
                flat[f"{section}.{key}"] = value if is_number else str(value)
        return flat


#: Fields of a configuration that are lists.
LISTS = ("callbacks", "loggers")
#: Name of a section -> its class.
SECTIONS: Dict[str, Type[Section]] = {
    name: cast(Type[Section], field.annotation)
    for name, field in Config.model_fields.items()
    if name not in LISTS
}
