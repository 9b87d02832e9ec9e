"""An S3 service on this machine, by moto."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from moto.server import ThreadedMotoServer

SECRET = "sec-ret"


@dataclass
class S3:
    """The service: its address, the variables that lead to it, and a client."""

    url: str
    environment: dict[str, str]
    client: Any

    def put(self, folder: Path, key: str) -> None:
        """Stores a folder's files under a prefix of the bucket "adapters"."""
        for file in folder.iterdir():
            self.client.put_object(
                Bucket="adapters", Key=f"{key}/{file.name}", Body=file.read_bytes()
            )


@contextmanager
def s3() -> Iterator[S3]:
    """A service with the buckets "adapters" and "others"."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    client = boto3.client(
        "s3", endpoint_url=url, region_name="us-east-1",
        aws_access_key_id="key", aws_secret_access_key=SECRET,
    )  # fmt: skip
    for bucket in ("adapters", "adapters-others"):
        client.create_bucket(Bucket=bucket)
    try:
        yield S3(url, environment, client)
    finally:
        client.close()
        server.stop()
