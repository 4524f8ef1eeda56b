"""Stand-ins for software that the tests do without: PopTorch and popdist."""
