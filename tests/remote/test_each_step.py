"""Each request of an upload or a read is refused or interrupted: one line, and nothing is lost."""

import itertools
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from types import SimpleNamespace

import pytest
from huggingface_hub.utils import _http

from dump_activations import ActivationsFile, StepsDataset
from dump_activations.errors import DumpActivationsError
from dump_activations.remote import requests
from reference.hub import files_under
from reference.web import Web

pytest.importorskip("obstore")

# The requests of an upload, how many of each are answered first, and the run that makes them.
SMALL, LARGE = {}, {"n_samples": 500, "shard_size": "1GB"}
BUCKET = {
    "list": (r"GET bucket\?", 0, SMALL),
    "later list": (r"GET bucket\?", 3, SMALL),
    "put": ("PUT .*-00002-of-", 0, SMALL),
    "head": ("HEAD .*-00002-of-", 0, SMALL),
    "start of parts": (r"POST .*\?uploads", 0, LARGE),
    "part": ("PUT .*partNumber", 1, LARGE),
    "completion": ("POST .*uploadId", 0, LARGE),
}
HUB = {
    "info": "GET /api/datasets/org/name/revision",
    "creation": "POST /api/repos/create",
    "tree": "GET /api/datasets/org/name/tree",
    "modes": "POST .*/preupload/",
    "batch": "POST .*/info/lfs/objects/batch",
    "file": "PUT /upload/",
    "commit": "POST .*/commit/",
    "head": "HEAD .*/resolve/.*a-",
    "card": "HEAD .*README.md",
}
ON_HUB = "hf://datasets/org/name/a.safetensors"
READS = {
    "list": (r"GET bucket\?", lambda: StepsDataset("s3://bucket/games")),
    "range": ("GET .*steps-00001", lambda: StepsDataset("s3://bucket/games")),
    "head": ("HEAD bucket/games/a", lambda: ActivationsFile("s3://bucket/games/a.pt")),
    "index": ("GET /$", None),
    "info": ("GET .*/revision/", lambda: StepsDataset("hf://datasets/org/games")),
    "tree": ("GET .*/tree/", lambda: StepsDataset("hf://datasets/org/games")),
    "file": ("GET .*resolve.*steps-00001", lambda: StepsDataset("hf://datasets/org/games")),
}


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch):
    monkeypatch.setitem(requests.RETRIES, "max_retries", 2)
    monkeypatch.setitem(requests.RETRIES, "retry_timeout", timedelta(seconds=1))
    monkeypatch.setattr(requests, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


def at(server, pattern, fault, *, answered=0):
    """Have a server call `fault` before it answers requests like these, but for the first few."""
    numbers = itertools.count()
    server.before_answer = lambda request: (
        fault() if re.match(pattern, request) and next(numbers) >= answered else None
    )


class Interruption:
    """Sends Ctrl-C to the main thread during a request, which hangs until the context ends.

    It is answered then, or refused by `answer`. With `lasts` it hangs until `end` is called.
    """

    def __init__(self, answer=None, *, lasts=False):
        self._answer, self._lasts = answer, lasts
        self._first, self._ends = threading.Lock(), threading.Event()
        self._hung = False

    def __call__(self):
        if self._first.acquire(blocking=False):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        self._hung |= not self._ends.wait(8)
        return self._answer

    def __enter__(self):
        return self

    def end(self):
        self._ends.set()

    def __exit__(self, kind, *_):
        if not self._lasts:
            self.end()
        assert kind is KeyboardInterrupt
        assert not self._hung, "the interruption waited for the answer"
        return True


@contextmanager
def one_line(text):
    """Expect an error of one line."""
    with pytest.raises(DumpActivationsError) as error:
        yield
    assert re.fullmatch(f".*{text}.*", str(error.value)), str(error.value)


def objects(s3):
    return {name.removeprefix("bucket/runs/"): each for name, each in s3.objects.items()}


def shards(hub):
    files = hub.repos["org/name"].files if "org/name" in hub.repos else {}
    return {name: each for name, each in files.items() if name.startswith("a-")}


@pytest.mark.parametrize("step", BUCKET)
@pytest.mark.parametrize("fault", ["503 once", "503", "Ctrl-C"])
def test_a_step_of_an_upload_to_a_bucket(s3, run, shards_of, step, fault):
    pattern, answered, options = BUCKET[step]
    expected = shards_of(**options)
    if fault == "503 once":
        refusals = iter([(503, "SlowDown")])
        at(s3, pattern, lambda: next(refusals, None), answered=answered)
    elif fault == "503":
        at(s3, pattern, lambda: (503, "SlowDown"), answered=answered)
        with one_line("503 .*try again later"):
            run(**options)
    else:
        with Interruption() as interruption:
            at(s3, pattern, interruption, answered=answered)
            run(**options)
    assert objects(s3).items() <= expected.items()
    if fault != "503 once":
        s3.before_answer = lambda request: None
    run(**options)
    assert objects(s3) == expected


@pytest.mark.parametrize(
    ("step", "status", "code", "advice"),
    [
        ("part", 403, "AccessDenied", "check that the credentials allow it"),
        ("put", 400, "ExpiredToken", "log in"),
        ("put", 404, "NoSuchBucket", "check the address"),
        ("list", 404, "NoSuchBucket", "check the address"),
    ],
)
def test_a_refusal_is_one_line_with_its_reason(s3, run, shards_of, *, step, status, code, advice):
    pattern, answered, options = BUCKET[step]
    at(s3, pattern, lambda: (status, code), answered=answered)
    with one_line(f"{code}; {advice}"):
        run(**options)
    s3.before_answer = lambda request: None
    run(**options)
    assert objects(s3) == shards_of(**options)


@pytest.mark.parametrize("lasts", [False, True])
def test_an_upload_that_fails_after_an_interruption_is_made_again(s3, run, expected, lasts):
    with Interruption((403, "AccessDenied"), lasts=lasts) as interruption:
        at(s3, "PUT", interruption)
        run()
    at(s3, "PUT .*-00008-of-", interruption.end)
    run()
    assert objects(s3) == expected


def test_an_upload_that_ends_late_leaves_a_file_of_other_work_alone(s3, run, expected):
    with Interruption(lasts=True) as interruption:
        at(s3, "PUT", interruption)
        run(seed=5)
    at(s3, "PUT .*-00008-of-", interruption.end)
    run(overwrite=True)
    assert objects(s3) == expected


@pytest.mark.parametrize("step", HUB)
@pytest.mark.parametrize("fault", ["503 once", "503", "Ctrl-C"])
def test_a_step_of_an_upload_to_the_hub(hub, run, shards_of, capfd, *, step, fault):
    few = {"n_samples": 40}  # two shards
    if fault == "503 once":
        refusals = iter([(503, "")])
        at(hub, HUB[step], lambda: next(refusals, None))
    elif fault == "503":
        at(hub, HUB[step], lambda: (503, ""))
        with one_line("503 Service Unavailable; the server is overloaded"):
            run(ON_HUB, **few)
    else:
        with Interruption() as interruption:
            at(hub, HUB[step], interruption)
            run(ON_HUB, **few)
    expected = shards_of(**few)
    assert shards(hub).items() <= expected.items()
    if fault != "503 once":
        hub.before_answer = lambda request: None
    run(ON_HUB, **few)
    assert shards(hub) == expected
    assert "README.md" in hub.repos["org/name"].files
    assert capfd.readouterr().err == ""  # The client would log the URLs that it repeats.


@pytest.fixture(params=READS)
def read(request, demo_dataset):
    """Return a server, the pattern of one of its requests, and a read that makes it."""
    pattern, read = READS[request.param]
    if read is None:
        server = Web(demo_dataset)
        yield server, pattern, lambda: StepsDataset(server.url)
        server.stop()
    elif "bucket" in pattern or request.param == "range":
        server = request.getfixturevalue("s3")
        server.objects |= files_under(demo_dataset, prefix="bucket/games/")
        yield server, pattern, read
    else:
        server = request.getfixturevalue("hub")
        server.commit("org/games", files_under(demo_dataset))
        yield server, pattern, read


@pytest.mark.parametrize("fault", ["503 once", "503", "Ctrl-C"])
def test_a_step_of_a_read(read, fault):
    server, pattern, open_it = read
    if fault == "503 once":
        refusals = iter([(503, "SlowDown")])
        at(server, pattern, lambda: next(refusals, None))
    elif fault == "503":
        at(server, pattern, lambda: (503, "SlowDown"))
        with one_line("503 .*try again later"):
            open_it()
    else:
        with Interruption() as interruption:
            at(server, pattern, interruption)
            open_it()
    if fault != "503 once":
        server.before_answer = lambda request: None
    if "HEAD" in pattern:
        with one_line("no such file"):
            open_it()
    else:
        assert len(open_it()) == 14138


PROGRAM = """
import sys
from dump_activations import StepsDataset
StepsDataset(sys.argv[1])
"""


def test_a_program_that_is_interrupted_does_not_wait_for_the_answer(demo_dataset):
    web, asked = Web(demo_dataset), threading.Event()

    def hang():
        asked.set()
        threading.Event().wait(60)

    at(web, r".* 0-\d+$", hang)
    with subprocess.Popen([sys.executable, "-c", PROGRAM, web.url], stderr=subprocess.PIPE) as done:
        assert asked.wait(60)
        done.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in done.communicate(timeout=10)[1]
    web.stop()
