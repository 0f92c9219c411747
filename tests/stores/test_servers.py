"""Stores as their servers answer: S3 by moto's server, and Google's by the same one, whose API for
XML Google's is, but for the conditions and the generations, which a layer here translates.

A real server of either was not asked."""

import hashlib
import json
import pathlib
import signal
import threading
import time

import commands
import pytest

pytest.importorskip("obstore", reason="obstore comes with the extra `stores`")
pytest.importorskip("moto", reason="moto comes with the extra `test`")

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from obstore.store import from_url
from werkzeug.serving import WSGIRequestHandler, make_server

from beyond_outliers import runs, stores
from beyond_outliers.analysis import packed_runs
from beyond_outliers.errors import WorkdirError
from beyond_outliers.stores import index as index_lib
from beyond_outliers.stores.store import ChangedError, Store, StoreError, open_store

ROOT = pathlib.Path(__file__).parents[2]


# The server looks at whose request it is, and at no signature.
SCOPE = "x/20260101/us-east-1/s3/aws4_request"
S3_ACCOUNT = f"AWS4-HMAC-SHA256 Credential={SCOPE}, SignedHeaders=host, Signature=0"


PLAIN: dict = {"allow_http": True}


class Quiet(WSGIRequestHandler):
  def log(self, type, message, *args):
    pass


class Generations:
  """Google's conditions in front of a server of S3: a generation is a number for a tag."""

  def __init__(self, app):
    self._app, self._tags = app, {}

  def __call__(self, environ, start_response):
    if not environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4"):
      environ["HTTP_AUTHORIZATION"] = S3_ACCOUNT
    wanted = environ.pop("HTTP_X_GOOG_IF_GENERATION_MATCH", None)
    if wanted == "0":
      environ["HTTP_IF_NONE_MATCH"] = "*"
    elif wanted is not None:
      environ["HTTP_IF_MATCH"] = self._tags.get(wanted, '"none"')

    def start(status, headers, *rest):
      tag = next((value for name, value in headers if name.lower() == "etag"), None)
      if tag:
        number = str(int(hashlib.sha256(tag.encode()).hexdigest()[:12], 16))
        self._tags[number] = tag
        headers = [*headers, ("x-goog-generation", number)]
      return start_response(status, headers, *rest)

    return self._app(environ, start)


@pytest.fixture(scope="module")
def url():
  app = Generations(DomainDispatcherApplication(create_backend_app))
  server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  yield f"http://127.0.0.1:{server.port}"
  server.shutdown()
  thread.join()


@pytest.fixture(scope="module")
def environment(url):
  """Of whoever uses the server."""
  import boto3

  account = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_REGION": "us-east-1"}
  boto3.client(
    "s3",
    endpoint_url=url,
    region_name="us-east-1",
    aws_access_key_id="x",
    aws_secret_access_key="y",
  ).create_bucket(Bucket="bucket")
  google = {"gcs_base_url": url, "disable_oauth": True, "client_email": "", "private_key": ""}
  return {
    **account,
    "AWS_ENDPOINT_URL": url,
    "GOOGLE_SERVICE_ACCOUNT_KEY": json.dumps({**google, "private_key_id": ""}),
  }


