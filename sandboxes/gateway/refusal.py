"""The proxy's own answer to a program."""


class Refusal(Exception):
    """`status` of HTTP, `code` for programs, `detail` for people."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code
        self.detail = detail
