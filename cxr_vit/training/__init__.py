"""The loop and what hangs on it. Importing this package imports no torch."""
