"""What the keys of Graphcore's configuration files mean here.

Two kinds of files: an `IPUConfig` of optimum-graphcore (ipu_config.json), and an entry of the
configs.yml of Graphcore's ViT example. Each has a table of rules: their key -> what its value must
be, our keys and values, why, and the value that they assume where the file gives none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional

from cxr_vit.config.architectures import SIZES
from cxr_vit.config.help import one_line
from cxr_vit.config.plans import REST, StagePlan, fill_rest
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError, Problem

#: IPUs of a replica, and items of a list; a POD has at most 1,024 IPUs.
_MOST_ITEMS = 1024
#: What Linux can open.
_LONGEST_PATH, _LONGEST_NAME = 4000, 255
#: Columns of their keys and values; longer ones are not aligned.
_WIDTH = 40
#: Errors that are listed.
_MOST_PROBLEMS = 50
AS_TRAINING = "as in training"

Given = Mapping[str, Any]
Ours = Dict[str, Any]


class Kind(NamedTuple):
    """What a value must be, in words, and the test."""

    words: str
    accepts: Callable[[Any], bool]


class Rule(NamedTuple):
    """What a key means here."""

    kind: Kind
    #: From its value, and all values of the file with their defaults, to ours: {} is nothing.
    ours: Callable[[Any, Given], Ours]
    why: str
    #: What their code takes where the file gives nothing; None: nothing that matters here.
    default: Any = None


class Line(NamedTuple):
    """A key of their file, with what becomes of it."""

    key: str
    value: Any
    ours: Ours
    why: str
    is_default: bool

    def __str__(self) -> str:
        ours = ", ".join(f"{key} = {_shown(value)}" for key, value in self.ours.items())
        theirs = f"{self.key} = {_shown(self.value)}"
        return one_line(f"{theirs:<{_WIDTH}} -> {ours or 'nothing here'}  ({self.why})")


class Imported(NamedTuple):
    """A file of Graphcore's in our terms."""

    #: What was read, e.g. ``"configs.yml, entry b16_cifar10 of Graphcore's ViT example"``.
    source: str
    lines: List[Line]
    unknown: List[str]
    #: What contradicts itself in the file, or has no counterpart that trains the same.
    problems: List[str]

    @property
    def overlay(self) -> Dict[str, Dict[str, Any]]:
        """Our sections and keys, in the order of the configuration's sections."""
        overlay: Dict[str, Dict[str, Any]] = {}
        for line in self.lines:
            for name, value in line.ours.items():
                section, _, key = name.partition(".")
                keys = overlay.setdefault(section, {})
                if isinstance(value, dict):  # options for one graph, or for both
                    value = {**keys.get(key, {}), **value}
                keys[key] = value
        return {section: overlay[section] for section in SECTIONS if section in overlay}


def _shown(value: Any) -> str:
    is_word = isinstance(value, str) and value and value == value.strip()
    text = value if is_word else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:75]} ..."


# What values must be


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 2**63  # neither NaN nor infinite


def _integer(least: int, most: Optional[int] = None) -> Kind:
    words = f"an integer of {least} or more" if most is None else f"an integer, {least} to {most}"
    return Kind(
        words,
        lambda value: (
            _is_number(value)
            and isinstance(value, int)
            and least <= value <= (value if most is None else most)
        ),
    )


def _list_of(kind: Kind, words: str, *lengths: int) -> Kind:
    return Kind(
        words,
        lambda value: (
            isinstance(value, list)
            and len(value) in (lengths or range(1, _MOST_ITEMS + 1))
            and all(map(kind.accepts, value))
        ),
    )


def _one_of(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: str(value) in words)


_ANY = Kind("anything", lambda value: True)
_FLAG = Kind("true or false", lambda value: isinstance(value, bool))
_COUNT, _NATURAL, _IPUS = _integer(1), _integer(0), _integer(1, _MOST_ITEMS)
_NUMBER = Kind("a number", _is_number)
_PATH = Kind(
    f"a path, with names of up to {_LONGEST_NAME} characters",
    lambda value: (
        isinstance(value, str)
        and len(value) <= _LONGEST_PATH
        and all(len(name.encode(errors="replace")) <= _LONGEST_NAME for name in value.split("/"))
    ),
)
_LAYERS = _list_of(_integer(REST, _MOST_ITEMS), "a list of integers of 0 or more, or -1")
_INTEGERS = _list_of(_NATURAL, "a list of integers of 0 or more")
_TWO = _list_of(_NUMBER, "a list of two numbers", 2)
_SOME = _list_of(_NUMBER, "a list of numbers")
_NUMBERS = Kind("a number or a list of numbers", lambda value: _is_number(value) or _SOME[1](value))
_FLOAT_TYPE = _one_of("fp16", "fp32")


