"""Show where in a picture a prompt's score comes from."""
