"""Previews: HTTP and WebSocket of a server inside a sandbox, on an origin of its own.

A preview's host never reaches our pages and API, and theirs never reaches a preview (`app.PreviewGate`).
"""
