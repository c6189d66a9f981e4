"""Datasets and dumps behind URLs: equal to local ones, read once, and whole after any failure."""

import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread, main_thread

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from torch.utils.data import DataLoader

from alarm import interrupted_soon
from dump_activations import ActivationsFile, StepsDataset, dump, remote, stream
from dump_activations.errors import DumpActivationsError, StepIndexError
from dump_activations.remote import mirror, requests, stores
from dump_activations.storage.reading import cells
from reference.hub import Hub, files_under
from reference.web import Web

pytest.importorskip("obstore")

DUMP = {
    "outputs": "layer_outputs,pooled",
    "labels": "move_dir",
    "stats": True,
    "device": "cpu",
    "allow_cpu": True,
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, demo_checkpoint, demo_dataset):
    """Return a directory with a dataset, and dumps of it in each format, whole and in shards."""
    root = tmp_path_factory.mktemp("shelf")
    shutil.copytree(demo_dataset, root / "dataset")
    run = dict(init=demo_checkpoint, dataset=demo_dataset, n_samples=200, batch_size=32, **DUMP)
    for suffix in ("safetensors", "pt", "npz"):
        dump(**run, output=root / f"whole.{suffix}")
    dump(**run, output=root / "split.safetensors", split_layers=True)
    dump(**run, output=root / "shards.safetensors", shard_size=300_000)
    return root


@pytest.fixture
def web(shelf):
    server = Web(shelf)
    yield server
    server.stop()


def test_a_dataset_is_read_as_a_local_one(web, demo_dataset):
    remote, local = StepsDataset(f"{web.url}/dataset"), StepsDataset(demo_dataset)
    steps = local.sample_indices(300)
    assert len(remote) == len(local)
    assert remote.layout_sha256 == local.layout_sha256
    np.testing.assert_array_equal(remote.sample_indices(300), steps)
    np.testing.assert_array_equal(remote.read_boards(steps), local.read_boards(steps))
    np.testing.assert_array_equal(remote.read_rows(steps), local.read_rows(steps))
    names = ["move_dir", "merges", "run_seed"]
    for name, values in local.read_labels(steps, names).items():
        np.testing.assert_array_equal(remote.read_labels(steps, names)[name], values)
    np.testing.assert_array_equal(remote.find("max_rank >= 8"), local.find("max_rank >= 8"))


WITH_A_LOG = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
for each in ("PRAGMA journal_mode = WAL", "CREATE TABLE runs (id INT, seed INT)",
             "INSERT INTO runs VALUES (0, 5)", "COMMIT"):
    database.execute(each)
