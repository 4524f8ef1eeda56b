"""Fine-tune Vision Transformers on chest X-rays, on Graphcore IPUs, CPUs and GPUs.

This package imports torch only when it is used, so that `--help` and a configuration error answer
at once.
"""

__version__ = "0.1.0"
