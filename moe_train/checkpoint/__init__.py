"""Sharded checkpoints: save, load, verify, keep. Importing the package imports nothing."""
