"""Objects in a store below an address, s3://BUCKET/PATH or gs://BUCKET/PATH. The only module that
imports obstore.

Server and account come from the environment, as obstore documents: AWS_ACCESS_KEY_ID,
AWS_ENDPOINT_URL, GOOGLE_APPLICATION_CREDENTIALS and others, or the machine's own account."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from beyond_outliers.config.files import cache_root
from beyond_outliers.errors import Failure, WorkdirError
from beyond_outliers.types import PathLike

SCHEMES = ("s3", "gs")
RETRY_SECONDS = 30.0
# Words in an error's text -> what they mean to a person; the first match counts.
CREDENTIALS = (
  "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for s3, or "
  "GOOGLE_APPLICATION_CREDENTIALS, for gs, or use a machine that has an account of its own"
)
MEANINGS = {
  "NoSuchBucket": "there is no such bucket",
  "169.254.169.254": CREDENTIALS,
  "metadata.google.internal": CREDENTIALS,
  "Unauthenticated": CREDENTIALS,
  "401 Unauthorized": CREDENTIALS,
  "403 Forbidden": "access is denied to this account",
  "InvalidAccessKeyId": "access is denied to this account",
  "kind: Connect": "the server cannot be reached",
  "kind: Timeout": "the server does not answer",
}


class StoreError(Failure):
  """A store did not do what was asked, for lack of a network, permission, or space."""


class DeniedError(StoreError):
  """This account does not have the permission."""


class ChangedError(StoreError):
  """Someone else has created or changed the object in the meantime."""


def is_address(path: PathLike) -> bool:
  """Whether this is an address such as s3://BUCKET/PATH rather than a folder."""
  return "://" in os.fspath(path)


def parse_address(address: str) -> tuple[str, ...]:
  """(scheme, bucket, folders...). Errors: WorkdirError."""
  scheme, _, rest = address.partition("://")
  parts = rest.rstrip("/").split("/")
  if "@" in parts[0]:  # the message must not put a key into a log
    raise WorkdirError(
      f"{scheme}://...@{parts[0].rpartition('@')[2]}: an address takes neither user nor key; "
      "credentials are taken from the environment"
    )
  if scheme not in SCHEMES:
    raise WorkdirError(
      f"{address}: not an address of a known kind of store; expected a folder, or s3://BUCKET/PATH "
      "or gs://BUCKET/PATH"
    )
  if len(parts) < 2 or any(part in ("", ".", "..") or "\\" in part for part in parts):
    raise WorkdirError(f"{address}: expected {scheme}://BUCKET/PATH, without '..' and empty names")
  if any(character in rest for character in "?#%"):
    raise WorkdirError(f"{address}: an address takes no '?', '#' or '%'; choose another name")
  return (scheme, *parts)


def check_address(path: PathLike) -> None:
  """Refuses an invalid address, and any address if the library is missing; accepts all folders.
  Asks no server. Errors: WorkdirError."""
  if is_address(path):
    parse_address(os.fspath(path))
    if importlib.util.find_spec("obstore") is None:
      raise WorkdirError(
        f"{os.fspath(path)}: needs obstore; pip install 'beyond_outliers[stores]', or give a folder"
      )


def cache_folder(kind: str, address: str) -> pathlib.Path:
  """This machine's folder for an address. kind: what it holds."""
  return pathlib.Path(cache_root(), kind, *parse_address(address))


def open_store(address: str) -> Store:
  """The store, once it has answered. Errors: WorkdirError in one line."""
  check_address(address)
  scheme, bucket, *folders = parse_address(address)
  from obstore import store as backends

  retries: Any = {"max_retries": 4, "retry_timeout": datetime.timedelta(seconds=RETRY_SECONDS)}
  try:
    backend = backends.from_url(
      f"{scheme}://{bucket}",
      client_options={"allow_http": True, "connect_timeout": "5s", "timeout": "120s"},
      retry_config=retries,
    )
    store = Store(address, backend, "/".join(folders))
    store.read("mirror.json")
  except StoreError as error:
    raise WorkdirError(f"{error}; nothing was begun") from None
  except Exception as error:  # for instance for a malformed key or environment variable
    raise WorkdirError(f"{address}: {_meaning(error)}; nothing was begun") from None
  return store


