"""Stands for Horovod in processes of a test, which have nothing but a folder in common."""
