"""The demo: real text from this machine, a small JetMoE trained on it, and a report. `python -m
moe_train.demo`."""
