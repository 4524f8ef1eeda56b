"""Train a model: the command `cxr-vit train`, which is cxr_vit/commands/train.py.

python train.py --config configs/vit_demo.yaml [more.yaml ...] [section.key=value ...]
python train.py --resume runs/<name>
python train.py --config configs/vit_pod4.yaml --compile-only
"""

from cxr_vit.cli import run
from cxr_vit.commands.train import main

if __name__ == "__main__":
    run(main)
