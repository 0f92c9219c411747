"""Growth of quantization error through a network.

`decompose` and `final_error` measure it (evaluate/propagation.py, which evaluation jobs use too),
`sensitivity` quantizes one part at a time (sensitivity.py), `cumulative` reads `decompose`'s table.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from beyond_outliers.analysis.sensitivity import PARTS, sensitivity
from beyond_outliers.config.checks import require
from beyond_outliers.evaluate.propagation import decompose, final_error

__all__ = ["PARTS", "cumulative", "decompose", "final_error", "sensitivity"]


def cumulative(rows: pd.DataFrame) -> pd.DataFrame:
  """Growth of error along the network, from a table of `decompose`: one row per block, and one each
  for the final norm and the head.

  The input of each is the output of the one before, so R = gain · R_in + B + C unrolls to

    R_L = Σ_l (B_l + C_l) · Π_(k > l) gain_k

  Columns: name; R, as measured; gain; product, of the gains from the second block on; added, B + C;
  share of the last R: added · all later gains / R_L. The shares sum to 1.
  Errors: ConfigError for a table without all of these rows."""
  ends = ["final_norm", "head"]
  chain = rows[(rows["kind"] == "block") | rows["name"].isin(ends)].reset_index(drop=True)
  require(
    list(chain["name"])[-2:] == ends and len(chain) > 2,
    "rows",
    list(chain["name"]),
    "expected every block, the final norm and the head: decompose with modules=None",
  )
  # Where no error comes in, as into the first block, all of the output's error was added.
  gain = chain["gain"].where(chain["gain"].notna() | chain["R"].isna(), 0.0).to_numpy()
  added = (chain["B"] + chain["C"]).to_numpy()
  behind = np.append(np.cumprod(gain[:0:-1])[::-1], 1.0)
  return pd.DataFrame(
    {
      "name": chain["name"],
      "R": chain["R"],
      "gain": chain["gain"],
      "product": np.append(1.0, np.cumprod(gain[1:])),
      "added": added,
      "share": added * behind / chain["R"].iloc[-1],
    }
  )
