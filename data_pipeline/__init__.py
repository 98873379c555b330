"""From raw text to batches.

    prepare (tokenise) -> source (one corpus on disk) -> mixture and ledger (n -> sample) -> loader

The package needs numpy only (no torch, no megatron-core) and knows nothing of the model or of process groups.
Import its modules by name, for example ``from data_pipeline.stream import SampleStream``.
"""
