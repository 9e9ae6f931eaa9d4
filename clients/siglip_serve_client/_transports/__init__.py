"""Ways to the server: gRPC and HTTP."""
