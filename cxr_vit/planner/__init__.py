"""Predict memory, time and speed of a configuration before it runs."""
