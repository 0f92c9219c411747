"""Folders as runs leave them, and a store that fails on demand."""

from beyond_outliers.config import sums
from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores import mirror as mirror_lib
from beyond_outliers.stores.store import Store, StoreError

ADDRESS = "s3://bucket/run"


class Failing(Store):
  """A store that fails wherever an object's name begins with one of `broken`."""

  broken: tuple[str, ...] = ()

  def upload(self, name, path, replaces="any"):
    if name.startswith(self.broken):
      raise StoreError(f"{self.address}: the server does not answer")
    return super().upload(name, path, replaces)


def mirror_of(store, folder, said, sealed=True):
  folder.mkdir(parents=True, exist_ok=True)
  mirror = mirror_lib.Mirror(store, folder, sealed=sealed, say=said.append)
  mirror.begin()
  return mirror


def write(folder, name, text="{}"):
  (folder / name).parent.mkdir(parents=True, exist_ok=True)
  (folder / name).write_text(text)


def write_checkpoint(folder, step, text="x", sealed=True):
  write(folder, f"checkpoints/{step}/state/d/array", text)
  write(folder, f"checkpoints/{step}/clock/metadata", text)
  if sealed:
    directory = folder / "checkpoints" / str(step)
    names = ("state/d/array", "clock/metadata")
    sums.write_folder_sums(directory, {n: sums.file_sha256(directory / n) for n in names})


def texts(folder):
  """The contents of a folder, without what belongs to the mirror's own bookkeeping."""
  return {name: (folder / name).read_text() for name in index_lib.scan(folder)}


def rename(folder, old, new):
  (folder / new).parent.mkdir(parents=True, exist_ok=True)
  (folder / old).rename(folder / new)
