"""`moe-train profile`: where the time of a training step goes, on CPUs and GPUs."""
