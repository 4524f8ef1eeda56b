"""Score a split with a checkpoint: the command `cxr-vit evaluate`, cxr_vit/commands/evaluate.py.

python evaluate.py --checkpoint runs/<name> [--split test] [--out DIR]
"""

from cxr_vit.cli import run
from cxr_vit.commands.evaluate import main

if __name__ == "__main__":
    run(main)
