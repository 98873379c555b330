"""Plan a run before paying for it: compute-optimal size, memory, layout, cost. Needs neither torch nor
megatron-core."""
