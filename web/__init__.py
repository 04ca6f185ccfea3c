"""The HTTP API: who may ask, and in what words."""
