"""`siglip-serve search`: search in stored embeddings."""
