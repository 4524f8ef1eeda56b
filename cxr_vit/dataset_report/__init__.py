"""The report of a data set: counts, figures, one HTML page."""
