"""The choices of the command line of `predict`, which is parsed before numpy is imported."""

from __future__ import annotations

from typing import get_args

from cxr_vit.commands import predict_arguments
from cxr_vit.config.schema import MAP_METHODS
from cxr_vit.evaluation import operating_points
from cxr_vit.saliency.maps import METHODS


def test_choices_are_those_of_the_modules_that_implement_them() -> None:
    assert get_args(operating_points._Kind) == predict_arguments._KINDS
    assert tuple(METHODS) == MAP_METHODS
