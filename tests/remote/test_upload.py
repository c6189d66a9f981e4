"""Dumps to buckets and to the hub: the bytes of local ones, whole or absent after any failure."""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dump_activations import ActivationsFile, OutputError, StepsDataset, write_report
from dump_activations.commands.inspect import main
from dump_activations.errors import (
    DumpActivationsError,
    DumpActivationsNote,
    InvalidArgumentError,
)
from dump_activations.remote import mirror, stores, upload
from reference.hub import files_under
from reference.web import Web

pytest.importorskip("obstore")

URL = "s3://bucket/runs/a.safetensors"


@pytest.fixture
def outputs(cache):
    """Return the directory in the cache that stands for the bucket's."""
    return cache / "outputs" / "s3" / "bucket" / "runs"


def found(s3):
    return {name.removeprefix("bucket/runs/"): each for name, each in s3.objects.items()}


def local_files(directory):
    return [each for each in directory.iterdir() if not each.is_symlink()]


def test_shards_are_those_of_a_local_dump_and_read_back(s3, run, outputs, expected, tmp_path):
    summary = run()
    assert found(s3) == expected
    assert len(expected) == summary.shards_written > 3
    assert str(summary.output) == URL
    assert local_files(outputs) == []
    run(tmp_path / "whole.safetensors", shard_size=None)
    there, here = ActivationsFile(URL), ActivationsFile(tmp_path / "whole.safetensors")
    for key in ("layer_outputs", "boards", "indices"):
        assert torch.equal(there.read(key), here.read(key))
    np.testing.assert_array_equal(there.labels["move_dir"], here.labels["move_dir"])


@pytest.mark.parametrize(("scheme", "server"), [("gs", "gcs"), ("az", "azure")])
@pytest.mark.parametrize("options", [{}, {"n_samples": 500, "shard_size": "1GB"}])
def test_other_buckets_get_the_same_shards(
    request, run, shards_of, tmp_path, *, scheme, server, options
):
    bucket, url = request.getfixturevalue(server), f"{scheme}://bucket/runs/a.safetensors"
    expected = shards_of(**options)
    run(url, **options)
    assert found(bucket) == expected
    parts = [each for each in bucket.requests if re.search("partNumber|block", each)]
    assert len(parts) >= 2 if options else not parts
    assert run(url, **options).shards_written == 0
    for name, content in expected.items():
        (tmp_path / name).write_bytes(content)
    there, here = ActivationsFile(url), ActivationsFile(tmp_path / "a.safetensors")
    assert torch.equal(there.read("layer_outputs"), here.read("layer_outputs"))


@pytest.mark.parametrize(("scheme", "server"), [("gs", "gcs"), ("az", "azure")])
def test_other_buckets_are_read(request, demo_dataset, scheme, server):
    bucket = request.getfixturevalue(server)
    bucket.objects |= files_under(demo_dataset, prefix="bucket/games/")
    there, here = StepsDataset(f"{scheme}://bucket/games"), StepsDataset(demo_dataset)
    np.testing.assert_array_equal(there.read_rows([5, 7000]), here.read_rows([5, 7000]))
    with pytest.raises(DumpActivationsError, match=f"{scheme}://bucket/b.pt: no such file"):
        ActivationsFile(f"{scheme}://bucket/b.pt")


def test_at_most_two_shards_are_local(s3, run, outputs):
    seen = []

    def look(request):
        """Let an upload last until the next shard is begun, and for 20 looks then."""
        left = 20 if re.match("PUT .*-0000[1-6]-of-", request) else 0
        while True:
            seen.append([each.name for each in local_files(outputs) if "journal" not in each.name])
            if left == 0:
                return
            left -= len(seen[-1]) > 1
            time.sleep(0.01)

    s3.before_answer = look
    run()
    assert max(map(len, seen)) == upload.MOST_LOCAL, seen


def test_a_large_shard_is_uploaded_in_parts(s3, run, expected):
    run(n_samples=500, shard_size=None)
    assert list(found(s3)) == ["a-00001-of-00001.safetensors"]
    assert len([each for each in s3.requests if each.startswith("POST")]) == 2
    assert len(ActivationsFile(URL)) == 500


