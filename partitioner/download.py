"""One file over HTTP that survives cut connections, killed processes and full disks.

Bytes go to NAME.part and are kept there; a later call asks for the rest. Only a file whose checksum is right gets its
name. Proxies and CAs are those of the environment (http_proxy, https_proxy, no_proxy, SSL_CERT_FILE, SSL_CERT_DIR).
"""

from __future__ import annotations

import base64
import errno
import http.client
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

from edgecloud.errors import FetchError
from edgecloud.fingerprint import sha256_file

CHUNK_BYTES = 1 << 18
MAX_FRUITLESS_ATTEMPTS = 4  # in a row; an attempt that brings bytes starts the count anew
TIMEOUT_S = 30.0
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int], None]  # bytes so far, bytes in all


def download(
    url: str, path: Path, *, sha256: str, num_bytes: int, progress: Progress | None = None, retry_wait_s: float = 1.0
) -> None:
    """Fetch `url` to `path`, going on where an earlier call was cut off.

    Raises:
        FetchError: unreachable after bounded retries, refused, no room on the disk, or other bytes than `sha256`
            promises (the broken file is then removed).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    fruitless = 0
    while (start := _size(part)) < num_bytes:
        try:
            _append(url, part, num_bytes, progress)
            reason = "the connection closed early"
        except urllib.error.HTTPError as error:
            reason = f"the server answers {error.code} {error.reason}"
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink(missing_ok=True)
            elif error.code < 500 and error.code not in (408, 429):  # the request itself is refused
                raise FetchError(f"{path.name} cannot be downloaded from {public_address(url)}: {reason}") from error
        except (http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise FetchError(
                    f"no room for {part}: {num_bytes - _size(part)} bytes are still to come; free some space and run it again"
                ) from error
            reason = str(getattr(error, "reason", None) or error or type(error).__name__)
        if _size(part) > start:
            fruitless = 0
            continue
        fruitless += 1
        if fruitless == MAX_FRUITLESS_ATTEMPTS:
            raise FetchError(
                f"{path.name} cannot be downloaded from {public_address(url)}: {reason}; "
                f"{_size(part)} of {num_bytes} bytes are kept, run it again to go on"
            )
        time.sleep(retry_wait_s * 2 ** (fruitless - 1))
    found = sha256_file(part)
    if found != sha256 or _size(part) != num_bytes:
        size = _size(part)
        part.unlink()
        raise FetchError(
            f"{path.name} from {public_address(url)} is broken: SHA-256 {found} ({size} bytes), "
            f"expected {sha256} ({num_bytes} bytes); "
            "it was removed, run it again to download it anew"
        )
    part.replace(path)
    fsync_folder(path.parent)


def read_page(url: str, accept: str) -> tuple[str, str]:
    """A small page: its media type and text. Raises OSError and http.client.HTTPException."""
    with _open(url, {"Accept": accept}) as response:
        return response.headers.get_content_type(), response.read().decode("utf-8", "replace")


def fsync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def public_address(url: str) -> str:
    """The address without user name and password."""
    parts = urllib.parse.urlsplit(url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _append(url: str, part: Path, num_bytes: int, progress: Progress | None) -> None:
    start = _size(part)
    with _open(url, {"Range": f"bytes={start}-", "Accept-Encoding": "identity"} if start else {}) as response:
        if start and not (response.headers.get("Content-Range") or "").startswith(f"bytes {start}-"):
            start = 0  # the server sends the whole file, or another range than asked for: begin again
            if response.status == http.HTTPStatus.PARTIAL_CONTENT:
                part.unlink()
                return
        with part.open("r+b" if start else "wb") as file:
            file.seek(start)
            done = start
            while done < num_bytes and (chunk := response.read(CHUNK_BYTES)):
                file.write(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, num_bytes)
            file.flush()
            os.fsync(file.fileno())


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise FetchError(f"{public_address(url)} is no http or https address")
    request = urllib.request.Request(public_address(url), headers=headers)  # noqa: S310  # scheme checked above
    if parts.username is not None:
        pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        request.add_unredirected_header("Authorization", "Basic " + base64.b64encode(pair.encode()).decode())
    response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    return response


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
