"""What a run will need, before it starts: memory, FLOPs and bytes over the wire, as formulas.

Nothing here has seen a device; the numbers that go in are counted from a model and its packed
buffers, and tests hold the formulas to what torch measures.
"""
