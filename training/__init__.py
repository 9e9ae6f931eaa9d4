"""What made `checkpoints/siglip-tiny` and the offline benchmark; see README.md."""
