"""The `augment` section: how training films are varied. All of it is off by default.

Imports no torch.
"""

from pydantic import Field

from cxr_vit.config.section import Section

__all__ = ["AugmentSection"]


class AugmentSection(Section):
    """How training films are varied: each range is drawn from evenly, and 0 is off."""

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
        description="random resized crop: the least part of the film's area that stays (1: off);"
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
        description="distance from the film's mean times 1 plus or minus up to this",
    )
    gamma: float = Field(
        0.0, ge=0, le=0.5, description="gray levels to the power of 1 plus or minus up to this"
    )
    horizontal_flip: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability of a mirrored film; it puts the heart on the other side",
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is varied."""
        off = AugmentSection().model_copy(update={"crop_ratio": self.crop_ratio})
        return self != off
