"""Configuration: YAML files and overrides, validated."""

from cxr_vit.config.loader import dump_config, load_config, read_config
from cxr_vit.config.plans import BatchPlan, StagePlan
from cxr_vit.config.rules import check
from cxr_vit.config.schema import Config

__all__ = [
    "BatchPlan",
    "Config",
    "StagePlan",
    "check",
    "dump_config",
    "load_config",
    "read_config",
]
