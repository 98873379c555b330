"""Send tokens to their experts and bring the answers home: three ways of one plan's four trips.

A (token, slot) pair is a row of its own that comes back unsummed, because mixture-of-attention needs the query of every
slot separately; gates are applied at home. One plan, made from the router's choice, serves every trip of a layer.
"""
