"""Contender of bench/peers.py: a cell of an evaluation job, results written to disk included."""

from __future__ import annotations

import json
import pathlib
import sys
import tempfile

from beyond_outliers.bench.contenders import serve
from beyond_outliers.evaluate import evaluator, target
from beyond_outliers.evaluate.plan import Cell

RTN = Cell("rtn_w4a4", "rtn")


def main(model: str, dataset: str, context: int) -> None:
  """Serves cells, quantized and measured each time. The result is the quantized model's loss."""
  found = target.HuggingFaceModel(model, dataset=dataset, context=context)
  with tempfile.TemporaryDirectory() as folder:
    job = evaluator.Evaluator(found, [RTN], folder)
    job.make_folder()

    def work() -> float:
      for result in pathlib.Path(folder).iterdir():
        result.unlink()
      return job.measure(0, found.params(0), RTN)["metrics"]["loss"]

    serve(work)


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
