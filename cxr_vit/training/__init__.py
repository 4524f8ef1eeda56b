"""Training loop, callbacks, checkpoints and run folders."""
