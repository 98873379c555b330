"""Starting a run elsewhere: on this machine, on Slurm. Needs neither torch nor megatron-core (a login node
has neither)."""