class Store:
  """Objects below a prefix of an obstore backend. Errors of all methods: StoreError."""

  def __init__(self, address: str, backend: Any, prefix: str = ""):
    self.address, self._backend, self._prefix = address, backend, prefix

  def above(self) -> Iterator[Store]:
    """The stores that this one is inside of, innermost first, without the bucket itself."""
    address, prefix = self.address.rstrip("/"), self._prefix
    while "/" in prefix:
      address, prefix = address.rpartition("/")[0], prefix.rpartition("/")[0]
      yield Store(address, self._backend, prefix)

  def read(self, name: str) -> tuple[bytes, str] | None:
    """(content, tag) of an object, or None; the tag changes with the content."""
    import obstore

    try:
      with self._told():
        found = obstore.get(self._backend, self._key(name))
        return bytes(found.bytes()), _tag(found.meta)
    except FileNotFoundError:
      return None

  def tag(self, name: str) -> str | None:
    """The tag of an object, or None."""
    import obstore

    try:
      with self._told():
        return _tag(obstore.head(self._backend, self._key(name)))
    except FileNotFoundError:
      return None

  def write(self, name: str, content: bytes | BinaryIO, replaces: str | None = "any") -> str:
    """Writes a whole object; returns its tag. replaces: the tag that the present object must have;
    None: there must be no object; "any": no condition.

    Errors: ChangedError."""
    import obstore

    mode: Any = "overwrite" if replaces == "any" else "create"
    if replaces not in (None, "any"):
      assert replaces is not None
      e_tag, _, version = replaces.partition(" ")
      mode = {"e_tag": e_tag, **({"version": version} if version else {})}
    with self._told(writes=True):
      return _tag(obstore.put(self._backend, self._key(name), content, mode=mode))

  def upload(self, name: str, path: pathlib.Path, replaces: str | None = "any") -> str:
    """`write` for a file, which if large is sent in parts unless there is a condition.

    Errors: FileNotFoundError if the file is gone."""
    with path.open("rb") as file:
      return self.write(name, file if replaces == "any" else file.read(), replaces)

  def download(self, name: str, path: pathlib.Path) -> None:
    """Writes an object to a file. Errors: FileNotFoundError if the object is gone."""
    import obstore

    path.parent.mkdir(parents=True, exist_ok=True)
    with self._told():
      found = obstore.get(self._backend, self._key(name))
      with path.open("wb") as file:
        for chunk in found.stream():
          file.write(chunk)

  def sizes(self, below: str = "") -> dict[str, int]:
    """Sizes in bytes, by name, of all objects or of those in a folder."""
    import obstore

    start = f"{self._prefix}/" if self._prefix else ""
    with self._told():
      listed = obstore.list(self._backend, f"{start}{below}".rstrip("/") or None)
      return {meta["path"].removeprefix(start): meta["size"] for chunk in listed for meta in chunk}

  def delete(self, names: Sequence[str]) -> None:
    import obstore

    with self._told(), contextlib.suppress(FileNotFoundError):
      obstore.delete(self._backend, [self._key(name) for name in names])

  def _key(self, name: str) -> str:
    return f"{self._prefix}/{name}" if self._prefix else name

  @contextlib.contextmanager
  def _told(self, writes: bool = False) -> Iterator[None]:
    """Turns the library's errors into one line. A missing bucket is not a missing object."""
    from obstore import exceptions

    try:
      yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError) as error:
      raise ChangedError(f"{self.address}: {_meaning(error)}") from None
    except FileNotFoundError as error:
      if not writes and "NoSuchBucket" not in str(error):
        raise
      raise StoreError(f"{self.address}: {_meaning(error)}") from None
    except exceptions.PermissionDeniedError as error:
      raise DeniedError(f"{self.address}: {_meaning(error)}") from None
    except exceptions.BaseError as error:
      raise StoreError(f"{self.address}: {_meaning(error)}") from None


def _tag(meta: Any) -> str:
  return f"{meta['e_tag']} {meta['version'] or ''}".rstrip()


def _meaning(error: Exception) -> str:
  text = str(error)
  first = (text.splitlines() or [type(error).__name__])[0][:200]
  return next((meaning for words, meaning in MEANINGS.items() if words in text), first)
