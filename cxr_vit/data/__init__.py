"""The data: labels, records, splits, images. Importing this package imports no torch."""
