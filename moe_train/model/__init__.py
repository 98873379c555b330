"""The network: its configuration, and blocks built out of megatron-core's tensor-parallel layers.

Importing the package imports nothing; `moe_train.model.config` and `moe_train.model.flops` need no torch.
"""