def test_a_later_call_finds_what_is_there_without_the_cache(s3, run, tmp_path, monkeypatch):
    run()
    before = dict(s3.objects)
    monkeypatch.setenv(mirror.CACHE_VARIABLE, str(tmp_path / "another"))
    del s3.objects["bucket/runs/a-00002-of-00008.safetensors"]
    monkeypatch.setattr(upload, "_uploads", {})
    summary = run()
    assert (summary.shards_written, summary.resumed_boards) == (1, 140)
    assert s3.objects == before


def test_shards_that_another_machine_replaced_are_found(s3, run, tmp_path, monkeypatch):
    run(seed=5)
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv(mirror.CACHE_VARIABLE, str(tmp_path / "another"))
        elsewhere.setattr(upload, "_uploads", {})
        run(overwrite=True)
    assert run().shards_written == 0


def test_each_rank_writes_its_share(s3, run, expected, demo_checkpoint, demo_dataset):
    command = [sys.executable, "-m", "dump_activations", "--init", demo_checkpoint]
    command += ["--dataset", demo_dataset, "-o", URL, "--shard-size", "300000", "--n-samples=160"]
    command += ["--outputs=layer_outputs", "--labels=move_dir", "--stats", "--batch-size=20"]
    command += ["--device=cpu", "--allow-cpu"]
    for rank in "01":
        environment = {**os.environ, "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        subprocess.run(command, check=True, env=environment, capture_output=True)
        assert len(s3.objects) == [4, 8][int(rank)]
    assert found(s3) == expected


def test_other_work_is_refused_and_replaced_when_asked(s3, run, expected):
    run(seed=5)
    before = dict(s3.objects)
    with pytest.raises(OutputError, match="differs in seed"):
        run()
    assert s3.objects == before
    run(overwrite=True)
    assert found(s3) == expected


def test_a_listing_leaves_a_link_alone_that_is_being_made(s3, run, outputs, monkeypatch):
    run()
    path = outputs / "a-00002-of-00008.safetensors"
    path.unlink()
    path.write_bytes(b"still to be uploaded")
    make = Path.symlink_to

    def made(link, target):
        make(link, target)
        upload.uploads_of(outputs).refresh("a")

    monkeypatch.setattr(Path, "symlink_to", made)
    location = stores.Location.of("s3://bucket/runs")
    mirror.become_mirror(path, location, location.head(path.name))
    assert path.is_symlink()


@pytest.mark.parametrize("refused", ["00003", "00008"])
def test_a_refused_upload_keeps_its_shard_and_the_same_call_uploads_it(
    s3, run, outputs, expected, refused
):
    s3.before_answer = lambda request: (
        (403, "AccessDenied") if request.startswith("PUT") and f"-{refused}-of" in request else None
    )
    with pytest.raises(
        DumpActivationsError, match=rf"{refused}.*403 AccessDenied.*is kept"
    ) as error:
        run()
    assert f"a-{refused}-of-00008.safetensors" not in found(s3)
    assert (outputs / f"a-{refused}-of-00008.safetensors").is_file()
    told = " ".join([str(error.value), *error.value.__notes__])
    assert "the same call" in told
    assert "complete" not in told
    s3.before_answer = lambda request: None
    run()
    assert found(s3) == expected


REQUESTS = 3 * 8  # A shard is listed for, written and looked at.


def test_a_kill_leaves_whole_shards_and_the_same_call_does_the_rest(
    s3, run, expected, *, demo_checkpoint, demo_dataset, moment_of_run
):
    program = f"""
from dump_activations import dump
dump({str(demo_checkpoint)!r}, {str(demo_dataset)!r}, {URL!r}, **{run.options!r})
"""
    numbers = itertools.count()
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        s3.before_answer = lambda request: (
            process.kill() if next(numbers) == int(REQUESTS * moment_of_run) else None
        )
    assert process.returncode == -signal.SIGKILL
    assert found(s3).items() <= expected.items()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert found(s3) == expected


@pytest.mark.parametrize(
    ("url", "error"),
    [
        (
            "https://host/a.safetensors",
            "output must be a path, or a URL of a file that begins with s3://",
        ),
        (
            "ftp://host/a.safetensors",
            "output must be a path, or a URL of a file that begins with s3://",
        ),
        ("s3://a.safetensors", "output must be a path, or a URL of a file"),
        ("s3://bucket/a.pt?sig=secret", "bucket/a.pt: output .* has no query"),
        ("s3://bucket/a.parquet", "a.parquet"),
        ("hf://models/org/name/a.pt", "the address of a dataset must be hf://datasets/"),
    ],
)
def test_urls_that_cannot_be_written(s3, run, url, error):
    with pytest.raises(InvalidArgumentError, match=error):
        run(url)


def test_the_hub_gets_a_private_dataset_with_a_card(hub, run, expected, capfd):
    url = "hf://datasets/org/name/a.safetensors"
    with pytest.warns(DumpActivationsNote, match="made a private dataset"):
        run(url)
    repo = hub.repos["org/name"]
    files = dict(repo.files)
    assert repo.visibility == "private"
    card = files.pop("README.md").decode()
    assert f'ActivationsFile("{url}")' in card
    metadata = ActivationsFile(url).metadata
    for name in ("checkpoint", "dataset", "seed", "n_samples", "dump_activations_version"):
        assert f"* {name}: `{metadata[name]}`\n" in card
    assert "| `layer_outputs` | float32 | (4, 16, 64) |\n" in card
    assert {name: files[name] for name in expected} == expected
    assert len(ActivationsFile(url)) == 160
    assert run(url).shards_written == 0
    assert "%|" not in capfd.readouterr().err


def test_a_card_that_is_there_stays_and_a_new_one_has_no_secrets(hub, run, demo_dataset):
    web = Web(demo_dataset)
    web.user = "me:secret"
    url = web.url.replace("://", "://me:secret@")
    hub.commit("org/other", {"README.md": b"mine"})
    for repo in ("name", "other"):
        run(f"hf://datasets/org/{repo}/a.npz", dataset=url, where="max_rank >= 3", n_samples=20)
    web.stop()
    assert hub.repos["org/other"].files["README.md"] == b"mine"
    card = hub.repos["org/name"].files["README.md"].decode()
    assert f"* dataset: `{web.url}`\n" in card
    assert "* where: `max_rank >= 3`\n" in card
    assert "secret" not in card


@pytest.mark.parametrize("scheme", ["s3", "gs", "az", "hf"])
def test_a_report_is_written_next_to_a_dump(request, run, tmp_path, scheme):
    server = request.getfixturevalue({"gs": "gcs", "az": "azure", "hf": "hub"}.get(scheme, scheme))
    directory = "hf://datasets/org/name" if scheme == "hf" else f"{scheme}://bucket/runs"
    run(f"{directory}/a.pt")
    for _ in range(2):  # The second replaces the first.
        assert main([f"{directory}/a.pt", "--report", f"{directory}/report.html"]) == 0
    write_report(f"{directory}/a.pt", tmp_path / "report.html")
    files = server.repos["org/name"].files if scheme == "hf" else found(server)
    assert f"{directory}/a.pt".encode() in files["report.html"]
    assert os.fspath(tmp_path).encode() not in files["report.html"]
    assert files["report.html"] == (tmp_path / "report.html").read_bytes()
    if scheme == "s3":
        assert server.types["bucket/runs/report.html"] == "text/html"


@pytest.mark.parametrize("content", [b"mine", b""])
def test_a_file_in_a_bucket_that_is_not_a_report_stays(s3, run, content):
    run()
    s3.objects["bucket/runs/report.html"] = content
    with pytest.raises(OutputError, match=r"s3://bucket/runs/report\.html exists and is not"):
        write_report(URL, "s3://bucket/runs/report.html")
    assert s3.objects["bucket/runs/report.html"] == content


@pytest.mark.parametrize("url", ["https://host/report.html", "ftp://me:secret@host/report.html"])
def test_a_report_needs_a_place_that_can_be_written(s3, run, url):
    run()
    with pytest.raises(InvalidArgumentError, match=r"host/report\.html: report must be") as error:
        write_report(URL, url)
    assert "secret" not in str(error.value)
