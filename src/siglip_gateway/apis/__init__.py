"""The APIs of the gateway, one module per dialect."""
