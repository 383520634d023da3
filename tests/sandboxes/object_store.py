"""A real S3-protocol server, over real HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moto.server import ThreadedMotoServer

from e2a.settings.environment import StoragePlace

BUCKET = "kept-files"


@contextmanager
def object_store() -> Iterator[StoragePlace]:
    """An empty bucket of it."""
    import boto3

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    place = StoragePlace(
        bucket=BUCKET,
        prefix="some/where",
        endpoint=f"http://{host}:{port}",
        region="us-east-1",
        access_key="planted-access",
        secret_key="planted-secret",
    )
    client: Any = boto3.client(
        "s3",
        endpoint_url=place.endpoint,
        region_name=place.region,
        aws_access_key_id="x",
        aws_secret_access_key="y",
    )
    client.create_bucket(Bucket=BUCKET)
    try:
        yield place
    finally:
        for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
            client.delete_object(Bucket=BUCKET, Key=found["Key"])
        client.delete_bucket(Bucket=BUCKET)
        server.stop()
