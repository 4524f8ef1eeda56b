"""Make the files of `cxr-vit selftest`, cxr_vit/selftest.

    python tests/selftest_files.py files       image, pixels and checkpoint
    python tests/selftest_files.py expected    what this environment computes with them

The first makes other weights in another environment, so that `expected` follows in all of them. The
DICOM files take pydicom 3, with a decoder of JPEG 2000.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

FOLDER = ROOT / "cxr_vit" / "selftest"
SIDE = 64
#: Side of the images that the model takes.
SIZE = 32
OVERRIDES = (
    "run.name=selftest",
    "run.dir=run",
    "data.root=sample",
    f"data.image_size={SIZE}",
    "data.val_fraction=0.2",
    "model.name=start",
    "pipeline.layers_per_stage=[2]",
    "batch.micro_batch_size=2",
    "batch.gradient_accumulation=2",
    "batch.eval_micro_batch_size=2",
    "batch.eval_device_iterations=2",
    "optim.name=sgd",  # the checkpoint needs no state of the optimizer
    "optim.lr=0.1",
    "optim.momentum=0",
    "schedule.name=constant",
    "schedule.warmup_steps=0",
    "train.steps=40",
    "engine.name=torch",
    "engine.device=cpu",
    "engine.precision=fp32",
)


def write_images(sample: Path) -> None:
    """Write a synthetic image as PNG and DICOM, and what Pillow reads of the PNG."""
    source = sorted(sample.rglob("*.png"))[0]
    shutil.copy(str(source), str(FOLDER / "image.png"))
    image = Image.open(source)
    pixels = np.asarray(image)
    resized = np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
    np.savez_compressed(FOLDER / "pixels.npz", decoded=pixels, resized=resized)
    write_dicom(pixels)


def write_dicom(pixels: np.ndarray) -> None:
    """Write the pixels as DICOM files, plain and in JPEG 2000 without loss."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

    name = "1.2.826.0.1.3680043.8.498.1"  # of pydicom's root
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image.SOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    image.SOPInstanceUID = name
    image.PatientID, image.PatientName = "selftest", "Synthetic"
    image.Modality, image.BodyPartExamined, image.ViewPosition = "DX", "CHEST", "PA"
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit = 8, 8, 7
    image.PixelRepresentation = 0
    image.WindowCenter, image.WindowWidth = 128, 256  # leaves every value as it is
    image.PixelData = pixels.tobytes()
    image.save_as(FOLDER / "image.dcm", enforce_file_format=True)
    image.compress(JPEG2000Lossless, generate_instance_uid=False)
    image.save_as(FOLDER / "image_jpeg2000.dcm", enforce_file_format=True)


def write_checkpoint() -> None:
    """Train a small model for a moment, so that its logits differ from image to image."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    from cxr_vit import ChestXrayDataModule, Trainer, ViTModule, load_config

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    patches = {"image_size": SIZE, "patch_size": 8, "intermediate_size": 32}
    config = ViTConfig(**shape, **patches, initializer_range=0.2)
    ViTForImageClassification(config).save_pretrained("start")
    config = load_config([], list(OVERRIDES))
    trainer = Trainer(config)
    trainer.fit(ViTModule(config, ChestXrayDataModule(config)), ChestXrayDataModule(config))
    shutil.rmtree(FOLDER / "checkpoint", ignore_errors=True)
    shutil.copytree(trainer.checkpoints.linked("last"), FOLDER / "checkpoint")


def write_files() -> None:
    from cxr_vit.data.synthetic.dataset import write_sample

    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)  # the checkpoint's configuration names no folder of this machine
        FOLDER.mkdir(exist_ok=True)
        write_sample(Path("sample"), num_images=200, image_size=SIDE, seed=0)
        write_images(Path("sample"))
        write_checkpoint()
        os.chdir(ROOT)


def write_expected() -> None:
    """Replace what is expected of this version of torch by what it computes."""
    from cxr_vit.commands.selftest_checks import EXPECTED, Environment, read_environments

    found = compute()
    known = read_environments() if (FOLDER / EXPECTED).exists() else []
    others = [one for one in known if one.versions != found.versions]
    content = [one._asdict() for one in sorted([*others, found], key=Environment.order)]
    (FOLDER / EXPECTED).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def compute():  # type: ignore[no-untyped-def]
    """Return what this environment computes."""
    from cxr_vit.commands import selftest_checks as checks

    logits = {}
    for activation in ("gelu", checks._TANH):
        config = checks._config("torch").changed(model={"hidden_act": activation})
        with checks._engine(config) as engine:
            computed = engine.predict(checks.images()).double().numpy()
        logits[activation] = np.round(computed, 8).tolist()
    losses = [round(loss, 8) for loss in checks.first_losses()]
    return checks.Environment(checks.installed_versions(), logits, losses)


def write_hashes(folder: Path = FOLDER) -> None:
    """Write the hashes of the other files."""
    from cxr_vit.checkpoint_files import sha256
    from cxr_vit.commands.selftest_checks import HASHES

    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != HASHES)
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    (folder / HASHES).write_text(json.dumps(hashes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    {"files": write_files, "expected": write_expected}[sys.argv[1]]()
    write_hashes()
