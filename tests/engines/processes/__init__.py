"""Runs of several real processes, as torchrun starts them."""
