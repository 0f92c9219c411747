"""Prepares a dataset on disk, ahead of the training that would otherwise do so.

  python -m beyond_outliers.prepare --config=configs/adamw.py:nano
  python -m beyond_outliers.prepare \
    --config=configs/adamw.py:50m,data.source=parquet,data.path=/data/*.parquet

With --verify, also reads the whole dataset again and compares its SHA-256.
"""

from __future__ import annotations

from absl import app, flags

from beyond_outliers import cli, config, data

_CONFIG = cli.config_flag()
_VERIFY = flags.DEFINE_bool(
  "verify", False, "Compare the SHA-256 of every file of the dataset with the recorded one."
)


def describe_dataset(dataset: data.Dataset) -> str:
  """Fingerprints, and a line of counts per split (not counted for TFDS records read in place)."""
  lines = [
    f"{dataset.directory}: fingerprint {dataset.fingerprint[:12]}, tokenizer "
    f"{dataset.tokenizer.fingerprint[:12]} of {dataset.tokenizer.vocab_size} tokens"
  ]
  for split, counts in dataset.meta["splits"].items():
    shown = ", ".join(
      f"{counts[what]:,} {what}"
      for what in ("documents", "bytes", "tokens")
      if counts[what] is not None
    )
    ratio = (
      f", {counts['bytes'] / counts['tokens']:.3f} bytes per token" if counts["tokens"] else ""
    )
    lines.append(f"  {split}: {shown or 'not counted'}{ratio}")
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}")
  dataset = data.prepare(config.resolve(_CONFIG.value).data)
  if _VERIFY.value:
    data.verify(dataset)
    print(f"prepare: {len(dataset.meta['files'])} files are as they were written")
  print(describe_dataset(dataset))


if __name__ == "__main__":
  cli.run_command(main)
