"""Probabilities of image files: what is given, what is read, what is written."""
