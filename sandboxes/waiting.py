"""Before a wait that may be long, a request gives its database connection back."""

from __future__ import annotations

from django.db import connection


def database_release() -> None:
    """Give the connection back to its pool; the next query takes one again. Does nothing inside a
    transaction.

    Only where there is a pool to give it back to: a SQLite connection holds nothing between transactions, and
    opening one anew costs a millisecond.
    """
    if connection.vendor == "postgresql" and not connection.in_atomic_block:
        connection.close()
