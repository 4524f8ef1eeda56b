"""Tests of the stand-in, most of them also on PopTorch's real Python front end."""
