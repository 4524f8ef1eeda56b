"""What an exported model says of itself: in the ONNX file, and in manifest.json beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Union

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Annotated, Literal

from cxr_vit.config.columns import LabelName
from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.fields import LARGEST_IMAGE, SMALLEST_IMAGE
from cxr_vit.data.cache import CacheSettings
from cxr_vit.errors import DataError, ModelError
from cxr_vit.evaluation.operating_points import OperatingPoints
from cxr_vit.regular_files import read_bytes

#: The file beside the model. Where it is, the export is complete.
MANIFEST = "manifest.json"
#: The key of the same text in the metadata of an ONNX file.
MANIFEST_KEY = "cxr_vit_manifest"
#: Size limit of the text, bytes; 1,000 labels with their thresholds take half a megabyte.
LARGEST_MANIFEST = 2**24

Kind = Literal["onnx", "hf"]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Text = Annotated[str, Field(max_length=1000)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Side = Annotated[int, Field(ge=SMALLEST_IMAGE, le=LARGEST_IMAGE)]


class Parity(BaseModel):
    """How far an export is from the checkpoint: the largest difference, and over which images."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    split: Literal["val", "test", "random"]
    images: Annotated[int, Field(ge=1, le=2**53)]
    of: Literal["probability", "logit"]
    largest_difference: Annotated[_Number, Field(ge=0)]


class Manifest(BaseModel):
    """Facts of an exported model.

    Attributes
    ----------
    labels
        In the order of the probabilities.
    reading
        How an image file becomes the model's input.
    image_size
        Side of the part in the middle that the model sees, pixels.
    views
        The parts of an image whose probabilities the graph averages (`evaluation.views`).
    points
        Thresholds and scaling that were fitted with this model, if there are any.
    weights_sha256
        Of the checkpoint's model.safetensors.
    onnx_sha256
        Of model.onnx; in manifest.json alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    kind: Kind
    notice: _Text
    labels: Annotated[List[LabelName], Field(min_length=1, max_length=10_000)]
    reading: CacheSettings
    image_size: _Side
    views: Literal["center", "flip", "ten_crop"]
    model: Dict[_Text, Union[_Text, int, List[_Number]]]
    points: Optional[OperatingPoints]
    weights_sha256: Sha256
    onnx_sha256: Optional[Sha256] = None
    versions: Dict[_Text, _Text]
    parity: Parity

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Manifest:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: two are the same")
        if self.points is not None and self.points.labels != self.labels:
            raise ValueError("points: they have other labels")
        # The rules of the configuration for what is read: sides, filter, megapixels.
        reading = self.reading
        data = DataSection(
            image_size=self.image_size,
            resize=reading.image_size,
            max_megapixels=reading.max_megapixels,
            resample=reading.resize.partition(",")[0],
        )
        if CacheSettings.of(data).resize != reading.resize or reading.image_size < self.image_size:
            raise ValueError("reading: it is none that this version knows")
        return self


def parse_manifest(text: Union[str, bytes], source: Path) -> Manifest:
    """Return the manifest in a text of `source`.

    Raises ModelError if it is none that this version wrote, in form and range.
    """
    reason = "it is too long"
    if len(text) <= LARGEST_MANIFEST:
        try:
            return Manifest.model_validate_json(text)
        except ValidationError as error:
            detail = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, detail["loc"]))
            reason = f"{where}: {detail['msg']}" if where else detail["msg"]
    raise ModelError(
        f"{source}: its manifest cannot be used ({reason[:300]}). Export the checkpoint again, with"
        " this version of cxr_vit."
    )


def refuse_other_files(folder: Path, kind: Kind) -> None:
    """Raise DataError if a folder has files, unless it has the manifest of an export of a kind."""
    path = folder / MANIFEST
    if not any(folder.iterdir()):
        return
    problem = "has files of something else, or of an export that was cut off"
    if path.exists():
        try:
            found = parse_manifest(read_bytes(path, limit=LARGEST_MANIFEST), path)
        except (ModelError, OSError):
            problem = f"has a {MANIFEST} that is not of an export"
        else:
            if found.kind == kind:
                return
            problem = f"has an export --to {found.kind}"
    raise DataError(
        f"{folder} {problem}, which would be replaced. Remove the folder, or give another one with"
        " --out."
    )
