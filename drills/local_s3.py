"""An S3 server on this machine, which tells of every write before it takes it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

BUCKET = "bucket"
_KEY = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing"}


@contextmanager
def local_s3(
    on_write: Callable[[str, str], object] = lambda path, moment: None,
) -> Iterator[Mapping[str, str]]:
    """Serve one empty bucket; needs moto with its server, and boto3, which moto brings.

    Args:
        on_write: called with the path of each object and the moment, "before" or "after" it is
            written; in a thread of the server.

    Returns:
        What a process needs in its environment to find the server.
    """
    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app: Any = DomainDispatcherApplication(create_backend_app)

    def telling(environ: dict[str, Any], start_response: Any) -> Any:
        if environ["REQUEST_METHOD"] != "PUT":
            return app(environ, start_response)
        path = environ["PATH_INFO"].removeprefix(f"/{BUCKET}/")
        on_write(path, "before")
        answer = list(app(environ, start_response))
        on_write(path, "after")
        return answer

    server = make_server("127.0.0.1", 0, telling, threaded=True)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        client = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id=_KEY["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=_KEY["AWS_SECRET_ACCESS_KEY"],
        )
        client.create_bucket(Bucket=BUCKET)
        yield {**_KEY, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
