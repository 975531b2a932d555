"""A stand-in for the hubs on this machine: one repository, served from a folder by Hugging Face's protocol and by
ModelScope's.
"""

import hashlib
import json
import socket
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serve(
    repo_id: str,
    folder: Path,
    break_once: str | None = None,
    slow: str | None = None,
    break_always: str | None = None,
    checksums: bool = True,
    damaged: str | None = None,
) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and a list that grows with the name of every file it sends ("NAME from BYTE" for a rest).

    The connection breaks in the middle of the file `break_once`, once, and of `break_always` whatever is asked of it;
    the file `slow` comes at some KB a second. Without `checksums` its lists have none; of
    the file `damaged` the last byte is another one.
    """
    to_break = [break_once]
    sent: list[str] = []
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    sums = {name: hashlib.sha256(data).hexdigest() if checksums else "" for name, data in files.items()}
    siblings = [{"type": "file", "path": n, "rfilename": n, "size": len(d), "oid": "0" * 40} for n, d in files.items()]
    tree = [dict(entry) for entry in siblings]
    if checksums:
        for entry in tree:
            entry["lfs"] = {"oid": sums[entry["path"]], "size": entry["size"], "pointerSize": 130}
    # ModelScope's list has folders too
    listed = [{"Type": "tree", "Path": "folder", "Name": "folder", "Size": 0}]
    listed += [{"Type": "blob", "Path": n, "Name": n, "Size": len(d), "Sha256": sums[n]} for n, d in files.items()]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body: bool) -> None:
            path, _, query = self.path.partition("?")
            if path.startswith(f"/api/v1/models/{repo_id}/repo"):
                return self.answer_as_modelscope(path, dict(urllib.parse.parse_qsl(query)), body)
            if path.startswith(f"/api/models/{repo_id}/tree/"):
                return self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, body)
            if path.startswith(f"/api/models/{repo_id}/revision/"):
                info = {"id": repo_id, "sha": COMMIT, "siblings": siblings}
                return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)
            name = path.removeprefix(f"/{repo_id}/resolve/{COMMIT}/")
            if name not in files:
                return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
            headers = {"X-Repo-Commit": COMMIT}
            if checksums:  # a mirror may send none
                headers["ETag"] = f'"{sums[name]}"'
            self.send_file(name, headers, body)

        def answer_as_modelscope(self, path: str, query: dict[str, str], body: bool) -> None:
            known = query.get("Revision") == "master"
            if known and path.endswith("/repo/files"):
                answer = {"Code": 200, "Success": True, "Data": {"Files": listed}}
                return self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
            if not known or query.get("FilePath") not in files:
                return self.reply(404, b'{"Code": 404, "Success": false}', {}, body)
            self.send_file(query["FilePath"], {}, body)

        def send_file(self, name: str, headers: dict[str, str], body: bool) -> None:
            data = files[name]
            if name == damaged:
                data = data[:-1] + bytes([data[-1] ^ 1])
            if not body:
                return self.reply(200, data, headers, body)
            if name == break_always:
                if self.headers.get("Range"):
                    return self.reply(500, b"", {}, body)
                return self.reply(200, data, headers, body, keep=len(data) // 2)
            if name in to_break:
                to_break.remove(name)
                return self.reply(200, data, headers, body, keep=len(data) // 2)
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
            sent.append(f"{name} from {start}" if start else name)
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(206 if start else 200, data[start:], headers, body, pause=0.5 if name == slow else 0)

        def reply(self, status: int, data: bytes, headers: dict[str, str], body: bool, keep=None, pause=0.0) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body and pause:
                for first in range(0, len(data), 2**14):
                    self.wfile.write(data[first : first + 2**14])
                    time.sleep(pause)
            elif body:
                self.wfile.write(data[:keep])
            if keep is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()
