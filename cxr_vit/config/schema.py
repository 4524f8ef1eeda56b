"""The sections of a configuration: their fields, types, ranges, defaults and help texts."""

from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type, Union, cast, get_args

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
    Words,
)
from cxr_vit.config.data_sections import AugmentSection, DataSection
from cxr_vit.config.fields import (
    ChannelDeviations,
    ChannelMeans,
    Count,
    Execution,
    FloatType,
    Fraction,
    Gamma,
    InnerFraction,
    LayerCounts,
    PathText,
    Probability,
    Proportion,
    Proportions,
    RecomputeWord,
    Section,
    Seed,
    option,
)
from cxr_vit.config.poptorch_options import SCOPES, typed_options, with_popart_options


class RunSection(Section):
    """Run folder and seed."""

    name: str = option("run", "name of the run", pattern=r"^\w[\w.-]*$")
    root: PathText = option("runs", "parent folder of the run folders")
    dir: Optional[PathText] = option(None, "run folder, instead of <root>/<name>-<time>")
    seed: Seed = option(0, "seed of weights, sample order, augmentation and dropout")


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
    drop_path: Fraction = option(
        0.0,
        "stochastic depth: probability that an image skips a branch of the last layer; it rises"
        " linearly from 0 in the first",
    )
    pooling: Optional[Literal["class", "mean", "both"]] = option(
        None,
        "input of the head: the normalised class token, the mean of the patches, normalised, or the"
        " class token beside the mean of the patches, after the norm; null: as the weights have it"
        " (both: DINOv2)",
    )
    head_std: Optional[PositiveFloat] = option(
        None, "standard deviation of a new head's weights; null: as in the config.json, or 0.02"
    )
    freeze: Annotated[
        Union[Literal["none", "trunk"], Count],
        Words("none, trunk or an integer >= 1"),
    ] = option(
        "none",
        "what is not trained: nothing, all but the head (classifier, and fc_norm with"
        " pooling=mean), or the embeddings and the first N layers; dropout and drop_path act there"
        " too",
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
        Optional[
            Union[Literal["none"], RecomputeWord, List[Union[RecomputeWord, List[NonNegativeInt]]]]
        ],
        Words(
            "none (for all stages), stage_inputs, every_layer, attention_mlp, or a list with an"
            " item for each stage: stage_inputs, every_layer, attention_mlp or a list of its"
            " layers, integers >= 0"
        ),
    ] = option(
        None,
        "what is kept for the backward pass, which recomputes the rest from there: the inputs of a"
        " stage (always), the outputs of its layers or of some, also those of attention, or"
        " everything (none: nothing is recomputed); null: every_layer in a pipeline of IPUs, none"
        " elsewhere",
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

    exclusive: ClassVar[Tuple[Tuple[str, ...], ...]] = (
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

    @property
    def images_per_update(self) -> int:
        """Size of the global batch."""
        if self.global_batch_size is not None:
            return self.global_batch_size
        assert self.gradient_accumulation is not None
        return self.micro_batch_size * self.gradient_accumulation * self.replicas


class LossSection(Section):
    """The loss: a mean over images and labels; unknown labels count as 0."""

    name: Literal["bce", "weighted_bce", "focal", "asymmetric"] = option(
        "bce",
        "binary cross-entropy; the same with positives weighted by their rarity; focal loss; or"
        " asymmetric loss (ASL)",
    )
    max_positive_weight: float = option(
        20.0,
        "largest weight of a label's positives, which is (negatives + 0.5) / (positives + 0.5) of"
        " its known labels in the training images (weighted_bce)",
        ge=1,
        le=1e6,
    )
    gamma: Gamma = option(2.0, "exponent of the focus on what is predicted badly (focal)")
    negative_gamma: Gamma = option(4.0, "the same for negatives (asymmetric)")
    positive_gamma: Gamma = option(1.0, "the same for positives (asymmetric)")
    clip: Fraction = option(0.05, "probability below which a negative has no loss (asymmetric)")


class OptimSection(Section):
    """The optimizer."""

    exclusive: ClassVar[Tuple[Tuple[str, ...], ...]] = (("lr", "base_lr"),)
    name: Literal["adamw", "lamb", "sgd"] = option("adamw", "the optimizer (lamb: IPU only)")
    lr: Optional[PositiveFloat] = option(2e-4, "peak learning rate")
    base_lr: Optional[PositiveFloat] = option(
        None, "peak learning rate for 256 images per update: lr = base_lr x global batch / 256"
    )
    layer_decay: Proportion = option(
        1.0,
        "factor on the rate from each layer to the one before it, beginning at the head, which has"
        " the whole rate; 1: the same rate for all",
    )
    head_lr_scale: PositiveFloat = option(
        1.0, "factor on the rate of the head; with pooling=mean also of its norm, fc_norm"
    )
    weight_decay: NonNegativeFloat = option(0.0, "decoupled weight decay")
    decay_all: bool = option(
        False, "decay all parameters, with biases, norms, class token, position embeddings"
    )
    beta1: Fraction = option(0.9, "decay of the first moment (adamw, lamb)")
    beta2: Fraction = option(0.999, "decay of the second moment (adamw, lamb)")
    momentum: Fraction = option(0.9, "momentum (sgd)")
    nesterov: bool = option(
        False, "Nesterov's form of the momentum (sgd; on IPUs with use_combined_accum)"
    )
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

    exclusive: ClassVar[Tuple[Tuple[str, ...], ...]] = (
        ("warmup_ratio", "warmup_steps", "warmup_epochs"),
    )
    name: Literal["cosine", "linear", "constant"] = option(
        "cosine", "decay after the warm-up, to min_lr at the end of the training (constant: none)"
    )
    min_lr: NonNegativeFloat = option(
        0.0,
        "rate at the end of the training; groups with another rate end with the same fraction of"
        " theirs (cosine, linear)",
    )
    warmup_ratio: Optional[Probability] = option(
        0.0, "fraction of all steps in which the rate rises from 0"
    )
    warmup_steps: Optional[NonNegativeInt] = option(None, "the same as a number of steps")
    warmup_epochs: Optional[NonNegativeFloat] = option(None, "the same as a number of epochs")


class TrainSection(Section):
    """Length of the training, and intervals of logging, validation and checkpoints."""

    exclusive: ClassVar[Tuple[Tuple[str, ...], ...]] = (
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
    monitor: str = option(
        "auroc_macro",
        "score of the validations that decides which checkpoint is best, and early stopping: a"
        " logged one without val/, such as average_precision_macro, auroc/Hernia or loss, of which"
        " less is better",
        min_length=1,
    )
    early_stopping_patience: Optional[Count] = option(
        None, "validations without a better train.monitor before training stops"
    )


class EvaluationSection(Section):
    """How images are scored, and how sure the scores are."""

    views: Literal["center", "flip", "ten_crop"] = option(
        "center",
        "views of each image whose probabilities are averaged: one; it and its mirror image (twice"
        " the time); or the center, the corners and their mirror images (ten times; needs"
        " data.resize); validation in training has one",
    )
    resamples: int = option(
        1000,
        "resamples of the bootstrap over patients that gives the scores of a report their 95 %"
        " intervals; 0: no intervals",
        ge=0,
        le=100_000,
    )
    val_resamples: int = option(
        200,
        "the same for the macro AUROC of each validation in training; 0: no interval",
        ge=0,
        le=100_000,
    )


Saliency = Literal["relevance", "grad_cam", "none"]
#: How maps can be computed, the keys of `cxr_vit.saliency.maps.METHODS`; the first is the default.
MAP_METHODS: Tuple[str, ...] = get_args(Saliency)[:-1]


class ReportSection(Section):
    """What the report of evaluate.py shows."""

    images: bool = option(
        True,
        "whether report.html shows images and their names: those that the model is most right and"
        " most wrong about. With real data these are patients",
    )
    saliency: Saliency = option(
        "relevance",
        "what is drawn over these images a second time: the attention relevance or the Grad-CAM of"
        " the finding, computed by torch in fp32 whatever engine scores; none: nothing",
    )


class ProbeSection(Section):
    """The linear probe on the features of the frozen model (python -m cxr_vit probe)."""

    weight_decays: Annotated[List[NonNegativeFloat], Field(min_length=1, max_length=100)] = option(
        [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0],
        "weight decays to try (L2 on standardised features); scikit-learn's C is 1 / (training"
        " images x weight decay)",
    )
    steps: Count = option(
        500, "largest number of steps of the descent, each over all training images"
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
    compile: Literal["off", "layers", "whole"] = option(
        "off",
        "torch.compile for torch and pipeline engines: none, one graph for all encoder layers of a"
        " shape, or one for each stage",
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
    loss: LossSection = Field(default_factory=LossSection)
    optim: OptimSection = Field(default_factory=OptimSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    evaluation: EvaluationSection = Field(default_factory=EvaluationSection)
    report: ReportSection = Field(default_factory=ReportSection)
    probe: ProbeSection = Field(default_factory=ProbeSection)
    engine: EngineSection = Field(default_factory=EngineSection)
    planner: PlannerSection = Field(default_factory=PlannerSection)
    callbacks: Annotated[List[Extension], Words(_EXTENSION_WORDS)] = option(
        [], "callbacks of your own, after the built-in ones: subclasses of cxr_vit.Callback"
    )
    loggers: Annotated[List[Union[LoggerName, Extension]], Words(_LOGGER_WORDS)] = option(
        ["tensorboard", "jsonl"], "loggers: built-in ones, or subclasses of cxr_vit.Logger"
    )

    @property
    def peak_lr(self) -> float:
        """Peak learning rate: `optim.lr`, or what `optim.base_lr` is for the global batch.

        ``lr = base_lr * global batch / 256`` (Goyal et al. 2017; He et al. 2022).
        """
        if self.optim.lr is not None:
            return self.optim.lr
        assert self.optim.base_lr is not None
        return self.optim.base_lr * self.batch.images_per_update / 256

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
