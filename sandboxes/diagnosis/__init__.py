"""Looks at this host as a place for sandboxes: engine, machine, images, nodes. See `e2a.core.diagnosis`."""
