"""The container image: what its entrypoint does with a mode and environment variables."""
