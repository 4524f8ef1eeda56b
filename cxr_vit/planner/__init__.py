"""The planner: what a configuration will take and how fast it will be, before it runs.

Importing this package imports no torch.
"""
