"""Label CSV, splits, images and batches. Importing this package imports no torch."""
