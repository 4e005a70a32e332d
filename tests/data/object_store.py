"""A real S3-compatible server (moto, in its own process) behind a proxy that misbehaves on request."""

import base64
import hashlib
import http.client
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_eso.launch.processes import free_port

BUCKET = "shards"
PASSED_ON = (
    "Authorization",
    "X-Amz-Date",
    "X-Amz-Content-SHA256",
    "Content-MD5",
    "Host",
    "If-None-Match",
)


class ObjectStore:
    """The server, the proxy, and the faults that the proxy shows next.

    ``faults`` maps the end of an object's name to what its next requests meet, in order: ``404``,
    ``403``, ``503``, ``stall`` (no byte of the body comes), ``trickle``, ``cut`` (the connection ends
    within the body), ``short`` (a shorter object), ``flip`` (one byte is another, on its way here or
    there). A trailing ``!`` makes a fault last. Like S3 and unlike moto, the proxy refuses an upload
    that does not have the MD5 it states.
    """

    def __init__(self) -> None:
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self._server_port = free_port()
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "moto.server",
            "-p",
            str(self._server_port),
        ]
        quiet = subprocess.DEVNULL
        self._server = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        self._proxy = _proxy(self, self._server_port)
        threading.Thread(target=self._proxy.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._proxy.server_address[1]}"
        self._wait()

    def upload(self, folder: Path, prefix: str) -> str:
        """Store a folder's files and return their address."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self._put(
                    f"/{BUCKET}/{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes()
                )
        return f"s3://{BUCKET}/{prefix}"

    def close(self) -> None:
        """End the server and the proxy."""
        self._proxy.shutdown()
        self._proxy.server_close()
        self._server.kill()
        self._server.wait()

    def _put(self, path: str, body: bytes) -> None:
        self._ask("PUT", path, body)

    def _ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._server_port, timeout=30)
        connection.request(method, path, body, _authorized())
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        assert answer.status == 200, (method, path, answer.status)
        return content

    def _wait(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                return self._put(f"/{BUCKET}", b"")
            except OSError:
                assert time.monotonic() < deadline, "moto did not start"
                time.sleep(0.1)

    def names(self, prefix: str) -> list[str]:
        """Return the names of the objects below a prefix."""
        found = self._ask("GET", f"/{BUCKET}?list-type=2&prefix={prefix}/").decode()
        return re.findall(f"<Key>{prefix}/([^<]*)</Key>", found)

    def require_credentials(self, *, is_required: bool) -> None:
        """Let moto check signatures, or accept any."""
        self._ask("POST", "/moto-api/reset-auth", b"0" if is_required else b"inf")

    def next_fault(self, method: str, path: str) -> str:
        """Return what this request meets and forget it."""
        self.requests.append(f"{method} {path}")
        for name, faults in self.faults.items():
            if path.split("?")[0].endswith(name) and faults:
                return faults[0] if faults[0].endswith("!") else faults.pop(0)
        return ""


def environment(store: ObjectStore) -> dict[str, str]:
    """Return the settings with which boto3 finds the store."""
    return {
        "S3_ENDPOINT_URL": store.url,
        "GCS_ENDPOINT_URL": store.url,
        "GCS_KEY": "key",
        "GCS_SECRET": "secret",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
        "HOME": os.environ.get("HOME", "/"),
    }


def _proxy(store: ObjectStore, server_port: int) -> ThreadingHTTPServer:
    bound = type("Proxy", (_Proxy,), {"store": store, "server_port": server_port})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads = True
    return server


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: ObjectStore
    server_port: int

    def do_GET(self) -> None:
        fault = self.store.next_fault(self.command, self.path).removesuffix("!")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault.isdigit():
            return self._answer(int(fault), b"<Error><Code>Fault</Code></Error>", "")
        if body and fault == "flip":
            body, fault = body[:-1] + bytes([body[-1] ^ 1]), ""
        md5 = base64.b64encode(hashlib.md5(body).digest()).decode()
        if self.headers.get("Content-MD5", md5) != md5:
            return self._answer(400, b"<Error><Code>BadDigest</Code></Error>", "")
        connection = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=30)
        signed = {name: self.headers[name] for name in PASSED_ON if name in self.headers}
        connection.request(self.command, self.path, body, signed)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        self._answer(answer.status, body, fault)

    do_PUT = do_DELETE = do_POST = do_GET  # noqa: N815

    def _answer(self, status: int, body: bytes, fault: str) -> None:
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "flip":
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.send_response(status)
        self.send_header("Content-Type", "application/xml" if status != 200 else "binary/octet")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault not in ("stall", "cut", "trickle"):
            self.wfile.write(body)
            return
        self.close_connection = True
        for chunk in _partly(body, fault):
            self.wfile.write(chunk)

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    def handle(self) -> None:
        try:
            super().handle()
        except OSError:
            pass  # the client gave up, as it should


def _partly(body: bytes, fault: str) -> Iterator[bytes]:
    if fault == "cut":
        yield body[: len(body) // 2]
    elif fault == "stall":
        time.sleep(4)
    else:
        for byte in body[:40]:
            yield bytes([byte])
            time.sleep(0.1)


def _authorized() -> dict[str, str]:
    credential = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"
    return {"Authorization": f"{credential}, SignedHeaders=host, Signature=0"}
