"""The sections of the images: what they are, and how training changes them."""

from typing import ClassVar, Dict, List, Optional, Type

from pydantic import (
    BaseModel,
    Field,
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
    Words,
)
from cxr_vit.config.fields import (
    LARGEST_IMAGE,
    SMALLEST_IMAGE,
    Change,
    Fraction,
    InnerFraction,
    OnProblem,
    PathText,
    Probability,
    Proportion,
    RandAugmentOperation,
    Section,
    Seed,
    TableFiles,
    option,
)


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
    resize: Optional[Annotated[int, Field(ge=SMALLEST_IMAGE, le=LARGEST_IMAGE)]] = option(
        None,
        "side to which images are resized before a part of image_size is cut out, at random in"
        " training and from the center in evaluation; null: image_size, nothing is cut off",
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
    dicom_window: Optional[Annotated[str, Field(min_length=1, max_length=64)]] = option(
        None,
        "the window or lookup table of DICOM files that is shown, by its explanation in the file,"
        " e.g. NORMAL; a file without it is refused. null: the first. Part of the cache's settings",
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
    def read_size(self) -> int:
        """Side to which images are resized as they are read, before a part is cut out."""
        return self.image_size if self.resize is None else self.resize

    @property
    def has_unknown(self) -> bool:
        """Whether labels may be unknown, which the loss then leaves out."""
        return self.format == "table" and "unknown" in (self.uncertain, self.blank)


class AugmentSection(Section):
    """Augmentation of training images: each range is sampled uniformly, and 0 is off."""

    needs: ClassVar[Dict[str, str]] = {
        **dict.fromkeys(["rand_magnitude", "rand_operations"], "rand_augment"),
        "crop_ratio": "crop",
    }

    rotation: float = option(0.0, "maximum rotation in either direction, degrees", ge=0, le=45)
    shift: Change = option(0.0, "maximum shift along each axis, either way: fraction of the side")
    scale: Change = option(0.0, "maximum change of size, larger or smaller, e.g. 0.1")
    crop: float = option(
        1.0,
        "random resized crop: smallest fraction of the area that is kept (1: off); less than half"
        " may cut off the finding",
        ge=0.05,
        le=1,
    )
    crop_ratio: float = option(1.1, "maximum aspect ratio of a crop, wide or high", ge=1, le=2)
    interpolation: Literal["bilinear", "bicubic"] = option(
        "bilinear", "how the pixels of a moved image are interpolated"
    )
    brightness: Change = option(0.0, "maximum change of the factor on gray levels")
    contrast: Change = option(
        0.0, "maximum change of the factor on the distance from the image's mean"
    )
    gamma: Change = option(0.0, "maximum change of the exponent of gray levels")
    horizontal_flip: Probability = option(
        0.0, "probability of mirroring, which puts the heart on the other side"
    )
    rand_augment: int = option(
        0,
        "RandAugment: number of operations on each image, each applied with probability 0.5",
        ge=0,
        le=10,
    )
    rand_magnitude: float = option(6.0, "RandAugment: mean strength of its operations", ge=0, le=10)
    rand_operations: Annotated[List[RandAugmentOperation], Field(min_length=1)] = option(
        [
            *("auto_contrast", "equalize", "rotate", "posterize", "contrast", "brightness"),
            *("sharpness", "shear_x", "shear_y", "translate_x", "translate_y"),
        ],
        "RandAugment: the operations that one is drawn from; the default leaves out invert,"
        " solarize and solarize_add, which turn bone into air",
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
        return self.moves or self.recolours or self.rand_augment > 0
