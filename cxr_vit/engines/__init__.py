"""Engines: train and score a model on one kind of device."""
