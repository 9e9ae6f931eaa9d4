"""Read checkpoints: their files and what their JSON says."""
