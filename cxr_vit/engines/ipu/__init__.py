"""Graphcore IPUs through PopTorch."""
