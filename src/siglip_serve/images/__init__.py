"""Turn image files into the pixels that a tower takes."""
