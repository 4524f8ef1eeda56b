"""A stand-in for Horovod in processes of a test, which share only a folder."""
