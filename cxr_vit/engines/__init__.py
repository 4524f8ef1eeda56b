"""The engines: where a model runs."""