@pytest.fixture(autouse=True)
def settings(environment, monkeypatch, tmp_path):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("BEYOND_OUTLIERS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_objects_and_conditions(scheme, tmp_path):
  store = open_store(f"{scheme}://bucket/{scheme}/a run=[1]")
  assert store.read("x") is None and store.sizes() == {}
  tag = store.write("x", b"1", replaces=None)
  with pytest.raises(ChangedError):
    store.write("x", b"2", replaces=None)
  assert store.read("x") == (b"1", tag)
  other = store.write("x", b"3", replaces=tag)
  with pytest.raises(ChangedError):
    store.write("x", b"4", replaces=tag)
  assert store.read("x") == (b"3", other)
  for name, size in {"empty": 0, "small": 10, "large": 11_000_000}.items():
    (tmp_path / name).write_bytes(b"z" * size)
    store.upload(f"eval/{name}", tmp_path / name)
    store.download(f"eval/{name}", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b"z" * size
  sizes = {"eval/empty": 0, "eval/small": 10, "eval/large": 11_000_000}
  assert store.sizes("eval") == sizes and store.sizes() == {"x": 1, **sizes}
  store.delete(["x", "eval/small", "never"])
  assert store.sizes().keys() == {"eval/empty", "eval/large"}
  with pytest.raises(FileNotFoundError):
    store.download("x", tmp_path / "back")


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_gone_is_no_file_that_is(scheme, tmp_path):
  """What cannot be uploaded must not count as deleted here."""
  gone = Store(f"{scheme}://gone/run", from_url(f"{scheme}://gone", client_options=PLAIN), "run")
  (tmp_path / "x").write_text("x")
  for attempt in (
    lambda: gone.upload("x", tmp_path / "x"),
    lambda: gone.write("x", b"x"),
    lambda: gone.read("x"),
    lambda: gone.download("x", tmp_path / "y"),
  ):
    with pytest.raises(StoreError, match="no such bucket"):
      attempt()
  with pytest.raises(FileNotFoundError):
    gone.upload("y", tmp_path / "never")


REFUSALS = {
  "s3://nobucket/run": ({}, "there is no such bucket"),
  "s3://bucket/run": ({"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "the server cannot be reached"),
  "gs://bucket/run": ({"GOOGLE_SERVICE_ACCOUNT_KEY": "{}"}, "nothing was begun"),
}


@pytest.mark.parametrize("address", REFUSALS)
def test_a_store_that_cannot_be_used_is_refused_in_one_line(address, monkeypatch):
  differs, message = REFUSALS[address]
  monkeypatch.setattr("beyond_outliers.stores.store.RETRY_SECONDS", 0.5)
  for name, value in differs.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(WorkdirError, match=message) as refused:
    open_store(address)
  text = str(refused.value)
  assert text.startswith(address) and "nothing was begun" in text and "\n" not in text


def test_runs_are_found_below_an_address():
  for name in ("a", "b/c"):
    store = open_store(f"s3://bucket/sweep/{name}")
    store.write("mirror.json", b'{"id": "1", "previous": "", "files": {"config.json": [2, 0]}}')
    store.write("config.json", b"{}")
  found = stores.addresses_below("s3://bucket/sweep/")
  assert found == ["s3://bucket/sweep/a", "s3://bucket/sweep/b/c"]
  assert [run.name for run in runs.find("s3://bucket/sweep")] == found
  assert [run.name for run in packed_runs.find_runs("s3://bucket/sweep")] == found, "as of analyses"
  with pytest.raises(WorkdirError, match="s3://bucket/nothing holds no run"):
    runs.open("s3://bucket/nothing")


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_elsewhere(tiny, tmp_path):
  """And is evaluated at a third place: what each needs of the others it has from the store."""
  every = {"checkpoint.every": 500, "eval.every": 10**6, "log.every": 100}
  config = tiny(**{"steps": 10**6, "eval.documents": 4, **every})
  flags = f"--config=configs/adamw.py:{config}", "--workdir=s3://bucket/killed"
  process = commands.start(
    "beyond_outliers.main", *flags, BEYOND_OUTLIERS_CACHE=str(tmp_path / "one")
  )
  store, deadline = open_store("s3://bucket/killed"), time.monotonic() + 200
  while not any(map(index_lib.step_of, index_lib.in_store(store).files)):
    assert time.monotonic() < deadline and process.poll() is None, "nothing was uploaded"
    time.sleep(0.1)
  process.send_signal(signal.SIGKILL)
  process.wait()
  left = stores.Copy("s3://bucket/killed", store, tmp_path / "left")
  newest = left.steps()[-1]
  assert newest >= 500 and store.read("lease.json") is not None
  process = commands.start(
    "beyond_outliers.main", *flags, BEYOND_OUTLIERS_CACHE=str(tmp_path / "two")
  )
  begun = next(line for line in process.stdout if "/1000000 · loss" in line)
  first = int(begun.split("/")[0].split()[-1])
  process.send_signal(signal.SIGTERM)
  commands.finish(process, expected=42)
  assert newest < first <= newest + 100, "it went on from what the store had"
  assert store.read("lease.json") is None
  run = runs.open("s3://bucket/killed")
  assert run.status["status"] == "preempted" and run.steps[-1] == run.status["step"] >= first
  assert run.metrics().index[-1] <= run.status["step"]
  place = {"BEYOND_OUTLIERS_CACHE": str(tmp_path / "three")}
  commands.finish(
    commands.start(
      "beyond_outliers.evaluate", "--workdir=s3://bucket/killed", "--recipes=rtn_w4a4", **place
    )
  )
  assert len(store.sizes("eval")) == 2


@pytest.mark.slow
def test_two_processes_share_a_run_and_a_cache(tiny, tmp_path):
  """Each has a half of the parameters. One process goes on with what they left, from a cache of its
  own, and a job that follows them has a third."""
  settings = {"steps": 400, "checkpoint.every": 100, "eval.every": 400, "log.every": 10}
  address, config = "s3://bucket/pair", f"--config=configs/adamw.py:{tiny(**settings)}"
  train = "beyond_outliers.main", config, f"--workdir={address}"
  shared, port = str(tmp_path / "shared"), commands.free_port()
  pair = [
    commands.start(
      *(*train, "--config.mesh.fsdp=2", f"--distributed=127.0.0.1:{port},2,{index}"),
      BEYOND_OUTLIERS_CACHE=shared,
    )
    for index in range(2)
  ]
  store, deadline = open_store(address), time.monotonic() + 200
  while not any(map(index_lib.step_of, index_lib.in_store(store).files)):
    assert time.monotonic() < deadline and pair[0].poll() is None, "nothing was uploaded"
    time.sleep(0.1)
  follower = commands.start(
    *("beyond_outliers.evaluate", f"--workdir={address}", "--recipes=rtn_w8a8", "--follow"),
    BEYOND_OUTLIERS_CACHE=str(tmp_path / "evaluation"),
  )
  pair[1].send_signal(signal.SIGTERM)
  for process in pair:
    commands.finish(process, expected=42)
  stopped = runs.open(address).status["step"]
  assert 100 <= stopped < 400
  alone = commands.start(*train, BEYOND_OUTLIERS_CACHE=str(tmp_path / "alone"))
  begun = next(line for line in commands.finish(alone).splitlines() if "/400 · loss" in line)
  assert int(begun.split("/")[0].split()[-1]) > stopped, "it went on from what they left"
  commands.finish(follower)
  run = runs.open(address)
  assert run.status["status"] == "done" and run.steps[-1] == 400
  assert sorted(set(run.metrics().index)) == list(range(10, 401, 10))
  assert any(name.startswith("eval/400-rtn_w8a8") for name in store.sizes("eval"))