os._exit(0)
"""


def test_a_log_of_the_database_is_read_with_it(tmp_path):
    np.save(tmp_path / "steps-0.npy", np.zeros(9, [("board", "<u8"), ("run_id", "<i8")]))
    subprocess.run([sys.executable, "-c", WITH_A_LOG, tmp_path / "metadata.db"], check=True)
    assert (tmp_path / "metadata.db-wal").stat().st_size
    web = Web(tmp_path)
    assert StepsDataset(web.url).read_labels([3], "run_seed")["run_seed"].tolist() == [5]
    web.stop()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_where_a_header_ends(tmp_path, version):
    with (tmp_path / "steps.npy").open("wb") as file:
        np.lib.format.write_array(file, np.zeros(9, np.uint8), version)
    assert (
        remote.header_nbytes(tmp_path / "steps.npy") == (tmp_path / "steps.npy").stat().st_size - 9
    )


def test_only_the_blocks_of_the_rows_are_transferred_and_only_once(web, demo_dataset):
    def read():
        web.requests.clear()
        web.sent = 0
        return StepsDataset(f"{web.url}/dataset").read_boards([5, 7000, 6])

    first = read()
    # One block for the header of each shard, and one for each of the two places that are read.
    shards = len(list(demo_dataset.glob("steps-*.npy")))
    assert web.sent <= (shards + 2) * mirror.BLOCK_NBYTES
    np.testing.assert_array_equal(read(), first)
    assert web.ranges == []


def test_near_blocks_come_in_one_request_and_far_ones_apart(web):
    view = StepsDataset(f"{web.url}/dataset").path
    path, block = next(iter(sorted(view.glob("steps-*.npy")))), mirror.BLOCK_NBYTES
    web.requests.clear()
    starts = np.array([2, 5, 10, 25]) * block
    mirror.fetch(mirror.requests_for({path: (starts, starts + 1)}))
    asked = {each.split()[-1] for each in web.ranges}
    assert asked == {f"{2 * block}-{11 * block - 1}", f"{25 * block}-{26 * block - 1}"}


@pytest.mark.parametrize(
    "name",
    ["whole.safetensors", "whole.pt", "whole.npz", "split.safetensors", "shards.safetensors"],
)
def test_a_dump_is_read_as_a_local_one(web, shelf, name):
    remote, local = ActivationsFile(f"{web.url}/{name}"), ActivationsFile(shelf / name)
    assert remote.keys() == local.keys()
    assert len(remote) == len(local)
    np.testing.assert_array_equal(remote.indices, local.indices)
    np.testing.assert_array_equal(remote.labels["move_dir"], local.labels["move_dir"])
    for each in ("count", "mean", "max"):
        ours, theirs = (acts.stats("layer_outputs")[each] for acts in (remote, local))
        np.testing.assert_array_equal(ours, theirs)
    rows = [150, 3, 3, 77]
    for key in list(local.keys()):
        assert torch.equal(remote.read(key, rows), local.read(key, rows))
    ours, theirs = (
        [batch.values.clone() for batch in acts.cells("layer_outputs", layer=1, batch_size=256)]
        for acts in (remote, local)
    )
    assert all(map(torch.equal, ours, theirs))
    assert torch.equal(remote.read("pooled", verify=True), local.read("pooled"))


CELLS = {"key": "layer_outputs", "layer": 1, "batch_size": 256, "window": 200_000}


def test_windows_of_cells_are_fetched_in_turn(web, monkeypatch):
    under_way, most, seen = [], [], []

    def fetch(found, is_cancelled):
        under_way.append(1)
        most.append(len(under_way))
        seen.append(sum(each.nbytes for each in found))
        time.sleep(0.02)  # as long as the next window takes to come this far
        mirror.fetch(found, is_cancelled)
        under_way.pop()

    monkeypatch.setattr(cells, "fetch", fetch)
    list(ActivationsFile(f"{web.url}/whole.safetensors").cells(**CELLS))
    # A window has more blocks that no window had before than the windows after it.
    assert max(most) == 1
    assert len(seen) > 3
    assert seen[0] == max(seen) > seen[-1]


def test_leaving_a_loop_over_cells_ends_its_fetch(web, monkeypatch):
    first, asked, left, waited_for = Event(), Event(), Event(), []

    def hold(_request):
        asked.set()
        if not left.wait(30):
            waited_for.append(1)

    def fetch(found, is_cancelled):
        if first.is_set():
            web.before_answer = hold
        first.set()
        mirror.fetch(found, is_cancelled)

    monkeypatch.setattr(cells, "fetch", fetch)
    batches = iter(ActivationsFile(f"{web.url}/whole.safetensors").cells(**CELLS))
    next(batches)
    asked.wait()
    batches.close()
    assert not waited_for
    left.set()


def run_of_stream(*args):
    list(stream(*args, device="cpu", allow_cpu=True))


def run_of_dump(*args):
    dump(*args, device="cpu", allow_cpu=True, write=False)


@pytest.mark.parametrize("run", [run_of_dump, run_of_stream])
def test_ctrl_c_ends_a_read_of_boards(run, web, demo_checkpoint):
    left, waited_for = Event(), []

    def hold(_request):
        signal.pthread_kill(main_thread().ident, signal.SIGINT)
        if not left.wait(20):
            waited_for.append(1)

    dataset = StepsDataset(f"{web.url}/dataset")
    web.before_answer = hold
    with pytest.raises(KeyboardInterrupt):
        run(demo_checkpoint, dataset)
    assert not waited_for
    left.set()


def test_a_window_that_fails_does_not_hold_up_the_next(web, monkeypatch):
    monkeypatch.setattr(requests, "RETRIES", {"max_retries": 0, "retry_timeout": timedelta(0)})
    acts = ActivationsFile(f"{web.url}/whole.safetensors")
    web.fault = 403
    with pytest.raises(DumpActivationsError, match="403"):
        list(acts.cells(**CELLS))


def test_a_remote_dump_is_joined_to_a_local_one(web, shelf):
    both = ActivationsFile(shelf / "whole.safetensors", f"{web.url}/whole.npz")
    pooled = ActivationsFile(shelf / "whole.npz").read("pooled")
    assert torch.equal(both.read("pooled"), torch.cat([pooled, pooled]))


def test_rows_of_a_dump_cost_their_blocks(web, shelf):
    acts = ActivationsFile(f"{web.url}/split.safetensors")
    web.sent = 0
    row = acts.read("layer_outputs", [120], layer=2)
    assert web.sent <= row.nbytes + 2 * mirror.BLOCK_NBYTES


def test_a_dump_of_a_remote_dataset_and_indices_has_the_same_tensors(
    web, shelf, tmp_path, demo_checkpoint
):
    web.user = "me:secret"
    url = web.url.replace("://", "://me:secret@")
    path = tmp_path / "again.safetensors"
    dump(
        demo_checkpoint,
        f"{url}/dataset",
        output=path,
        indices=f"{url}/whole.safetensors",
        batch_size=32,
        **DUMP,
    )
    acts, expected = ActivationsFile(path), ActivationsFile(shelf / "whole.safetensors")
    for key in list(expected.keys()):
        assert torch.equal(acts.read(key), expected.read(key))
    assert acts.metadata["dataset"] == f"{web.url}/dataset"
    assert b"secret" not in path.read_bytes()


def test_inspection_reads_urls(web, shelf):
    script = "from dump_activations.__main__ import run_inspect; run_inspect()"
    command = [sys.executable, "-c", script, f"{web.url}/shards.safetensors", "--verify", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    assert found["damaged"] == []


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (401, "401 Unauthorized; log in"),
        (403, "403 Forbidden; check that the credentials"),
        (429, "429 Too Many Requests; the server asks for a pause"),
        (503, "503 Service Unavailable; the server is overloaded"),
        ("no-ranges", "the server has no ranges"),
        ("short", "answer was cut short"),
        ("hang", "no answer"),
    ],
)
def test_a_server_that_refuses_is_one_line(web, monkeypatch, fault, reason):
    monkeypatch.setitem(stores._CLIENT, "read_timeout", "200ms")
    monkeypatch.setitem(requests.RETRIES, "max_retries", 1)
    web.fault = fault
    with pytest.raises(DumpActivationsError, match=reason) as raised:
        StepsDataset(f"{web.url}/dataset")
    assert "\n" not in str(raised.value)
    web.fault = None
    assert len(StepsDataset(f"{web.url}/dataset"))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("{url}/nothing", "no such"),
        ("{url}/whole.pt", "no such|no steps"),
        ("http://127.0.0.1:9", r"no answer \(Connection refused\); try again later"),
        ("ftp://host/dataset", "must be a path, or a URL that begins with s3://"),
        ("{url}/dataset?token=secret", "a URL with a query cannot be read"),
        ("hf://org/name", "must be hf://datasets/ORG/NAME"),
    ],
)
def test_a_url_that_leads_nowhere_is_one_line(web, url, reason):
    with pytest.raises(DumpActivationsError, match=reason) as raised:
        StepsDataset(url.format(url=web.url))
    assert "secret" not in str(raised.value)


def test_a_file_that_changes_is_an_error_now_and_a_new_copy_later(tmp_path, demo_dataset):
    shutil.copytree(demo_dataset, tmp_path / "web" / "dataset")
    web = Web(tmp_path / "web")
    ds = StepsDataset(f"{web.url}/dataset")
    shard = tmp_path / "web" / "dataset" / "steps-00000.npy"
    rows = np.load(shard)
    rows["board"][:] = 0x1111
    np.save(shard, rows)
    os.utime(shard, (1, 1))
    with pytest.raises(DumpActivationsError, match=r"steps-00000\.npy changed while it was read"):
        ds.read_boards(range(4000, 4100))
    changed = StepsDataset(f"{web.url}/dataset").read_boards(range(4000, 4100))
    np.testing.assert_array_equal(
        changed, StepsDataset(shard.parent).read_boards(range(4000, 4100))
    )
    web.stop()


def test_a_block_is_written_before_its_bit(web, monkeypatch):
    ds = StepsDataset(f"{web.url}/dataset")
    real = os.pwrite

    def fails(fd, data, offset):
        if len(data) >= mirror.BLOCK_NBYTES:
            raise OSError(28, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fails)
    with pytest.raises(DumpActivationsError, match=r"cannot write the cache .*No space left"):
        ds.read_boards([3000])
    monkeypatch.undo()
    _check_blocks(ds.path, web.directory / "dataset")


def _check_blocks(view: Path, truth: Path) -> int:
    """Check that each block that is marked is the remote file's; return how many there are."""
    count = 0
    for link in view.glob("steps-*.npy"):
        bits = np.unpackbits(np.fromfile(f"{link.resolve()}.blocks", np.uint8))
        ours, theirs = link.read_bytes(), (truth / link.name).read_bytes()
        for block in np.flatnonzero(bits):
            at = slice(block * mirror.BLOCK_NBYTES, (block + 1) * mirror.BLOCK_NBYTES)
            assert ours[at] == theirs[at]
            count += 1
    return count


