"""Stages, and the strategies that assign blocks to them."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

from . import blocks
from .enums import AutoStage


class Stage:
    """One or more blocks that run on one IPU."""

    def __init__(self, *block_ids: str) -> None:
        assert all(isinstance(block_id, str) for block_id in block_ids), (
            f"Block IDs are supposed to be strings but got {block_ids}"
        )
        self._blocks = block_ids
        self._stage_id = -1
        self._phase_id = -1
        self._ipu: Optional[int] = None

    @property
    def blocks(self) -> Tuple[str, ...]:
        return self._blocks

    def ipu(self, ipu: int) -> Stage:
        assert isinstance(ipu, int)
        self._ipu = ipu
        return self

    def _setStage(self, stage: Optional[int]) -> Stage:
        if stage is not None:
            self._stage_id = stage
        return self


class _StageManager:
    """Determines where a block runs, while a model is traced."""

    def __init__(self, stages: Dict[str, Stage], auto_stage: AutoStage) -> None:
        self._stages = dict(stages)
        self._explicit = bool(stages)
        self._auto_stage = auto_stage
        self._next_stage = 1
        self._next_auto_id = 0

    def nextAutoId(self) -> str:
        self._next_auto_id += 1
        return str(self._next_auto_id - 1)

    def resetAutoId(self) -> None:
        self._next_auto_id = 0

    def beginStage(self, user_id: Optional[str], ipu_id: Optional[int]) -> None:
        user_id = user_id or self.nextAutoId()
        stage = self._stage(user_id, ipu_id)
        ipu = stage._ipu if stage._ipu is not None else ipu_id
        if ipu is None:
            ipu = stage._stage_id
        blocks.begin_ipu_block(stage._stage_id, stage._phase_id, ipu)

    def _stage(self, user_id: str, ipu_id: Optional[int]) -> Stage:
        if user_id in self._stages:
            return self._stages[user_id]
        assert not self._explicit, (
            f"Unknown Block '{user_id}' list of expected Blocks: {list(self._stages)}"
        )
        if self._auto_stage == AutoStage.SameAsIpu:
            assert ipu_id is not None, (
                "poptorch.AutoStage.SameAsIpu was selected but no IPU was specified for block "
                f"{user_id}"
            )
            number = ipu_id
        else:
            number = self._next_stage
            self._next_stage += 1
        self._stages[user_id] = Stage(user_id)._setStage(number)
        return self._stages[user_id]


class PipelinedExecution:
    """Stages of a pipeline: all work at the same time, each on another micro-batch."""

    def __init__(self, *args: Any) -> None:
        auto_stage = AutoStage.SameAsIpu
        stages: List[Any] = list(args)
        if len(args) == 1 and isinstance(args[0], AutoStage):
            auto_stage, stages = args[0], []
        self._block_map: Dict[str, Stage] = {}
        for number, argument in enumerate(stages):
            stage = _as_stage(argument)._setStage(number)
            for block in stage.blocks:
                assert block not in self._block_map, f"{block} associated with more than one stage"
                self._block_map[block] = stage
        self._stages_manager = _StageManager(self._block_map, auto_stage)

    def stage(self, block_id: str) -> Stage:
        assert block_id in self._block_map, f"Unknown block {block_id}"
        return self._block_map[block_id]

    def onStartTracing(self) -> None:
        blocks.Block._stages_manager = self._stages_manager

    def onEndTracing(self) -> None:
        blocks.Block._stages_manager = None

    def backendOptions(self) -> Dict[str, Any]:
        return {"execution_mode": 0}


class ShardedExecution(PipelinedExecution):
    """One stage after the other, on one micro-batch."""

    def backendOptions(self) -> Dict[str, Any]:
        return {"execution_mode": 1}


def _as_stage(argument: Any) -> Stage:
    if isinstance(argument, Stage):
        return argument
    if isinstance(argument, str):
        return Stage(argument)
    assert all(isinstance(block, str) for block in argument)
    return Stage(*argument)
