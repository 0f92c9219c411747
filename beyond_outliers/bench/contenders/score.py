"""Contender of bench/peers.py: our scorer for the harness, on the choices of questions."""

from __future__ import annotations

import json
import math
import sys

from beyond_outliers.bench.contenders import serve
from beyond_outliers.evaluate import loglikelihood
from beyond_outliers.model import hf


def main(model: str, context: int, pairs: str) -> None:
  """Serves log-likelihoods. The result is their sum in nats."""
  with open(pairs) as file:
    asked = [loglikelihood.Pair(*pair) for pair in json.load(file)]
  scorer = loglikelihood.Scorer(*hf.load(model), context=context)
  serve(lambda: math.fsum(found for found, _ in scorer.score(asked)))


if __name__ == "__main__":
  main(**json.loads(sys.argv[1]))