READ = """
import sys
from dump_activations import StepsDataset
ds = StepsDataset(sys.argv[1])
print(ds.path, flush=True)
for step in range(0, len(ds), 50):
    ds.read_boards([step])
print("done", flush=True)
"""


def test_a_kill_while_blocks_are_fetched_leaves_no_torn_one(web, moment_of_run, demo_dataset):
    command = [sys.executable, "-c", READ, f"{web.url}/dataset"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        view = Path(process.stdout.readline().strip())
        time.sleep(0.2 * moment_of_run)
        process.send_signal(signal.SIGKILL)
    assert _check_blocks(view, demo_dataset)
    ds, steps = StepsDataset(f"{web.url}/dataset"), range(0, 14000, 7)
    np.testing.assert_array_equal(
        ds.read_boards(steps), StepsDataset(demo_dataset).read_boards(steps)
    )


def test_workers_read_when_they_are_spawned(web, demo_dataset):
    ds = StepsDataset(f"{web.url}/dataset")
    loader = DataLoader(
        ds, batch_size=64, sampler=range(640), num_workers=1, multiprocessing_context="spawn"
    )
    boards = torch.cat(list(loader)).numpy()
    np.testing.assert_array_equal(boards, StepsDataset(demo_dataset).read_boards(range(640)))


def test_a_scan_notes_what_it_transfers_and_the_second_one_nothing(web, recwarn):
    ds = StepsDataset(f"{web.url}/dataset")
    expected = sum(-(-each.path.stat().st_size // 4096) for each in ds.shards) * 4096
    sent = web.sent
    found = ds.find("max_rank >= 8")
    [noted] = [str(each.message) for each in recwarn.list]
    assert noted.startswith("a scan of 14,138 remote rows transfers ")
    assert abs(float(noted.split()[-2]) * 1000 - (web.sent - sent)) < 20_000 < expected
    np.testing.assert_array_equal(StepsDataset(f"{web.url}/dataset").find("max_rank >= 8"), found)
    assert len(recwarn.list) == 1


def test_a_program_that_ends_after_its_last_read_ends_quietly(web):
    program = "import sys; from dump_activations import StepsDataset as S; S(sys.argv[1])[5]"
    for _ in range(6):
        command = [sys.executable, "-c", program, f"{web.url}/dataset"]
        subprocess.run(command, check=True, timeout=60)


def test_a_forked_worker_is_told_to_be_spawned(web):
    ds = StepsDataset(f"{web.url}/dataset")

    def read(answers):
        try:
            ds.read_boards([2500])
        except DumpActivationsError as error:
            answers.put(str(error))

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    process = context.Process(target=read, args=(answers,))
    process.start()
    assert "multiprocessing_context='spawn'" in answers.get(timeout=30)
    process.join()


def test_the_cache_makes_room_but_not_of_what_is_read(web, cache, monkeypatch):
    script = "import sys; from dump_activations import ActivationsFile as A; A(sys.argv[1])"

    def open_elsewhere(name):
        subprocess.run([sys.executable, "-c", script, f"{web.url}/{name}"], check=True)

    def mirrored():
        described = (cache / "files").glob("*.json")
        return {json.loads(path.read_text())["file"]["name"] for path in described}

    open_elsewhere("whole.pt")
    monkeypatch.setenv(mirror.SIZE_VARIABLE, "0")
    acts = ActivationsFile(f"{web.url}/whole.npz")
    assert mirrored() == {"whole.npz"}
    open_elsewhere("split.safetensors")
    assert mirrored() == {"whole.npz", "split.safetensors"}
    assert len(acts.read("pooled", [4]))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_the_cache_of_another_user_is_refused(web, cache):
    cache.mkdir()
    os.chown(cache, 12345, -1)
    with pytest.raises(DumpActivationsError, match="belongs to another user"):
        StepsDataset(f"{web.url}/dataset")


def test_without_the_extra_a_url_is_one_line(web, monkeypatch):
    monkeypatch.setattr(stores, "find_spec", lambda name: None)
    with pytest.raises(DumpActivationsError, match=r"pip install 'dump-activations\[remote\]'"):
        StepsDataset(f"{web.url}/dataset")


FROM_HUB = """
import sys
import numpy as np
from dump_activations import StepsDataset, ActivationsFile
ds, local = StepsDataset(sys.argv[1]), StepsDataset(sys.argv[2])
steps = local.sample_indices(100)
np.testing.assert_array_equal(ds.read_boards(steps), local.read_boards(steps))
of_runs = [each.read_labels(steps, ["run_seed"])["run_seed"] for each in (ds, local)]
print((of_runs[0] == of_runs[1]).all())
"""


@pytest.mark.parametrize("address", ["hf://datasets/org/games/d2", "hf://datasets/org/games@v1/d2"])
def test_a_dataset_on_the_hub_is_read_by_ranges(tmp_path, demo_dataset, address):
    hub = Hub()
    revision = "v1" if "@" in address else "main"
    for ref in ("main", "v1"):
        files = files_under(demo_dataset, prefix="d2/") if ref == revision else {"README.md": b""}
        hub.commit("org/games", files, ref=ref)
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", FROM_HUB, address, str(demo_dataset)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    hub.stop()
    assert done.stdout == "True\n", done.stderr


class _Redirecting(BaseHTTPRequestHandler):
    """A hub that sends readers to another server, and that server: both keep the credentials."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.credentials = self.headers["Authorization"]
        if self.server.target is not None:
            self.send_response(302)
            self.send_header("Location", self.server.target)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206)
        self.send_header("Content-Range", "bytes 0-3/9")
        self.send_header("Content-Length", "4")
        self.send_header("Last-Modified", self.date_time_string(0))
        self.end_headers()
        self.wfile.write(b"data")


@pytest.fixture
def servers():
    """Return a server that redirects each request, and the other one, which answers it."""
    both = [ThreadingHTTPServer(("127.0.0.1", 0), _Redirecting) for _ in range(2)]
    for server in both:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    first, elsewhere = both
    elsewhere.target = None
    first.target = f"http://127.0.0.1:{elsewhere.server_address[1]}/file"
    yield both
    for server in both:
        server.shutdown()
        server.server_close()


def test_the_token_stays_with_the_hub(servers, monkeypatch):
    hub, elsewhere = servers
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.server_address[1]}")
    monkeypatch.setenv("HF_TOKEN", "secret")
    location = stores.Location.of("hf://datasets/org/name", "commit")
    data = location.read(stores.RemoteFile("file", 9), 0, 4)
    assert bytes(data) == b"data"
    assert hub.credentials == "Bearer secret"
    assert elsewhere.credentials is None


@pytest.mark.parametrize("asks", ["list", "read"])
def test_a_password_stays_with_its_server(servers, asks):
    web, elsewhere = servers
    location = stores.Location.of(f"http://me:a%20b@127.0.0.1:{web.server_address[1]}/dataset")
    if asks == "list":
        assert location.list(lambda _name: True) == []
    else:
        location.read(stores.RemoteFile("file", 9, None, 0), 0, 4)
    assert web.credentials == "Basic bWU6YSBi"  # me:a b
    assert elsewhere.credentials is None


@pytest.mark.parametrize("steps", [[-1], [3, 10**12]])
def test_steps_outside_are_told_as_of_a_local_dataset(web, steps):
    with pytest.raises(StepIndexError):
        StepsDataset(f"{web.url}/dataset").read_boards(steps)


def test_an_interruption_leaves_out_the_requests_that_have_not_begun():
    ends, begun = Event(), []

    def request(number):
        begun.append(number)
        ends.wait(60)

    try:
        with interrupted_soon():
            requests.run_all([partial(request, i) for i in range(9)], at_once=2)
    finally:
        ends.set()
    assert begun == [0, 1]


def test_a_process_keeps_the_marks_of_others(web):
    path = min(StepsDataset(f"{web.url}/dataset").path.glob("*.npy")).resolve()
    ours, others = mirror._Mirror(path), mirror._Mirror(path)
    others._mark(8, 10)
    ours._mark(12, 14)
    bits = np.unpackbits(np.fromfile(f"{path}.blocks", np.uint8))
    assert bits[8:16].tolist() == [1, 1, 0, 0, 1, 1, 0, 0]


def test_the_cache_keeps_what_was_used_last_and_is_private(cache, monkeypatch):
    location = stores.Location.of("http://127.0.0.1:9/dumps")

    def use(name):
        view = mirror.view_of(location, [stores.RemoteFile(name, 1000, None, 0)])
        (view / name).write_bytes(b"x" * 1000)  # takes a block of 4,096 bytes
        return (view / name).resolve()

    kept = [use(name) for name in "ab"]
    for age, each in enumerate(kept, 1):
        os.utime(f"{each}.json", (age, age))
    use("a")
    monkeypatch.setenv(mirror.SIZE_VARIABLE, "5e-6")
    use("c")
    assert [each.exists() for each in kept] == [True, False]
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_mirror_is_described_when_it_is_there(cache, monkeypatch):
    """Without its length and bits, a copy would be read as one that is whole."""
    real = Path.open

    def full(path, mode="r", *more, **others):
        if mode == "ab":
            raise OSError(28, "No space left on device")
        return real(path, mode, *more, **others)

    monkeypatch.setattr(Path, "open", full)
    location = stores.Location.of("http://127.0.0.1:9/dumps")
    with pytest.raises(DumpActivationsError, match=r"cannot write the cache .*No space left"):
        mirror.view_of(location, [stores.RemoteFile("a", 1000, None, 0)])
    assert list((cache / "files").glob("*.json")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_description_of_another_user_is_not_followed(tmp_path):
    location = stores.Location.of("http://127.0.0.1:9/dumps")
    view = mirror.view_of(location, [stores.RemoteFile("a", 1000, None, 0)])
    (tmp_path / "link").symlink_to((view / "a").resolve())
    os.chown(f"{(view / 'a').resolve()}.json", 12345, -1)
    assert not mirror.is_mirror(tmp_path / "link")
