#!/usr/bin/env bash
# Orbax 0.12.8 treats the folder of a checkpoint as part of a glob pattern. Below a folder with
# square brackets in its name, it saves a checkpoint without an error that cannot be read again.
#
# At the end of a save, Orbax merges what each process wrote (ocdbt.process_0, ...) into one
# database. It finds these parts with directory.glob("ocdbt.process_*"). etils' epath joins folder
# and pattern and globs the whole, so [1e-3] matches one character and no part is found. The log
# warns that the merge is skipped, but save returns as usual. Sweeps create such names: lr=[1e-3],
# layers=[2,4]. In a folder named * or ?, parts of other folders' checkpoints are merged in too.
# Use other names, or give Orbax a path whose glob escapes it:
#
#   class FolderPath(etils.epath.gpath.PosixGPath):
#     def glob(self, pattern):
#       yield from map(type(self), epath.Path(glob.escape(str(self))).glob(pattern))
#
# and read back the metadata of every checkpoint before an older one is deleted.
#
# Versions: orbax-checkpoint 0.12.8, etils 1.15.0, jax 0.10.2. Seen:
#   lr=1e-3   saved, with ['d', 'manifest.ocdbt']; read back: True
#   lr=[1e-3] saved, with []; read back: ValueError NOT_FOUND
#   lr=[1e-3] with an escaped path: saved, with ['d', 'manifest.ocdbt']; read back: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/save.py" <<'PY'
import glob
import logging
import pathlib
import sys

import absl.logging
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from etils.epath import gpath

absl.logging.set_verbosity(absl.logging.FATAL)
logging.getLogger("asyncio").setLevel(logging.CRITICAL)


class FolderPath(gpath.PosixGPath):
  def glob(self, pattern):
    yield from map(type(self), epath.Path(glob.escape(str(self))).glob(pattern))


weights = {"w": jnp.arange(6.0).reshape(2, 3)}


def comes_back(name, kind, text):
  directory = kind(sys.argv[1]) / text / name / "1"
  with ocp.StandardCheckpointer() as writer:
    writer.save(directory, weights)
  merged = [part for part in ("d", "manifest.ocdbt") if (pathlib.Path(directory) / part).exists()]
  try:
    with ocp.StandardCheckpointer() as reader:
      found = np.array_equal(reader.restore(epath.Path(str(directory)))["w"], weights["w"])
  except ValueError as error:
    found = f"ValueError {str(error).partition(':')[0]}"
  print(f"{name:<9}{text and ' with an ' + text + ' path:'} saved, with {merged}; read back: {found}")
  return found is True


seen = [
  comes_back("lr=1e-3", epath.Path, ""),
  comes_back("lr=[1e-3]", epath.Path, ""),
  comes_back("lr=[1e-3]", FolderPath, "escaped"),
]
assert seen == [True, False, True], "changed: see the output above"
PY
python3 -m venv "$folder/environment"
"$folder/environment/bin/pip" install --quiet orbax-checkpoint==0.12.8 etils==1.15.0 jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/environment/bin/python" -I "$folder/save.py" "$folder"
