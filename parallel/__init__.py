"""Everything that knows about ranks and devices: layout, engine, CPU backend, expert dispatch, spawning.

It knows nothing of the model or of the data. `parallel.layout` and `parallel.spawn` need no torch; importing
the package imports nothing.
"""
