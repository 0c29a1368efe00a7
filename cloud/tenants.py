"""Who may use a service: a file of tenants, each with the SHA-256 of a token and a quota. The tokens themselves are nowhere.

Tokens are 256 random bits, so a plain hash is as safe as a slow one, and cheap enough for every request.
"""

from __future__ import annotations

import difflib
import hashlib
import hmac
import logging
import os
import re
import secrets
from dataclasses import dataclass, fields
from pathlib import Path

from edgecloud.cloud.quotas import Account, Quota
from edgecloud.errors import CloudAuthError, ConfigError

logger = logging.getLogger(__name__)

TOKEN_PREFIX = "ect_"  # noqa: S105  # lets scanners of leaked secrets recognise one
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"sha256:([0-9a-f]{64})")
_QUOTAS = [field.name for field in fields(Quota)]


@dataclass(frozen=True, slots=True)
class Entry:
    """One line: this token is this tenant's."""

    tenant: str
    digest: bytes = b""  # SHA-256 of the token
    quota: Quota = Quota()  # noqa: RUF009  # frozen


def new_token() -> str:
    """A bearer token of 256 random bits."""
    return TOKEN_PREFIX + secrets.token_urlsafe(32)


def token_line(tenant: str, token: str) -> str:
    """The line of a tokens file that lets this token in. Raises ConfigError when the tenant's name cannot be one."""
    _check_tenant(tenant)
    return f"{tenant} sha256:{hashlib.sha256(token.encode()).hexdigest()}"


def parse_tokens(text: str) -> list[Entry]:
    """The entries of a tokens file: lines `TENANT sha256:HEX [QUOTA=NUMBER ...]`, blank ones, and comments after `#`.

    A tenant may have several tokens, so that one can be replaced without a gap; its quota is the same on each line.

    Raises:
        ConfigError: names the line and the mend; never shows what might be a token.
    """
    entries: list[Entry] = []
    owners: dict[bytes, str] = {}  # by digest
    quotas: dict[str, Quota] = {}  # by tenant
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        try:
            entry = _entry(words)
            _check_fits_in(entry, owners, quotas)
        except ConfigError as error:
            raise ConfigError(f"line {number}: {error}") from error
        owners[entry.digest], quotas[entry.tenant] = entry.tenant, entry.quota
        entries.append(entry)
    if not entries:
        raise ConfigError("names no tenant, so nobody could come in; `edgecloud token TENANT` makes a line")
    return entries


def _entry(words: list[str]) -> Entry:
    tenant, *rest = words
    _check_tenant(tenant)
    digest = _SHA256.fullmatch(rest[0]) if rest else None
    if digest is None:
        raise ConfigError(f"{tenant} has no sha256:HEX of 64 hexadecimal digits after it; `edgecloud token {tenant}` makes a line")
    quota: dict[str, int] = {}
    for word in rest[1:]:
        name, _, value = word.partition("=")
        if name not in _QUOTAS:
            shown = f"unknown quota {name}" if re.fullmatch("[a-z_]{1,32}", name) else "a word that is no quota"  # a token, perhaps
            near = difflib.get_close_matches(name, _QUOTAS, 1, 0.0)[0]
            raise ConfigError(f"{shown}; it takes {', '.join(_QUOTAS)}, nearest is {near}")
        if name in quota:
            raise ConfigError(f"{name} is given twice; keep one")
        if not value.isascii() or not value.isdigit():
            raise ConfigError(f"{name} is {value!r}; it takes a whole number, as in {name}=8")
        quota[name] = int(value)
    return Entry(tenant, bytes.fromhex(digest[1]), Quota(**quota))


def _check_fits_in(entry: Entry, owners: dict[bytes, str], quotas: dict[str, Quota]) -> None:
    if entry.digest in owners:
        raise ConfigError(f"this token is in the file already, as {owners[entry.digest]}'s; make one for each line")
    if quotas.get(entry.tenant, entry.quota) != entry.quota:
        raise ConfigError(f"{entry.tenant} has another quota on a line before; give the same on each of its lines")


def _check_tenant(tenant: str) -> None:
    if not _TENANT.fullmatch(tenant):
        raise ConfigError("a tenant's name takes 1 to 64 letters, digits, '.', '_' and '-', and begins with a letter or digit")


class Tenants:
    """The tenants of a tokens file, as it is now: a changed file counts from the next request on.

    A file that has become unreadable or wrong changes nothing, and is logged once: a slip of the pen shuts nobody out.

    Raises:
        ConfigError: the file cannot be read, or is wrong, at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._accounts: dict[str, Account] = {}
        self._stamp = _stamp(path)
        self._entries = self._read()

    def account(self, token: str) -> Account:
        """Whose token this is. The time taken does not tell how near a wrong one came.

        Raises:
            CloudAuthError: nobody's.
        """
        self._refresh()
        digest = hashlib.sha256(token.encode()).digest()
        found = [entry for entry in self._entries if hmac.compare_digest(entry.digest, digest)]
        if not found:
            raise CloudAuthError("this token is not known here, or no longer; ask who runs the service for one")
        account = self._accounts.setdefault(found[0].tenant, Account(found[0].tenant))
        account.quota = found[0].quota
        return account

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._entries = self._read()
        except ConfigError as error:
            logger.error("the tokens file has changed and is wrong, the one before stays in force: %s", error)  # noqa: TRY400
        else:
            logger.info("the tokens file has changed: %d tokens", len(self._entries))

    def _read(self) -> list[Entry]:
        try:
            return parse_tokens(self._path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{self._path} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._path} is no text: byte {error.start} is not UTF-8; write it anew") from error
        except ConfigError as error:
            raise ConfigError(f"{self._path} {error}") from error


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes when the file does; None: it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
