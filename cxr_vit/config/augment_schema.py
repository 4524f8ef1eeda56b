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
    def moves(self) -> bool:
        """Whether films are rotated, shifted, scaled, cropped or flipped."""
        return self.shows_beyond or self.crop < 1 or self.horizontal_flip > 0

    @property
    def shows_beyond(self) -> bool:
        """Whether what lies beyond a film's border may come into view."""
        return self.rotation > 0 or self.shift > 0 or self.scale > 0

    @property
    def recolours(self) -> bool:
        """Whether gray levels change."""
        return self.brightness > 0 or self.contrast > 0 or self.gamma > 0

    @property
    def is_on(self) -> bool:
        """Whether anything is varied."""
        return self.moves or self.recolours
