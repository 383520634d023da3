"""A VNC server for a sandbox, of the standard library: one grey screen, and a note of who typed and pointed."""

from __future__ import annotations

SOURCE = r"""
import socket, struct, threading

W, H = 64, 48
FORMAT = struct.pack("!BBBBHHHBBBxxx", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)


def exactly(sock, size):
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def serve(sock):
    try:
        sock.sendall(b"RFB 003.008\n")
        exactly(sock, 12)
        sock.sendall(b"\x01\x01")
        exactly(sock, 1)
        sock.sendall(bytes(4))
        note("shared %d" % exactly(sock, 1)[0])
        sock.sendall(struct.pack("!HH", W, H) + FORMAT + struct.pack("!I", 4) + b"test")
        while True:
            kind = exactly(sock, 1)[0]
            if kind == 0:
                exactly(sock, 19)
            elif kind == 2:
                exactly(sock, 4 * struct.unpack("!xH", exactly(sock, 3))[0])
            elif kind == 3:
                is_more = exactly(sock, 9)[0]
                if not is_more:
                    sock.sendall(struct.pack("!BxHHHHHi", 0, 1, 0, 0, W, H, 0) + b"\x80" * (W * H * 4))
            elif kind == 4:
                note("key %d" % struct.unpack("!BxxI", exactly(sock, 7))[1])
            elif kind == 5:
                exactly(sock, 5)
                note("pointer")
            elif kind == 6:
                exactly(sock, struct.unpack("!xxxI", exactly(sock, 7))[0])
                note("clipboard")
            else:
                note("other %d" % kind)
                return
    except (EOFError, OSError):
        pass
    finally:
        sock.close()


def note(text):
    with open("noted", "a") as notes:
        notes.write(text + "\n")


listener = socket.create_server(("127.0.0.1", 5900))
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
