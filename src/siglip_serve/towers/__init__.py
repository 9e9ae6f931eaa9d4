"""The towers of SigLIP and CLIP, one family per file, each readable from top to bottom."""
