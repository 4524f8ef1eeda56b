"""The commands about data sets: `prepare`, `sample` and `data-report`."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

from cxr_vit.cli import COMMANDS, Parser, config_parser, files_and_overrides
from cxr_vit.config import load_config
from cxr_vit.data.text_files import check_data_root


def prepare(argv: Sequence[str]) -> int:
    """Build or verify the cache of images; return the exit status."""
    parser = config_parser("prepare", description=COMMANDS["prepare"].summary)
    text = "check every image of the cache, by its checksum and against its file"
    parser.add_argument("--verify", action="store_true", help=text)
    arguments = parser.parse(argv)
    data = load_config(*files_and_overrides(arguments)).data
    check_data_root(data)  # before torch is imported

    from cxr_vit.data.datamodule import prepare as prepare_cache
    from cxr_vit.data.datamodule import verify_cache
    from cxr_vit.data.synthetic.dataset import write_sample_if_absent

    write_sample_if_absent(data)
    print(verify_cache(data) if arguments.verify else prepare_cache(data))
    return 0


def sample(argv: Sequence[str]) -> int:
    """Write a synthetic data set; return the exit status."""
    parser = Parser("sample", description=COMMANDS["sample"].summary)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add("--images", type=int, default=2000, metavar="N", help="default: 2000")
    add("--size", type=int, default=128, metavar="PIXELS", help="side of an image; default: 128")
    add("--seed", type=int, default=0, help="same seed, same data set; default: 0")
    arguments = parser.parse(argv)

    from cxr_vit.data.synthetic.dataset import write_sample

    count = write_sample(
        arguments.out, num_images=arguments.images, image_size=arguments.size, seed=arguments.seed
    )
    print(f"{count} synthetic images in {arguments.out}; use them with data.root={arguments.out}")
    return 0


def data_report(argv: Sequence[str]) -> int:
    """Describe a data set, as text and as a page; return the exit status."""
    parser = config_parser("data-report", description=COMMANDS["data-report"].summary)
    name = "data_report.html"
    parser.add_argument("--out", type=Path, default=name, metavar="FILE", help=f"default: {name}")
    arguments = parser.parse(argv)
    config = load_config(*files_and_overrides(arguments))
    check_data_root(config.data)

    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.data.synthetic.dataset import write_sample_if_absent
    from cxr_vit.dataset_report.report import write_data_report

    write_sample_if_absent(config.data)
    # The report lists missing and unusable images, so neither may stop it.
    lenient = config.changed(data={"on_missing": "skip", "on_bad_image": "skip"})
    print(write_data_report(ChestXrayDataModule(lenient), arguments.out))
    print(f"page: {arguments.out}")
    return 0
