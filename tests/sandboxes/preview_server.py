"""A server for a sandbox, of the standard library: it tells what it was asked, and misbehaves by path."""

from __future__ import annotations

PORT = 8123

SOURCE = r'''
import base64, hashlib, http.server, json, socket, struct, threading

lock = threading.Condition()
events, readers = [0], [0]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def tell(self, status=200, headers=(), body=None):
        if body is None:
            document = {"method": self.command, "path": self.path,
                        "headers": {k.lower(): v for k, v in self.headers.items()}}
            body = json.dumps(document).encode()
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left:
                piece = self.rfile.read(min(left, 65536))
                left -= len(piece)
                yield piece

    def answer(self):
        path, _, query = self.path.partition("?")
        if path == "/upload":
            digest, size = hashlib.sha256(), 0
            for piece in self.body():
                digest.update(piece)
                size += len(piece)
            self.tell(body=json.dumps({"size": size, "sha256": digest.hexdigest()}).encode())
        elif path == "/refuse-early":
            self.tell(413, [("Connection", "close")], b"too much")
            self.close_connection = True
        elif path == "/download":
            self.tell(body=b"x" * int(query))
        elif path == "/broken":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
            self.close_connection = True
        elif path == "/cookies":
            self.tell(headers=[("Set-Cookie", "a=1; Domain=localhost; Path=/"),
                               ("Set-Cookie", "b=2; domain=.example.com; HttpOnly"),
                               ("Set-Cookie", "__Host-e2a-preview=evil; Path=/; Secure"),
                               ("Set-Cookie", "e2a-session=evil")])
        elif path == "/bad-headers":
            self.tell(headers=[("Clear-Site-Data", '"cookies"'), ("Alt-Svc", "h3=evil:443"),
                               ("X-Accel-Redirect", "/etc/passwd"), ("X-Sendfile", "/etc/passwd"),
                               ("X-Request-Id", "mine"), ("Keep-Alive", "timeout=5"),
                               ("Content-Security-Policy", "default-src 'none'")])
        elif path == "/redirect":
            self.tell(302, [("Location", "http://localhost:8123/hello?x=1")], b"")
        elif path == "/redirect-away":
            self.tell(302, [("Location", "https://example.org/")], b"")
        elif path == "/empty":
            self.tell(204)
        elif path == "/not-modified":
            self.tell(304, [("Content-Length", "77")])
        elif path == "/not-http":
            self.wfile.write(b"\x00\x01\x02 hello\r\n\r\n")
            self.close_connection = True
        elif path == "/page":
            self.tell(headers=[("Content-Type", "text/html")], body=PAGE)
        elif path == "/events":
            self.stream()
        elif path == "/next-event":
            with lock:
                events[0] += 1
                lock.notify_all()
            self.tell()
        elif path == "/event-readers":
            self.tell(body=json.dumps(readers[0]).encode())
        elif path == "/socket":
            self.talk(query)
        else:
            self.tell()

    do_GET = do_POST = do_HEAD = do_PROPFIND = do_OPTIONS = do_PUT = answer

    def stream(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        readers[0] += 1
        seen = events[0] - 1
        try:
            while True:
                with lock:
                    lock.wait_for(lambda: events[0] > seen, 0.1)
                if events[0] > seen:
                    seen += 1
                    self.wfile.write(b"data: %d\n" % seen)
                    self.wfile.flush()
                    with lock:
                        lock.wait_for(lambda: events[0] > seen, 10)
                    self.wfile.write(b"\n")
                else:
                    self.wfile.write(b": still here\n\n")
        except OSError:
            pass
        finally:
            readers[0] -= 1

    def talk(self, query):
        """An echo by RFC 6455; `close=N` closes with that code, `tell` answers with the request's headers."""
        key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        if query == "refuse":
            self.tell(403, body=b"not you")
            return
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept)
        if "chat" in self.headers.get("Sec-WebSocket-Protocol", ""):
            self.send_header("Sec-WebSocket-Protocol", "chat")
        self.end_headers()
        self.close_connection = True
        if query == "tell":
            self.frame(1, json.dumps({k.lower(): v for k, v in self.headers.items()}).encode())
        if query.startswith("close="):
            self.frame(8, struct.pack("!H", int(query[6:])) + b"over")
            return
        while True:
            head = self.rfile.read(2)
            if len(head) < 2:
                return
            kind, size = head[0] & 15, head[1] & 127
            if size == 126:
                size, = struct.unpack("!H", self.rfile.read(2))
            elif size == 127:
                size, = struct.unpack("!Q", self.rfile.read(8))
            mask = self.rfile.read(4)
            data = self.rfile.read(size)
            data = bytes(b ^ m for b, m in zip(data, mask * (size // 4 + 1)))
            self.frame(kind, data)
            if kind == 8:
                return

    def frame(self, kind, data):
        size = len(data)
        head = bytes([128 | kind])
        head += bytes([size]) if size < 126 else b"\x7e" + struct.pack("!H", size) if size < 65536 else (
            b"\x7f" + struct.pack("!Q", size))
        self.wfile.write(head + data)
        self.wfile.flush()


PAGE = b"""<!doctype html><title>Inside</title><h1>Inside</h1><p id=said></p><script>
const socket = new WebSocket(location.origin.replace("http", "ws") + "/socket")
socket.onopen = () => socket.send("hello")
socket.onmessage = (event) => { document.getElementById("said").textContent = "echo: " + event.data }
</script>"""


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 128


Server(("127.0.0.1", 8123), Handler).serve_forever()
'''
