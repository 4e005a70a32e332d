"""What Google's own client asks of Cloud Storage, over a folder: tokens, and objects with their checksum.

The client is real; so is its way to the objects, with the credentials of a service account. moto, which
stands for S3 in the other tests, does not speak this interface.
"""

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

BUCKET = "shards"


class GoogleStore:
    """The server. ``faults`` maps the end of an object's name to what its next requests meet, in order.

    A number is an HTTP status; ``flip``: one byte is another, and the checksum that of the change;
    ``cut``: the connection ends within the body.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: dict[str, list[str]] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, credentials: Path) -> Mapping[str, str]:
        """Write credentials; return the variables by which the client finds them and this server."""
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        pem = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        account = {
            "type": "service_account", "project_id": "project", "private_key_id": "1",
            "private_key": pem.decode(), "client_email": "a@project.iam.gserviceaccount.com",
            "client_id": "1", "token_uri": f"{self.url}/token",
        }  # fmt: skip
        credentials.write_text(json.dumps(account))
        return {
            "GOOGLE_APPLICATION_CREDENTIALS": str(credentials),
            "STORAGE_EMULATOR_HOST": self.url,
        }

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()

    def next_fault(self, name: str) -> str:
        """Return what this request of an object meets; empty: nothing."""
        for end, faults in self.faults.items():
            if name.endswith(end) and faults:
                return faults.pop(0)
        return ""


def _handler(store: GoogleStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            assert self.path == "/token" and "assertion" in asked
            answer = {"access_token": "secret", "expires_in": 3600, "token_type": "Bearer"}
            self._answer(200, json.dumps(answer).encode())

        def do_GET(self) -> None:
            path = urlparse(self.path).path
            name = unquote(path.removeprefix(f"/download/storage/v1/b/{BUCKET}/o/"))
            store.requests.append(name)
            fault = store.next_fault(name)
            if self.headers.get("Authorization") != "Bearer secret":
                self._answer(401, b"")
            elif fault.isdigit():
                self._answer(int(fault), b"")
            elif not (store.folder / name).is_file():
                self._answer(404, b"No such object")
            else:
                self._send((store.folder / name).read_bytes(), fault)

        def _send(self, content: bytes, fault: str) -> None:
            if fault == "flip":
                content = bytes([content[0] ^ 1]) + content[1:]
            self._answer(200, content, sent=len(content) // 2 if fault == "cut" else None)

        def _answer(self, status: int, content: bytes, sent: int | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            md5 = hashlib.md5(content, usedforsecurity=False).digest()
            self.send_header("X-Goog-Hash", f"md5={base64.b64encode(md5).decode()}")
            self.end_headers()
            self.wfile.write(content[:sent])
            self.close_connection = sent is not None

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler
