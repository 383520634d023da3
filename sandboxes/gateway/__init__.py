"""The gateway: the one process of a node that speaks with guests on behalf of web and workers.

Inward (here): an HTTP relay. A request signed with the node key goes to the guest of the sandbox it names,
byte for byte and with back-pressure. It holds no vault key, no Docker, and believes nothing that a sandbox's
folder holds.
"""
