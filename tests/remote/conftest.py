"""A cache of its own for each test, servers to write to, and a small run with its local shards."""

import functools
import json

import pytest
from huggingface_hub import constants

from dump_activations import dump
from dump_activations.remote import mirror, upload
from reference.azure import Azure
from reference.hub import Hub
from reference.s3 import S3

RUN = {
    "shard_size": 300_000,
    **{"outputs": "layer_outputs", "labels": "move_dir", "stats": True},
    **{"n_samples": 160, "batch_size": 20, "device": "cpu", "allow_cpu": True},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(mirror.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(upload, "_uploads", {})
    monkeypatch.setattr(mirror, "_locations", {})
    monkeypatch.setattr(upload, "_POLL_SECONDS", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def s3(monkeypatch):
    server = S3()
    settings = {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "here"}
    for name, value in {**settings, "ENDPOINT_URL": server.url}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    yield server
    server.stop()


@pytest.fixture
def gcs(tmp_path, monkeypatch):
    server, path = S3(), tmp_path / "account.json"
    account = {"gcs_base_url": server.url, "disable_oauth": True}
    path.write_text(
        json.dumps({**account, "client_email": "", "private_key": "", "private_key_id": ""})
    )
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(path))
    yield server
    server.stop()


@pytest.fixture
def azure(monkeypatch):
    server = Azure()
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"{server.url}/account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "a2V5")
    yield server
    server.stop()


@pytest.fixture
def hub(monkeypatch):
    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.stop()


@pytest.fixture
def run(demo_checkpoint, demo_dataset):
    def run(output="s3://bucket/runs/a.safetensors", dataset=demo_dataset, **options):
        return dump(demo_checkpoint, dataset, output, **{**RUN, **options})

    run.options = RUN
    return run


@pytest.fixture(scope="session")
def shards_of(tmp_path_factory, demo_checkpoint, demo_dataset):
    """Return a function that gives the bytes of the shards of a local dump, by name."""

    @functools.cache
    def shards_of(**options):
        path = tmp_path_factory.mktemp("local") / "a.safetensors"
        dump(demo_checkpoint, demo_dataset, path, **{**RUN, **options})
        return {each.name: each.read_bytes() for each in path.parent.iterdir()}

    return shards_of


@pytest.fixture(scope="session")
def expected(shards_of):
    """Return the bytes of the shards of a local dump, by name."""
    return shards_of()
