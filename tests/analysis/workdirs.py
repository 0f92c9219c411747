"""Workdirs as training leaves them, and cells as evaluation jobs do, made without either."""

import json

from beyond_outliers import config
from beyond_outliers.config.sums import digest
from beyond_outliers.evaluate import results


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
  tokenizer="words",
  checkpoints=(),
  size="nano",
  parameters=(3_934_086, 786_432),
  jax=None,
  parent=None,
):
  """losses: of training, from step 1, with the validation loss half a nat above the last; or {step:
  validation loss}.

  A loss may be None, which is how a loss that was not finite is written. parameters: (total,
  embedding's). jax: recorded JAX settings. parent: recorded run whose parameters it started from.
  Returns the folder."""
  folder = root / module.__name__.split(".")[-1] / f"{recipe}-{rate}-{seed}"
  folder.mkdir(parents=True, exist_ok=True)
  steps = max(losses) if isinstance(losses, dict) else len(losses)
  own = f"steps={steps},optimizer.learning_rate={rate},seed={seed},quant.recipe={recipe}"
  values = dict(part.split("=", 1) for part in f"{own}{argument}".split(","))
  given = ",".join(f"{key}={value}" for key, value in values.items())
  c = config.resolve(module.get_config(f"{size},{given}"))
  (folder / "config.json").write_text(json.dumps(config.to_dict(c)))
  manifest = {
    "id": str(folder),
    "time": "2026-11-23T05:00:00+00:00",
    "parameters": dict(zip(("total", "embedding"), parameters, strict=True)),
    "data": {"directory": "datasets/x", "fingerprint": fingerprint, "tokenizer": tokenizer},
  }
  if jax is not None:
    manifest["resumed"] = [{"jax": jax}]
  if parent is not None:
    manifest["warm_start"] = parent
  (folder / "manifest.json").write_text(json.dumps(manifest))
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
  return folder


def cell(
  run,
  step,
  recipe="none",
  method="none",
  metrics=None,
  *,
  R_L=None,
  units=(),
  tasks=None,
  content=None,
  **settings,
):
  """A cell of a run's checkpoint. metrics: {name: value}, with `loss`. R_L: adds its error's
  propagation, with these `units`. tasks: {name: {score: value}}. content: hash of the tasks'
  questions. settings: added to an evaluation job's, or replacing them.

  The cell of the model as it was trained, with which others are compared, must be made too."""
  manifest = json.loads((run / "manifest.json").read_text())
  common = {
    "version": 2,
    "trained": digest(manifest),
    "tokenizer": manifest["data"]["tokenizer"],
    "context": 256,
    "calibration_windows": 0,
    "data": manifest["data"]["fingerprint"],
    "documents": 0,
    "mask_documents": False,
    **settings,
  }
  source = {"config": json.loads((run / "config.json").read_text())}
  found = {"metrics": metrics or {"loss": 4.0}, "size_bytes": 1, "source": source}
  _write(run, step, recipe, method, {**common, "resamples": 10}, found)
  for task, scores in (tasks or {}).items():
    found = {"scores": {task: scores}, "seconds": 1.0, "time": manifest["time"]}
    asked = {"task": task, **({"content": content} if content else {})}
    _write(run, step, recipe, method, {**common, **asked}, found)
  if R_L is not None:
    scores = {"propagation": {"R_L": R_L, "R_L_stderr": 0.01, "R_L_logits": 2 * R_L}}
    found = {"scores": scores, "units": list(units), "seconds": 1.0, "time": manifest["time"]}
    _write(run, step, recipe, method, {**common, "task": "propagation", "windows": 8}, found)


def _write(run, step, recipe, method, settings, found):
  (run / "eval").mkdir(exist_ok=True)
  identity = {"step": step, "recipe": recipe, "method": method, "settings": settings}
  (run / "eval" / results.file_name(step, recipe, method, settings)).write_text(
    json.dumps({**identity, **found})
  )
