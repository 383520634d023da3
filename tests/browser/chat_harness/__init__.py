"""A scripted session server for tests of `<e2a-chat>`: speaks CONTRACT 6 and misbehaves on demand."""
