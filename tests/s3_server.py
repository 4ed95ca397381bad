"""A real S3 server on this machine, rclone's, behind a proxy that can be slow, cut answers off, or refuse to answer."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import sysconfig
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from backprompt.store.object import ObjectStore

ACCESS_KEY, SECRET_KEY, BUCKET = "ACCESSKEY1", "SECRETKEY1", "bucket"


def rclone():
    """The program, or None where it is not installed."""
    beside = shutil.which("rclone", path=sysconfig.get_path("scripts"))
    return beside or shutil.which("rclone")


class Server(ThreadingHTTPServer):
    """Passes requests on to rclone, and answers back, as its attributes say."""

    daemon_threads = True

    def __init__(self, upstream):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = upstream
        self.delay_seconds = 0.0
        self.cuts = False  # answers end in the middle of their content
        self.refuses = False  # every answer is "503 Slow Down"
        self.num_bytes = 0  # of contents that were passed back
        self.requests = []  # method and path of each, in order

    def store(self, prefix="prompts", secret=SECRET_KEY, **options):
        config = {
            "endpoint": f"http://127.0.0.1:{self.server_port}",
            "access_key_id": ACCESS_KEY,
            "secret_access_key": secret,
            "region": "us-east-1",
        }
        quick = {"client_options": {"allow_http": True, "timeout": "2s"}, "retry_config": {"max_retries": 0}}
        return ObjectStore(f"s3://{BUCKET}/{prefix}", config=config, **{**quick, **options})

    def handle_error(self, request, client_address):
        """A client that has waited for long enough is gone: nobody is left to answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def pass_on(self):
        server = self.server
        server.requests.append((self.command, self.path))
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(server.delay_seconds)
        if server.refuses:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        connection = http.client.HTTPConnection("127.0.0.1", server.upstream)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        server.num_bytes += len(content)
        # rclone answers a part of an object with 200; S3 and others with 206.
        self.send_response_only(206 if answer.getheader("Content-Range") else answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.send_header("Content-Length", answer.getheader("Content-Length", str(len(content))))
        self.end_headers()
        if server.cuts and content:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on

    def log_message(self, *_):
        pass


@contextmanager
def serving(folder: Path):
    """Serve the folder's subfolders as buckets, until the end of the block."""
    (folder / BUCKET).mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [rclone(), "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    process = subprocess.Popen(
        [*command, "--config", "", "--vfs-cache-mode", "full", "--cache-dir", f"{folder}-cache", str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = Server(port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.05)
        yield server
    finally:
        server.shutdown()
        server.server_close()
        process.terminate()
        process.wait(10)
