"""Fine-tune Vision Transformers on chest X-rays, on Graphcore IPUs, CPUs and GPUs.

Importing this package imports no torch, so that `--help` and a configuration error answer at once.
"""

__version__ = "0.1.0"