# From their values to ours


def _nothing(value: Any, given: Given) -> Ours:
    return {}


def _to(key: str) -> Callable[[Any, Given], Ours]:
    return lambda value, given: {key: value}


def _if_set(key: str) -> Callable[[Any, Given], Ours]:
    """Take a value over unless it is 0 or "", which mean nothing there."""
    return lambda value, given: {key: value} if value else {}


def _chosen(key: str, choices: Mapping[Any, Any]) -> Callable[[Any, Given], Ours]:
    return lambda value, given: {key: choices[value]}


def _in_updates(key: str) -> Callable[[Any, Given], Ours]:
    """Convert host calls, which their loops count, to weight updates."""
    return lambda value, given: {key: value * given["device_iterations"]}


def _of_optimizer(key: str, *names: str) -> Callable[[Any, Given], Ours]:
    """Take a value over if their optimizer is one of `names`; the others do not read it."""
    return lambda value, given: {key: value} if given.get("optimizer") in names else {}


def _cut(given: Given) -> List[int]:
    """Return the layers of each IPU, where one IPU takes all and a single -1 is for every IPU."""
    layers = given["layers_per_ipu"]
    return _spread(layers, given.get("ipus_per_replica", len(layers)))


def _spread(layers: List[int], ipus: int) -> List[int]:
    if ipus == 1:
        return layers if len(layers) == 1 else [REST]
    return [REST] * ipus if layers == [REST] else list(layers)


def _layers(value: Any, given: Given) -> Ours:
    return {"pipeline.layers_per_stage": _cut(given)}


def _eval_cut(given: Given) -> List[int]:
    """Return the layers of each IPU in inference, by the rules of optimum-graphcore."""
    layers, own = given["layers_per_ipu"], given["inference_layers_per_ipu"]
    ipus = given.get("ipus_per_replica", len(layers))
    own = layers if own == AS_TRAINING else own
    if ipus == len(layers) or own != [REST]:
        ipus = len(own)
    return _spread(own, given.get("inference_ipus_per_replica", ipus))


def _eval_layers(value: Any, given: Given) -> Ours:
    cut = _eval_cut(given)
    return {"pipeline.eval_layers_per_stage": None if cut == _cut(given) else cut}


def _one_number(value: Any) -> Any:
    """Return the only number of a list of one, which their older code repeats for all IPUs."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _proportion(value: Any, given: Given) -> Ours:
    return {"pipeline.available_memory_proportion": _one_number(value)}


def _eval_proportion(value: Any, given: Given) -> Ours:
    own, training = _one_number(value), _one_number(given["matmul_proportion"])
    if own == AS_TRAINING:
        fits = not isinstance(training, list) or len(training) == len(_eval_cut(given))
        own = training if fits else 0.2
    return {"pipeline.eval_available_memory_proportion": None if own == training else own}


def _eval_replicas(value: Any, given: Given) -> Ours:
    return {"batch.eval_replicas": None if value == given["replication_factor"] else value}


def _eval_iterations(value: Any, given: Given) -> Ours:
    is_sharded = value < len(_eval_cut(given))
    for key in ("sharded_execution_for_inference", "explicit_ir_inference"):
        is_sharded |= bool(given.get(key))  # an explicit pipeline is refused
    execution = "sharded" if is_sharded else "pipelined"
    return {"batch.eval_device_iterations": value, "pipeline.eval_execution": execution}


def _sharding(value: Any, given: Given) -> Ours:
    several = given["replication_factor"] > 1
    return {"engine.replicated_tensor_sharding": value and several}


def _automatic(value: Any, given: Given) -> Ours:
    return {"optim.loss_scaling": "auto", "optim.accumulator": "fp16"} if value else {}


def _unless_automatic(key: str) -> Callable[[Any, Given], Ours]:
    return lambda value, given: {} if given.get("auto_loss_scaling") else {key: value}


def _cache(value: Any, given: Given) -> Ours:
    if "${" in value:  # a name there, a variable here
        return {}
    return {"engine.executable_cache": None if value in ("", "disabled") else value}


def _option(graph: str, name: str) -> Callable[[Any, Given], Ours]:
    """Make a flag one of PopART's session options, for one graph."""
    options = {graph: {"_Popart.set": {name: True}}}
    return lambda value, given: {"engine.poptorch_options": options} if value else {}


