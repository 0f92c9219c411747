"""Local launcher: a config file's sweep on this machine, some runs at a time.

The same command continues where it stopped.

  python -m launch.local --config=configs/shampoo.py --root=runs/tuning/shampoo --where=seed=0

--overrides=FILE replaces this sweep's values with those found by the analysis of another sweep:

  python -m beyond_outliers.analysis --root=runs/tuning --overrides=tuned.json
  python -m launch.local --config=configs/shampoo_qat.py --root=runs/qat/shampoo \
    --overrides=tuned.json --parallel=2 --evaluate=behind --evaluate_flags=--recipes=rtn_w4a4

Each run is a process (or several, with --processes) with the workdir <root>/<what it overrides>; a
run that diverges doesn't stop the others.
"""

from __future__ import annotations

import os
import shlex
import sys

from absl import flags

from beyond_outliers import cli
from launch import jobs, pool, table


def define_flags() -> None:
  jobs.define_flags()
  flags.DEFINE_integer("parallel", 1, "Runs at a time, each on its own share of the cores.", 1)
  flags.DEFINE_integer("processes", 1, "Processes of a run, which meet on this machine.", 1)
  flags.DEFINE_integer(
    "devices", 0, "Simulated devices of each process, on the CPU; 0: the devices that are there.", 0
  )
  flags.DEFINE_integer(
    "restarts", 0, "How often a run that failed is started again, from its newest checkpoint.", 0
  )
  flags.DEFINE_bool(
    "list", False, "Print the workdirs and how far their runs are, and start nothing."
  )


def launch(argv: list[str]) -> None:
  """Runs those runs of the sweep that have not ended. Exits with 1 if one is neither done nor
  diverged, and with 42 if it was asked to stop."""
  del argv
  given = flags.FLAGS
  listed = jobs.of_flags(here=True)
  if given.list or given.dry_run:
    for number, job in enumerate(listed, 1):
      print(f"[{number}/{len(listed)}] {pool.describe(job)}")
      if given.dry_run:
        for command in pool.commands_of(job, sys.executable, given.processes):
          print(f"  {shlex.join(command)}")
    return
  # Runs print directly if there is one at a time; otherwise nobody could tell whose lines they are.
  alone = given.parallel == given.processes == 1 and given.evaluate != "beside"
  runner = pool.Pool(
    listed,
    sys.executable,
    parallel=given.parallel,
    processes=given.processes,
    restarts=given.restarts,
    logs="" if alone else os.path.join(jobs.local_folder(given.config, given.root), "logs"),
    environment=simulated(given.devices) if given.devices else None,
  )
  pool.catch(runner.hand_on, cli.STOP_SIGNALS)
  with table.live(runner, not alone) as look:
    runner.run(look)
  _end(runner)


def simulated(devices: int) -> dict[str, str]:
  """Environment variables for a process with that many simulated devices, on the CPU."""
  # Without this schedule, devices start collectives in any order on too few threads, and may
  # deadlock, more so on a busy machine.
  ordered = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
  return {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices),
    "XLA_FLAGS": f"{ordered} {os.environ.get('XLA_FLAGS', '')}".rstrip(),
  }


def _end(runner: pool.Pool) -> None:
  if runner.asked:
    for task in runner.tasks:
      if task.code is not None and task.job.kind == "train" and not pool.well(task):
        what = pool.describe(task.job)
        print(f"asked to stop; {what}; the same command resumes", flush=True)
    sys.exit(jobs.STOPPED)
  failed = [
    f"{'' if task.job.kind == 'train' else task.job.kind + ' '}{task.job.workdir} "
    f"(exit code {task.code})"
    for task in runner.tasks
    if not pool.well(task)
  ]
  if failed:
    sys.exit("not done: " + ", ".join(failed))


if __name__ == "__main__":
  define_flags()
  cli.run_command(launch)
