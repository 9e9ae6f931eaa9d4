"""Answer Triton's requests: one file per model prefix, one class per Python model of the repository."""