def _precision(value: Any, given: Given) -> Ours:
    name = "fp32" if str(value).startswith("32") else "fp16"
    return {"engine.precision": name, "engine.weights": name}


def _recompute(value: Any, given: Given) -> Ours:
    """Return what each stage keeps; their marks within layers count when they pre-train."""
    whole = "every_layer" if value else "stage_inputs"
    marked = given.get("recompute_mid_layers", []) if given.get("pretrain") else []
    plan = StagePlan.from_list(fill_rest(_cut(given), given.get("num_hidden_layers", 0)))
    if not marked or not value:
        return {"pipeline.recompute": whole}
    kept = [
        "attention_mlp" if set(plan.layers(stage)) & set(marked) else whole
        for stage in range(plan.num_stages)
    ]
    return {"pipeline.recompute": kept[0] if len(set(kept)) == 1 else kept}


def _worker_size(value: Any, given: Given) -> Ours:
    sizes = [given.get(key, 1) for key in ("micro_batch_size", "gradient_accumulation")]
    most = sizes[0] * sizes[1] * given["replication_factor"]
    return {"engine.rebatched_worker_size": min(value, most)}


def _workers(value: Any, given: Given) -> Ours:
    return {
        "data.num_workers": value,
        "engine.loader_mode": "async_rebatched",
        "engine.loader_buffer_size": 8,
        "engine.loader_early_preload": True,
    }


def _model(value: Any, given: Given) -> Ours:
    """Name their weights, or where there are none our size of the same shape."""
    name = value or _size(given)
    return {"model.name": name} if name else {}


def _size(given: Given) -> Optional[str]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    shape = tuple(given.get(key) for key in keys)
    return next((name for name, size in SIZES.items() if size[:3] == shape), None)


def _patch(value: Any, given: Given) -> Ours:
    sides = value if isinstance(value, list) else [value]
    return {"model.patch_size": sides[0] if len(set(sides)) == 1 else value}


def _betas(value: Any, given: Given) -> Ours:
    return {"optim.beta1": value[0], "optim.beta2": value[1]}


def _schedule(value: Any, given: Given) -> Ours:
    steps = 0 if value == "constant" else given.get("warmup_steps", 0)
    return {"schedule.name": value, **_in_updates("schedule.warmup_steps")(steps, given)}


def _length(value: Any, given: Given) -> Ours:
    """Convert the number of host calls; epochs, where given, win in their pre-training."""
    if not value or (given.get("epochs") and given.get("pretrain")):
        return {}
    return _in_updates("train.steps")(value, given)


def _epochs(value: Any, given: Given) -> Ours:
    counts = value and (given.get("pretrain") or not given.get("training_steps"))
    return {"train.epochs": value} if counts else {}


def _without_counterpart(keys: Mapping[str, str]) -> Dict[str, Rule]:
    """Make rules from reasons and the keys that have them."""
    return {key: Rule(_ANY, _nothing, why) for why in keys for key in keys[why].split()}


_SAME, _AS_TRAINING = "the same", "null: as in training"
_SGD, _LAMB = "read by SGD only", "read by LAMB only"
_LENGTH = "the length of pipeline.layers_per_stage"
_PARTIALS = _chosen("engine.partials", {True: "fp16", False: "fp32"})
_ON_CHIP = _chosen("engine.optimizer_state_on_chip", {True: False, False: True})
_OPTIMIZERS = {"SGD": "sgd", "Adam": "adamw", "LAMB": "lamb"}

