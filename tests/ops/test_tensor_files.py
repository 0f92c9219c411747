"""Safetensors files: what is written is read back, however it lies in memory."""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from beyond_outliers.ops.tensor_files import write_tensors

X = np.arange(24).reshape(4, 6)
LAYOUTS = {
  "rows first": X,
  "columns first": np.asfortranarray(X),
  "transposed": X.T,
  "three axes": np.arange(24).reshape(2, 3, 4).transpose(1, 2, 0),
  "every second": X[::2, ::3],
  "backwards": X[::-1, ::-1],
  "one number repeated": np.broadcast_to(np.arange(3), (2, 3)),
  "a scalar": np.array(7),
  "nothing": X[:0].T,
}


@pytest.mark.parametrize("dtype", ["float32", "int8", "bfloat16", ">f4"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_arrays_come_back(name, dtype, tmp_path):
  dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
  x = LAYOUTS[name].astype(dtype, order="K")
  write_tensors(tmp_path / "x", {"x": x, "y": X}, {"format": "pt"})
  read = safetensors.numpy.load_file(tmp_path / "x")
  assert (read["x"].dtype, read["x"].shape) == (dtype.newbyteorder("="), x.shape)
  np.testing.assert_array_equal(read["x"].astype(float), x.astype(float))
  np.testing.assert_array_equal(read["y"], X)


def test_a_file_is_there_once_it_is_whole_and_on_the_disk(tmp_path, monkeypatch):
  write_tensors(tmp_path / "x", {"x": X})
  done = []
  for module, name in ((os, "fsync"), (os, "rename"), (os, "replace")):
    call = getattr(module, name)
    monkeypatch.setattr(
      module, name, lambda *given, call=call, name=name: (done.append(name), call(*given))[1]
    )
  write_tensors(tmp_path / "x", {"x": X + 1})
  assert done == ["fsync", "replace", "fsync"], "the file, its name, the folder"

  def break_off(tensors, file, metadata):
    pathlib.Path(file).write_bytes(b"begun")
    raise OSError("disk full")

  monkeypatch.setattr(safetensors.numpy, "save_file", break_off)
  with pytest.raises(OSError, match="disk full"):
    write_tensors(tmp_path / "x", {"x": X})
  assert [path.name for path in tmp_path.iterdir()] == ["x"]
  np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "x")["x"], X + 1)
