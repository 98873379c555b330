"""The training loop and what it needs: optimizer, learning-rate schedule, metrics. Importing the package
imports nothing."""
