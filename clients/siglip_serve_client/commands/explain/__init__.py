"""`siglip-serve explain`: heatmaps of prompts as one picture."""
