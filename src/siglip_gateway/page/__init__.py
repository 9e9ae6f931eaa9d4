"""The page at `/`, on which a person tries the server in a browser. It calls the gateway's own APIs."""
