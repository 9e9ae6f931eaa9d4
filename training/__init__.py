"""Training of `checkpoints/siglip-tiny`, and the offline benchmark. README.md tells how to run it."""