#: Keys that both files have.
_BOTH = {
    "layers_per_ipu": Rule(_LAYERS, _layers, "the same; -1: the layers that are left"),
    "ipus_per_replica": Rule(_IPUS, _nothing, _LENGTH),
    "matmul_proportion": Rule(_NUMBERS, _proportion, _SAME),
    "device_iterations": Rule(_COUNT, _to("batch.device_iterations"), _SAME, 1),
    "replication_factor": Rule(_COUNT, _to("batch.replicas"), _SAME, 1),
    "recompute_checkpoint_every_layer": Rule(
        _FLAG,
        _recompute,
        "true keeps the outputs of layers, false only the inputs of stages",
        False,
    ),
    "auto_loss_scaling": Rule(_FLAG, _automatic, "PopART's own needs fp16 accumulators"),
    "executable_cache_dir": Rule(_PATH, _cache, "one subfolder per configuration"),
    "profile_dir": Rule(_PATH, _if_set("engine.profile_dir"), _SAME),
}

#: optimum-graphcore's ipu_configuration.py, with keys of its older versions.
IPU_CONFIG: Dict[str, Rule] = {
    **_BOTH,
    "layers_per_ipu": _BOTH["layers_per_ipu"]._replace(default=[REST]),
    "inference_layers_per_ipu": Rule(_LAYERS, _eval_layers, _AS_TRAINING, AS_TRAINING),
    "inference_ipus_per_replica": Rule(_IPUS, _nothing, _LENGTH),
    "gradient_accumulation_steps": Rule(_COUNT, _to("batch.gradient_accumulation"), _SAME, 1),
    "inference_device_iterations": Rule(
        _COUNT, _eval_iterations, "theirs is sharded; pipelined from one micro-batch per IPU on", 1
    ),
    "inference_replication_factor": Rule(_COUNT, _eval_replicas, _AS_TRAINING, 1),
    "matmul_proportion": _BOTH["matmul_proportion"]._replace(default=0.2),
    "inference_matmul_proportion": Rule(_NUMBERS, _eval_proportion, _AS_TRAINING, AS_TRAINING),
    "optimizer_state_offchip": Rule(_FLAG, _ON_CHIP, "the opposite", False),
    "replicated_tensor_sharding": Rule(_FLAG, _sharding, "off with one replica, as there", False),
    "enable_half_partials": Rule(_FLAG, _PARTIALS, _SAME, True),
    "seed": Rule(_NATURAL, _if_set("run.seed"), "0 sets none there"),
    "explicit_ir_inference": Rule(
        _FLAG, _option("inference", "enableExplicitIR"), "a session option of PopART"
    ),
    "decompose_grad_sum": Rule(
        _FLAG, _option("training", "decomposeGradSum"), "older; a session option of PopART"
    ),
    "enable_half_first_order_momentum": Rule(
        _FLAG,
        _chosen("optim.first_moment", {True: "fp16", False: "fp32"}),
        "older; now fp16 unless the training arguments have fp32",
    ),
    "sharded_execution_for_inference": Rule(
        _FLAG, _nothing, "older; see inference_device_iterations"
    ),
    **_without_counterpart(
        {
            "fixed by the engine: the loss of a step is the mean of all micro-batches": (
                "output_mode"
            ),
            "not for a ViT": """
                embedding_serialization_factor inference_embedding_serialization_factor
                serialized_embedding_splits_per_ipu inference_serialized_embedding_splits_per_ipu
                projection_serialization_factor inference_projection_serialization_factor
                serialized_projection_splits_per_ipu inference_serialized_projection_splits_per_ipu
                parallelize_kwargs inference_parallelize_kwargs
                execute_encoder_on_cpu_for_generation
            """,
            "poprun is found out at the start": "use_popdist",
            "a version, not a setting": "transformers_version optimum_version",
        }
    ),
}

