"""`siglip-serve embed`: embeddings of any number of images in one file."""
