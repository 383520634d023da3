"""Adapters to what runs sandboxes: one Protocol (`base`), the Docker engine, and a plain child process."""