#: vision/vit/pytorch/args.py of Graphcore's examples.
EXAMPLE: Dict[str, Rule] = {
    **_BOTH,
    "micro_batch_size": Rule(_COUNT, _to("batch.micro_batch_size"), _SAME),
    "gradient_accumulation": Rule(_COUNT, _to("batch.gradient_accumulation"), _SAME),
    "training_steps": Rule(_NATURAL, _length, "their step is a host call, ours a weight update"),
    "epochs": Rule(_NATURAL, _epochs, "where their code reads them: not beside training_steps"),
    "checkpoint_save_steps": Rule(
        _COUNT, _in_updates("train.checkpoint_every_steps"), "in weight updates, not host calls"
    ),
    "random_seed": Rule(_NATURAL, _to("run.seed"), _SAME),
    "half_partials": Rule(_FLAG, _PARTIALS, _SAME, True),
    "stochastic_rounding": Rule(_FLAG, _to("engine.stochastic_rounding"), _SAME, True),
    "recompute_mid_layers": Rule(
        _INTEGERS,
        _nothing,
        "read by pretrain.py only: attention_mlp for whole stages, which keeps more",
    ),
    "precision": Rule(
        _one_of("16.16", "16.32", "32.32"),
        _precision,
        "of arithmetic and weights; finetune.py has fp16 in any case",
        "16.16",
    ),
    "prefetch_depth": Rule(_COUNT, _to("engine.prefetch_depth"), _SAME),
    "enable_rts": Rule(_FLAG, _sharding, "off with one replica", False),
    "optimizer_state_offchip": IPU_CONFIG["optimizer_state_offchip"]._replace(default=True),
    "optimizer": Rule(
        _one_of(*_OPTIMIZERS),
        _chosen("optim.name", _OPTIMIZERS),
        "Adam adds weight decay to the gradient, AdamW to the weights: the same at 0",
    ),
    "learning_rate": Rule(_NUMBER, _to("optim.lr"), _SAME),
    "lr_schedule": Rule(
        _one_of("constant", "linear", "cosine"), _schedule, "their constant has no warm-up"
    ),
    "warmup_steps": Rule(_NATURAL, _nothing, "see lr_schedule; their step is a host call"),
    "loss_scaling": Rule(
        _NUMBER, _unless_automatic("optim.loss_scaling"), "unless auto_loss_scaling"
    ),
    "weight_decay": Rule(_NUMBER, _to("optim.weight_decay"), _SAME),
    "momentum": Rule(_NUMBER, _of_optimizer("optim.momentum", "SGD"), _SGD),
    "adam_betas": Rule(_TWO, _betas, _SAME),
    "adam_eps": Rule(_NUMBER, _to("optim.eps"), _SAME),
    "bias_correction": Rule(_FLAG, _of_optimizer("optim.bias_correction", "LAMB"), _LAMB),
    "use_combined_accum": Rule(_FLAG, _of_optimizer("optim.use_combined_accum", "SGD"), _SGD),
    "accum_type": Rule(
        _FLOAT_TYPE, _unless_automatic("optim.accumulator"), "unless auto_loss_scaling", "fp16"
    ),
    "first_order_type": Rule(_FLOAT_TYPE, _to("optim.first_moment"), _SAME, "fp32"),
    "second_order_type": Rule(_FLOAT_TYPE, _to("optim.second_moment"), _SAME, "fp32"),
    "max_norm": Rule(_NUMBER, _of_optimizer("optim.max_weight_norm", "LAMB"), _LAMB),
    "pretrained_checkpoint": Rule(_PATH, _model, "without one, random weights of a known size"),
    "hidden_dropout_prob": Rule(_NUMBER, _to("model.hidden_dropout"), _SAME),
    "attention_probs_dropout_prob": Rule(_NUMBER, _to("model.attention_dropout"), _SAME),
    "layer_norm_eps": Rule(_NUMBER, _to("model.layer_norm_eps"), _SAME),
    "patches_size": Rule(_NUMBERS, _patch, "for random weights"),
    "num_hidden_layers": Rule(_IPUS, _nothing, "as the weights, or the size, of model.name"),
    "dataloader_workers": Rule(
        _NATURAL, _workers, "their loader is always asynchronous and rebatched, with 8 buffers"
    ),
    "rebatched_worker_size": Rule(_COUNT, _worker_size, "at most a global batch, as there"),
    "synthetic_data": Rule(_FLAG, _to("engine.synthetic_data"), _SAME),
    **_without_counterpart(
        {
            "as the weights, or the size, of model.name": "hidden_size num_attention_heads mlp_dim",
            "fixed by the engine: the mean. Of a sum the gradient is accumulation x replicas times"
            " larger, which sgd's optim.lr must have": "reduction_type",
            "fixed: sigmoid cross-entropy of each finding": "loss",
            "the head is one linear layer": "representation_size",
            "14 findings, or 15 with data.include_no_finding": "num_labels",
            "set model.drop_path for stochastic depth": "drop_path_rate",
            "training is the same from random weights": "pretrain",
            "optim.max_weight_norm is for all parameters": "max_norm_bias",
            "images are always sent as bytes": "byteio",
            "the augment section has what suits X-rays": "mixup alpha extra_aug",
            "the data are chest X-rays: data.root": "dataset dataset_path iterations",
            "loggers=[wandb] adds it": "wandb wandb_project_name wandb_run_name",
            "every run has a folder: run.root, run.name, run.dir": "checkpoint_output_dir",
            "train.py --resume": "resume_training_from_checkpoint",
        }
    ),
}


