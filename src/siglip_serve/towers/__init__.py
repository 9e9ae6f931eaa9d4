"""SigLIP's and CLIP's towers, one family per file, as they are read top to bottom."""
