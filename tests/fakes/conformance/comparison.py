"""Make the same calls on the stand-in and on the front end, and return the results as JSON.

Run as a script, it prints the results of the front end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from fakes import loading


def everything(poptorch: Any, inspection: Any) -> Dict[str, Any]:
    # Convert enumerations to numbers and tuples to lists.
    content = {
        "options": [_dictionary(options) for options in _options(poptorch)],
        "optimizers": _optimizers(poptorch),
        "training": _training(poptorch, inspection),
    }
    return json.loads(json.dumps(content, default=str))


def _dictionary(options: Any) -> Dict[str, Any]:
    values = options.toDict()
    shown = values.pop("compilation_progress_bar_fn", None) is not None
    return {**values, "has a progress bar": shown}


def _options(poptorch: Any) -> List[Any]:
    plain = poptorch.Options().outputMode(poptorch.OutputMode.All)
    training = poptorch.Options().deviceIterations(4).replicationFactor(2).randomSeed(0)
    training.Training.gradientAccumulation(16)
    training.Training.accumulationAndReplicationReductionType(poptorch.ReductionType.Sum)
    training.Training.setMeanAccumulationAndReplicationReductionStrategy(
        poptorch.MeanReductionStrategy.Running
    )
    training.Training.setAutomaticLossScaling(True)
    training.outputMode(poptorch.OutputMode.EveryN, 2)
    training.setAvailableMemoryProportion({"IPU0": 0.2, "IPU3": 0.6})
    training.Precision.enableStochasticRounding(True)
    training.Precision.setPartialsType(torch.half)
    training.Precision.enableFloatingPointExceptions(True)
    settings = poptorch.TensorLocationSettings()
    settings.useOnChipStorage(False).useReplicatedTensorSharding(True)
    settings.minElementsForReplicatedTensorSharding(2).minElementsForOffChip(4)
    training.TensorLocations.setOptimizerLocation(settings)
    settings.useOnChipStorage(None)
    training.TensorLocations.setWeightLocation(settings)
    training.TensorLocations.setActivationLocation(poptorch.TensorLocationSettings())
    training.TensorLocations.setAccumulatorLocation(settings.useIOTilesToLoad(True))
    training.enableExecutableCaching("cache").enableProfiling("profile")
    training.showCompilationProgressBar(False).modelName("vit").logDir("logs")
    other = poptorch.Options().outputMode(poptorch.OutputMode.Sum).autoRoundNumIPUs()
    other.setExecutionStrategy(poptorch.ShardedExecution(poptorch.AutoStage.AutoIncrement))
    other.connectionType(poptorch.ConnectionType.OnDemand).logCycleCount(True)
    other.enableSyntheticData(True).useIpuModel(False).enableExecutableCaching(None)
    other.Distributed.configureProcessId(1, 2)
    other._Popart.set("autoRecomputation", 3).setEngineOptions({"opt.useAutoloader": "true"})
    other._Popart.setPatterns({"TiedGather": False}, level=1)
    offline = plain.clone().useOfflineIpuTarget().enableStableNorm(True)
    offline.Training.setConvolutionDithering(False)
    return [plain, training, training.clone(), other, offline]


def _optimizers(poptorch: Any) -> List[Any]:
    """Return the dictionaries that are sent to the device."""
    optim = poptorch.optim
    half, single = torch.float16, torch.float32

    def adamw(parameters: Any) -> Any:
        first, second = parameters
        groups = [{"params": [first], "weight_decay": 0.0}, {"params": [second]}]
        optimizer = optim.AdamW(
            groups, lr=0.1, weight_decay=0.2, loss_scaling=8.0, max_grad_norm=1.0, accum_type=half
        )
        optimizer.variable_attrs.markAsConstant("weight_decay")
        optimizer.variable_attrs.markAsVariable("eps")
        return optimizer

    makers = [
        adamw,
        lambda p: optim.AdamW(p),
        lambda p: optim.LAMB(p, betas=(0.8, 0.9), second_order_momentum_accum_type=single),
        lambda p: optim.LAMB(p, lr=0.1, bias_correction=False, max_weight_norm=2.0),
        lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, velocity_accum_type=half),
        lambda p: optim.SGD(p, lr=0.1, use_combined_accum=True, velocity_scaling=4.0),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ]
    result = []
    for make in makers:
        model = Net(poptorch)
        executor = poptorch.trainingModel(model, None, make(list(model.parameters())))
        reduction = executor.options.Training.meanAccumulationAndReplicationReductionStrategy
        result.append({**executor._dict_optimizer, "reduction": reduction})
    return result


class Net(torch.nn.Module):
    """Two blocks on two IPUs, with two parameters for two parameter groups."""

    def __init__(self, poptorch: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.nn.Linear(6, 4, bias=False)
        self.second = torch.nn.Linear(4, 3, bias=False)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=generator))
        poptorch.BeginBlock(self.first, "first", ipu_id=0)
        poptorch.BeginBlock(self.second, "second", ipu_id=1)
        self._mark = poptorch.identity_loss

    def forward(self, inputs: torch.Tensor, labels: Any = None) -> Any:
        logits = self.second(torch.tanh(self.first(inputs)))
        if labels is None:
            return logits
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return {"logits": logits, "loss": self._mark(loss * 2, reduction="none")}


def _training(poptorch: Any, inspection: Any) -> Dict[str, Any]:
    """Train, run inference, train again, and resume with the state of the optimizer."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(24, 6, generator=generator)
    labels = torch.rand(24, 3, generator=generator).round()
    options = poptorch.Options().deviceIterations(2).replicationFactor(2).randomSeed(3)
    options.Training.gradientAccumulation(3)
    options.outputMode(poptorch.OutputMode.Sum)
    model = Net(poptorch).train()
    # Includes constants: an attribute that is not passed here cannot change.
    optimizer = poptorch.optim.AdamW(
        model.parameters(), lr=0.1, weight_decay=0.3, loss_scaling=2.0, max_grad_norm=0.5
    )
    inspection.log().clear()
    trained = poptorch.trainingModel(model, options, optimizer)
    results = [_lists(trained(inputs, labels))]
    optimizer.param_groups[0]["lr"] = 0.05
    trained.setOptimizer(optimizer)
    results.append(_lists(trained(inputs, labels)))
    state = optimizer.state_dict()
    trained.detachFromDevice()
    scored = poptorch.inferenceModel(model, poptorch.Options().deviceIterations(4))
    results.append(scored(inputs[:8]).tolist())
    scored.detachFromDevice()
    trained.attachToDevice()
    trained(inputs, labels=labels)
    weights = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    executable = inspection.executable(trained)
    facts = {
        name: getattr(executable, name)
        for name in [
            "blocks",
            "placements",
            "used_ipus",
            "num_ipus",
            "pipeline_stages",
            "checkpoints",
            "runs",
        ]
    }
    ops = [list(op) for op in executable.ops]
    parameters = {key: sorted(value) for key, value in executable.parameters_used.items()}
    trained.copyWeightsToDevice()
    trained.destroy()
    again = poptorch.trainingModel(model, options, optimizer)
    again.compile(inputs, labels)
    again.destroy()
    return {
        "results": results,
        "state": {key: tensor.tolist() for key, tensor in state["ipu_state"].items()},
        "annotations": inspection.annotations(model),
        "weights": weights,
        "facts": {**facts, "ops": ops, "parameters_used": parameters},
        "log": [
            name if name != "begin_ipu_block" else [name, *call.args]
            for name, call in zip(inspection.log().names(), inspection.log())
        ],
    }


def _lists(output: Dict[str, torch.Tensor]) -> Dict[str, Any]:
    return {key: tensor.tolist() for key, tensor in output.items()}


def main() -> None:
    with loading.frontend() as (poptorch, harness):
        content = everything(poptorch, harness)
    sys.stdout.write("\n" + json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