# The translation


def translate(source: str, values: Dict[str, Any], rules: Mapping[str, Rule]) -> Imported:
    """Apply the rules to the values of a file; raise ConfigError if one is of a wrong type."""
    # null is what their code has where the file gives nothing.
    known = {key: value for key, value in values.items() if key in rules and value is not None}
    if not set(values) & set(rules):
        raise ConfigError(one_line(f"{source}: none of its keys is known."))
    wrong = [
        f"{source.partition(',')[0]}: {key}={_shown(value)} must be {rules[key].kind.words}."
        for key, value in known.items()
        if not rules[key].kind.accepts(value)
    ]
    if wrong:
        raise ConfigError("\n".join(map(one_line, wrong[:_MOST_PROBLEMS])))
    defaults = {key: rule.default for key, rule in rules.items() if rule.default is not None}
    given = {**defaults, **known}
    if "layers_per_ipu" not in given:
        given["layers_per_ipu"] = [REST]
    lines = [
        Line(key, values[key], {}, "not set", is_default=False)
        if values[key] is None
        else Line(key, value, rules[key].ours(value, given), rules[key].why, is_default=False)
        for key, value in values.items()
        if key in rules and (value is not None or key not in defaults)
    ]
    lines += [_default_line(key, rules[key], given) for key in defaults if values.get(key) is None]
    unknown = [key for key in values if key not in rules]
    return Imported(
        source, lines, unknown, [one_line(str(problem)) for problem in _contradictions(given)]
    )


def _default_line(key: str, rule: Rule, given: Given) -> Line:
    """Describe a key that the file does not give, and compare their default with ours."""
    ours = rule.ours(rule.default, given)
    defaults = {name: _default(name) for name in ours}
    why = "the same default"
    if defaults != ours:
        others = (_shown(value) for name, value in defaults.items() if value != ours[name])
        why = f"the default differs: ours is {', '.join(others)}"
    return Line(key, rule.default, ours, why, is_default=True)


def _default(name: str) -> Any:
    section, _, key = name.partition(".")
    return SECTIONS[section].model_fields[key].default


def _contradictions(given: Given) -> Iterator[Problem]:
    """Yield what their own code refuses, and shapes that none of our sizes has."""
    for mode in ("", "inference_"):
        layers, ipus = f"{mode}layers_per_ipu", f"{mode}ipus_per_replica"
        cut, count = given.get(layers, AS_TRAINING), given.get(ipus, 1)  # 1: the list is not read
        if cut not in (AS_TRAINING, [REST]) and count not in (1, len(cut)):
            yield Problem(
                f"{layers}={cut} with {ipus}={count}:",
                "they disagree, and the list counts here.",
                f"Set {ipus}={len(cut)}, or change the list.",
            )
    weights = given.get("pretrained_checkpoint")
    if weights and weights[0] in "./~" and not Path(weights).is_dir():
        yield Problem(
            f"pretrained_checkpoint={weights}",
            "is no folder here.",
            "Set model.name to a folder of weights or a hub name.",
        )
    if weights == "" and _size(given) is None:
        keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        yield Problem(
            ", ".join(f"{key}={given.get(key)}" for key in keys),
            "is the shape of none of our sizes.",
            f"Set model.name to one of {', '.join(SIZES)}.",
        )
