"""A synthetic data set in NIH ChestX-ray14's layout."""
