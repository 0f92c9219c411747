"""Runs as training leaves them, without the training."""

import json

from beyond_outliers import config


def workdir(
  root,
  module,
  rate,
  seed,
  losses,
  status="done",
  recipe="none",
  argument="",
  fingerprint="abc",
  checkpoints=(),
):
  """losses: of training, from step 1, with the validation loss half a nat above the last; or {step:
  validation loss}.

  A loss may be None, as one that was not finite is written."""
  folder = root / module.__name__.split(".")[-1] / f"{recipe}-{rate}-{seed}"
  folder.mkdir(parents=True, exist_ok=True)
  steps = max(losses) if isinstance(losses, dict) else len(losses)
  c = config.resolve(
    module.get_config(
      f"nano,steps={steps},optimizer.learning_rate={rate},seed={seed},quant.recipe={recipe}{argument}"
    )
  )
  (folder / "config.json").write_text(json.dumps(config.to_dict(c)))
  (folder / "manifest.json").write_text(
    json.dumps({"time": "2026-11-23T05:00:00+00:00", "data": {"fingerprint": fingerprint}})
  )
  (folder / "status.json").write_text(json.dumps({"status": status, "step": steps}))
  for step in checkpoints:
    (folder / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
  if isinstance(losses, dict):
    rows, evaluated = [{"step": step, "train/loss": loss} for step, loss in losses.items()], losses
  else:
    rows = [
      {"step": step, "train/loss": loss, "seconds": 2.0 * step, "skipped": 0.0}
      for step, loss in enumerate(losses, 1)
    ]
    evaluated = {len(losses): losses[-1] + 0.5}
  rows += [
    {"step": step, "eval/loss": loss, "eval/bits_per_byte": loss and loss / 2}
    for step, loss in evaluated.items()
  ]
  (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
