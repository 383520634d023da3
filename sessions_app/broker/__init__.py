"""The model broker: model calls of programs inside sandboxes, with the tenant's key, which never goes in.

A process of its own. Gateways hand it a sandbox's HTTP request with the sandbox's name, signed; it knows the session,
its key, its budget and its vendor, and streams the answer. It touches neither Docker nor a sandbox's socket.
"""
