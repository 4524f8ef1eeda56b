"""Tests of the IPU engine, on the stand-in and on PopTorch's real front end."""
