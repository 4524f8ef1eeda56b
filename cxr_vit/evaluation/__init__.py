"""Scores, predictions and figures. Importing this package imports no torch."""
