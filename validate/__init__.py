"""Validation that anyone can repeat, over the wire, against any server that speaks the contract.

`python -m validate.siglip_vision --data DIR` prints the published accuracy table for an ImageNet-shaped
folder; `python -m validate.parity --data DIR --checkpoint CHECKPOINT` compares the server with
transformers in this process. Nothing here imports the server: only its evaluation maths
(`zero_shot`, `knn`, `metrics`), which are pure functions.
"""
