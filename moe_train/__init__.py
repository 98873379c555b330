"""The training program: model, training loop, checkpoints, conversion and the `moe-train` command.

Importing this package costs nothing: it imports neither torch nor megatron-core. Import its modules by name.
"""

__version__ = "0.1.0"
