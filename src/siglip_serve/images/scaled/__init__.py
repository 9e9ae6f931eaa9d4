"""Plain JPEGs read at a fraction of their size, for pictures that are resized to far fewer pixels anyway."""
