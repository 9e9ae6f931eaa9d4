"""Conformance: does any server of embeddings compute what its checkpoint says, and if not, why?

`python -m validate.conformance URL --api openai --checkpoint DIR` asks for texts and pictures, and compares
the vectors with those of transformers. For each known fault it computes the vectors that the fault would
give, and names the faults that fit.
"""
