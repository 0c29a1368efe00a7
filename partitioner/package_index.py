"""Where a wheel lies, asked of the package index that pip is configured with (PEP 503 and PEP 691).

`pip download` itself would start a cut download from its beginning, and its dry run fetches the whole wheel before it
tells the address; so pip only says which index to ask.
"""

from __future__ import annotations

import html.parser
import http.client
import json
import os
import re
import subprocess
import sys
import urllib.parse

from edgecloud.errors import FetchError
from edgecloud.partitioner.download import public_address, read_page

ACCEPT = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
MEND = "name one with --index-url, or take --source hub"


def configured_index() -> str:
    """The index pip uses: its configuration, else its default. Raises FetchError if pip tells neither."""
    listed = _pip("config", "list")
    for scope in (":env:", "install", "global"):
        if found := re.search(rf"^{scope}\.index-url='(.+)'$", listed, re.MULTILINE):
            return found[1].split()[0]
    if found := re.search(r"--index-url <url>.*?\(default\s+(\S+?)\)", _pip("install", "--help"), re.DOTALL):
        return found[1]
    raise FetchError(f"pip names no package index; {MEND}")


def file_url(index_url: str, project: str, file_name: str) -> str:
    """The address of one file of a project.

    Raises:
        FetchError: the index cannot be reached, or does not list the file.
    """
    page_url = f"{index_url.rstrip('/')}/{project}/"
    shown = public_address(page_url)
    try:
        media_type, text = read_page(page_url, ACCEPT)
        links = _json_links(text) if media_type.endswith("+json") else _html_links(text)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise FetchError(f"the package index cannot be read at {shown}: {reason}; {MEND}") from error
    for name, url in links:
        if name == file_name:
            return urllib.parse.urljoin(page_url, url)
    raise FetchError(f"the package index at {shown} does not list {file_name}; {MEND}")


def _json_links(text: str) -> list[tuple[str, str]]:
    content = json.loads(text)
    try:
        return [(str(entry["filename"]), str(entry["url"])) for entry in content["files"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"no PEP 691 page: {error}") from error


def _html_links(text: str) -> list[tuple[str, str]]:
    parser = _Anchors()
    parser.feed(text)
    paths = [urllib.parse.urldefrag(href).url for href in parser.hrefs]
    return [(urllib.parse.unquote(path.rpartition("/")[2]), path) for path in paths]


class _Anchors(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hrefs += [value for key, value in attrs if tag == "a" and key == "href" and value]


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", *arguments]
    wide = {**os.environ, "COLUMNS": "1000"}  # the help text must not break an address
    return subprocess.run(command, capture_output=True, text=True, env=wide, check=False).stdout
