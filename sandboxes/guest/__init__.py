"""The program that is PID 1 in every sandbox; PROTOCOL.md in this folder is its protocol."""
