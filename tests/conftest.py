"""Eight simulated devices, and a compilation cache kept from one run of the tests to the next."""

import os
import pathlib

CACHE = pathlib.Path(__file__).parent.parent / ".jax_cache"

# Commands that tests start inherit the cache, but not the eight devices.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# By default XLA:CPU starts independent all-reduces in any order, which differs between devices, on
# too few threads for all of them: devices may deadlock, more so on a busy machine. This schedule
# orders them.
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
    "--xla_cpu_use_fusion_emitters=false",
  ]
).strip()
# Programs of tests run a few times, on small inputs: compiling takes most of the time, which these
# two options cut to an eighth. Tests that compute for long, or that compare the bits of two
# programs, use the fixture `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax  # noqa: E402  (the environment comes first)

jax.config.update("jax_num_cpu_devices", 8)

import gc  # noqa: E402
import random  # noqa: E402

import pytest  # noqa: E402


def pytest_configure(config):
  config.option.loadscopereorder = False  # of pytest-xdist; the order is made here


def pytest_collection_modifyitems(items):
  """Files of slow tests first, then those of many, so that at the end no worker is left alone with
  a long one."""
  files = {}
  for item in items:
    files.setdefault(item.path, []).append(item.get_closest_marker("slow") is not None)

  def rank(item):
    slow = files[item.path]
    return -sum(slow) / len(slow), -len(slow), str(item.path)

  items.sort(key=rank)


def pytest_collection_finish():
  """Reduces garbage collection: tracing makes hundreds of thousands of objects, and every 700
  Python would search them and all imported ones for cycles, a quarter of the time."""
  gc.collect()
  gc.freeze()
  gc.set_threshold(20_000, 20, 20)


MEMORY_MAPS = pathlib.Path("/proc/self/maps")
MANY_MEMORY_MAPS = 15_000


@pytest.fixture(scope="module", autouse=True)
def few_memory_maps():
  """Every compiled program takes some of the 65,530 memory maps that Linux allows a process: after
  hundreds of tests that compile, a worker would die of a segmentation fault in the compiler."""
  yield
  if MEMORY_MAPS.exists() and MEMORY_MAPS.read_bytes().count(b"\n") > MANY_MEMORY_MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def optimized():
  """All programs of this test are optimized as they are for users."""
  before = jax.config.read("jax_disable_most_optimizations")
  jax.clear_caches()
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


WORDS = [
  "the",
  "of",
  "and",
  "to",
  "in",
  "a",
  "that",
  "it",
  "is",
  "was",
  "for",
  "on",
  "with",
  "as",
  "be",
  "at",
  "by",
  "this",
]


@pytest.fixture(scope="session")
def words():
  return WORDS


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
  """A folder of 40 text documents of English words, the same on every run."""
  folder, draw = tmp_path_factory.mktemp("corpus"), random.Random(0)
  for i in range(40):
    words = [draw.choice(WORDS) for _ in range(draw.randint(40, 160))]
    (folder / f"{i:02d}.txt").write_text(" ".join(words) + ".\n")
  return folder


@pytest.fixture(scope="session")
def tiny(corpus, tmp_path_factory):
  """tiny(**{"key": value}) -> what follows the colon of --config for a model of two blocks on the
  corpus."""
  datasets = tmp_path_factory.mktemp("datasets")
  settings = {
    "model.blocks": 2,
    "model.heads": 6,
    "model.d_head": 8,
    "context": 32,
    "batch_size": 8,
    "steps": 10,
    "log.every": 1,
    "data.source": "text",
    "data.path": f"{corpus}/*.txt",
    "data.tokenizer": "bytes",
    "data.vocab": 264,
    "data.directory": str(datasets),
    "data.validation": "newest:4",
    "data.readers": 4,
    "optimizer.learning_rate": 3e-3,
  }

  def argument(**overrides):
    return ",".join(
      ["nano", *(f"{key}={value}" for key, value in {**settings, **overrides}.items())]
    )

  return argument


@pytest.fixture(scope="session")
def tiny_config(tiny):
  """The same, resolved."""
  from beyond_outliers import config
  from configs import adamw

  return lambda **overrides: config.resolve(adamw.get_config(tiny(**overrides)))
