"""SigLIP Serve: the library that the Triton models import."""

__version__ = "0.1.0"
