"""The towers of SigLIP, NaFlex and CLIP, one family per file, each readable from top to bottom."""
