"""A script without `if __name__ == "__main__":` builds a cache in several processes."""

import os
import subprocess
import sys
from pathlib import Path

from cxr_vit.data.synthetic.dataset import write_sample

ROOT = Path(__file__).resolve().parents[2]
#: More images than one process decodes alone.
IMAGES = 300
SCRIPT = """
import cxr_vit
config = cxr_vit.load_config([], ["data.root={root}", "data.image_size=32", "data.cache_workers=2"])
data = cxr_vit.ChestXrayDataModule(config)
data.setup()
print("images:", len(data.records))
"""


def test_script_is_not_run_again_by_the_processes_that_decode(tmp_path):
    root = tmp_path / "nih"
    write_sample(root, num_images=IMAGES, image_size=32)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=root))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"images: {IMAGES}\n"
