"""`hf://` through the real huggingface-hub client, against a hub on the loopback."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from dump_activations.model import hub as hub_module
from reference.checkpoints import (
    BASE,
    WEIGHT_FILES,
    config_json,
    load_demo,
    random_state_dict,
    save_checkpoint,
    save_weights,
)
from reference.datasets import naive_boards, numpy_indices, random_boards, read_dataset
from reference.dumps import read_dump
from reference.hub import Hub, files_under
from reference.model import assert_close, naive_dump, naive_forward

BOARDS = random_boards(5, seed=2)


@dataclass
class Session:
    """A process with a cache of its own that loads what it is told to."""

    process: subprocess.Popen
    home: Path
    stderr: Path

    def ask(self, init, timeout=60):
        request = {"init": init, "boards": BOARDS.tolist(), "timeout": timeout}
        json.dump(request, self.process.stdin)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def logits(self, init, **options):
        answer = self.ask(init, **options)
        assert "error" not in answer, answer["error"]
        return np.array(answer["logits"])

    def error(self, init):
        """Return the answer of a load that must end in a one-line error."""
        answer = self.ask(init)
        assert "error" in answer
        assert "DumpActivationsError" in answer["kinds"], answer
        assert "\n" not in answer["error"]
        assert init in answer["error"]
        return answer


def hub_environment(hub, home):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    return inherited | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "no_proxy": "127.0.0.1"}


@pytest.fixture(scope="module")
def hub():
    server = Hub()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def session(hub, tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    home, stderr = root / "cache", root / "stderr"
    with stderr.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "hub_session.py")],
            env=hub_environment(hub, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    yield Session(process, home, stderr)
    process.stdin.close()
    assert process.wait(timeout=30) == 0


@pytest.fixture(autouse=True)
def _as_new(hub):
    hub.downloads.clear()
    hub.requests.clear()
    yield
    hub.refusal, hub.refuses_all, hub.after_listing = None, False, lambda: None
    hub.answers.set()
    if not hub.is_up:
        hub.start()


@pytest.fixture
def outside(session):
    """Return the files around the cache; afterwards check that they are still the same."""

    def listing():
        return {each for each in session.home.parent.rglob("*") if session.home not in each.parents}

    before = listing() | {session.home}
    yield
    assert listing() | {session.home} == before


def checkpoint_files(root, *, seed=0, weights="model.safetensors"):
    """Return the files of a checkpoint directory, and the logits its model gives."""
    state_dict = random_state_dict(BASE, seed=seed)
    save_checkpoint(root, state_dict, config_json(BASE), weights=weights)
    return files_under(root), naive_forward(state_dict, BASE, BOARDS)[1]


def test_the_commit_and_the_tokenizer_are_kept(hub, session, tmp_path):
    files, _ = checkpoint_files(tmp_path / "a")
    files = {f"sub/{name}": data for name, data in files.items()}
    commit = hub.commit("lab/kept", files | {"sub/tokenizer.json": b'{"bins": [1]}'})
    later = hub.commit("lab/kept", files | {"README.md": b"x"}, ref="v2")
    assert session.ask("hf://lab/kept/sub")["tokenizer"] == '{"bins": [1]}'
    for revision in ("", "@main", f"@{commit}"):
        assert session.ask(f"hf://lab/kept/sub{revision}")["commit"] == commit
    moved = session.ask("hf://lab/kept/sub@v2")
    assert (moved["commit"], moved["tokenizer"]) == (later, None)
    hub.stop()
    assert session.ask("hf://lab/kept/sub@v2")["commit"] == later


def sharded_files(root):
    state_dict = random_state_dict(BASE)
    shards = {f"model-0000{i}-of-00002.safetensors": list(state_dict)[i - 1 :: 2] for i in (1, 2)}
    save_checkpoint(root, {}, config_json(BASE), weights="model-stable.safetensors")
    for file, names in shards.items():
        save_weights(root / file, {name: state_dict[name] for name in names}, {})
    weight_map = {name: file for file, names in shards.items() for name in names}
    (root / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return ["config.json", *shards, "model.safetensors.index.json"]


def bundle_alone(root):
    save_weights(root / "model.pt", random_state_dict(BASE), config_json(BASE))
    return ["model.pt"]


def preferred(weights, root):
    """Write files that are read later, and some that are not read."""
    later = WEIGHT_FILES[WEIGHT_FILES.index(weights) + 1 :]
    others = ("README.md", "optimizer.pt", "model-1-of-2.safetensors", "sub/model-best.safetensors")
    save_checkpoint(root, random_state_dict(BASE), config_json(BASE), weights=weights)
    (root / "sub").mkdir()
    for name in (*later, *others):
        (root / name).write_bytes(b"other")
    return ["config.json", weights]


@pytest.mark.parametrize(
    "write", [sharded_files, bundle_alone, *(partial(preferred, name) for name in WEIGHT_FILES)]
)
def test_the_files_of_the_checkpoint_are_downloaded_alone(write, hub, session, tmp_path):
    needed = write(tmp_path)
    repo = f"lab/files-{len(hub.repos)}"
    hub.commit(repo, files_under(tmp_path))
    logits = naive_forward(random_state_dict(BASE), BASE, BOARDS)[1]
    assert_close(session.logits(f"hf://{repo}"), logits)
    assert sorted(hub.downloads) == needed


@pytest.mark.parametrize(
    ("folder", "ref"),
    [("step-100", "main"), ("runs/a/best", "main"), ("[ab]", "main"), ("x/y", "refs/pr/1")],
)
def test_a_subdirectory_of_a_revision(folder, ref, hub, session, tmp_path):
    files, logits = checkpoint_files(tmp_path / "below", seed=2)
    other, _ = checkpoint_files(tmp_path / "other", seed=1)
    below = {f"{folder}/{name}": data for name, data in files.items()}
    repo = f"lab/sub-{ord(folder[0])}"
    hub.commit(repo, {"README.md": b"empty"})
    hub.commit(repo, below | other | {f"a/{name}": data for name, data in other.items()}, ref=ref)
    assert_close(session.logits(f"hf://{repo}/{folder}@{ref}"), logits)
    assert sorted(hub.downloads) == [f"{folder}/config.json", f"{folder}/model.safetensors"]


def test_revisions_are_found_and_a_moved_branch_is_followed(hub, session, tmp_path):
    expected = {}
    for seed, ref in enumerate(("main", "v0.1", "refs/pr/1")):
        files, logits = checkpoint_files(tmp_path / str(seed), seed=seed)
        commit = hub.commit("lab/revised", files, ref=ref)
        expected |= {ref: logits, commit: logits}
    for revision, logits in expected.items():
        assert_close(session.logits(f"hf://lab/revised@{revision}"), logits)
    assert_close(session.logits("hf://lab/revised"), expected["main"])
    files, logits = checkpoint_files(tmp_path / "later", seed=9)
    hub.commit("lab/revised", files)
    assert_close(session.logits("hf://lab/revised"), logits)


@pytest.mark.parametrize(
    ("path", "names", "words"),
    [
        ("none", [], "no such repository"),
        ("flat@v9", ["config.json", "model.pt"], "no revision v9"),
        ("flat/nowhere", ["config.json", "model.pt"], "not a checkpoint"),
        ("readme", ["README.md"], "not a checkpoint"),
        ("config", ["config.json"], "no weights"),
        ("step", ["config.json", "model-step-1.pt"], "it has model-step-1.pt"),
    ],
)
def test_a_missing_repository_revision_or_checkpoint_is_named(path, names, words, hub, session):
    if names:
        hub.commit(f"lab/{path.partition('@')[0].partition('/')[0]}", dict.fromkeys(names, b"{}"))
    answer = session.error(f"hf://lab/{path}")
    assert words in answer["error"]
    assert "FileNotFoundError" in answer["kinds"]
    assert hub.downloads == []


def test_cached_checkpoint_without_the_hub(hub, session, tmp_path):
    files, logits = checkpoint_files(tmp_path / "a", seed=4)
    commit = hub.commit("lab/cached", {f"sub/{name}": data for name, data in files.items()})
    hub.commit("lab/cached", {f"sub/{name}": data for name, data in files.items()}, ref="refs/pr/1")
    for revision in ("", "@refs/pr/1"):
        assert_close(session.logits(f"hf://lab/cached/sub{revision}"), logits)
    hub.stop()
    for revision in ("", "@refs/pr/1", f"@{commit}"):
        assert_close(session.logits(f"hf://lab/cached/sub{revision}"), logits)
    for missing in ("never-seen", "cached", "cached@" + "v" * 300, "cached/" + "s" * 300):
        assert "no checkpoint is cached" in session.error(f"hf://lab/{missing}")["error"]
    (ref,) = session.home.rglob("models--lab--cached/refs/main")
    ref.write_bytes(b"\xff\xfe")
    session.error("hf://lab/cached/sub")


def test_a_cached_checkpoint_next_to_files_that_were_never_downloaded(tmp_path, monkeypatch):
    """From 2.0 on the client compares a snapshot with a listing, but for the patterns it gets."""

    def snapshot_download(repo_id, *, allow_patterns=None, **options):
        if allow_patterns is None:
            raise LocalEntryNotFoundError("incomplete")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert hub_module._cached("lab/cached", "", "main", list) == tmp_path


GATED = "Access to model lab/refused is restricted"
EXPIRED = "Invalid credentials in Authorization header"
REFUSALS = [
    ((401, "GatedRepo", GATED), ["gated", "ask for access", "hf auth login"]),
    ((403, "GatedRepo", GATED), ["gated", "ask for access", "hf auth login"]),
    ((401, "", EXPIRED), [EXPIRED, "hf auth login"]),
    ((403, "", "This token may not read"), ["This token may not read", "check that the token"]),
    ((429, "", "We had to rate limit you"), ["We had to rate limit you", "wait"]),
    ((503, "", "Out of order"), ["cannot be reached", "Out of order"]),
]


@pytest.mark.parametrize("refuses_all", [False, True])
@pytest.mark.parametrize(("refusal", "words"), REFUSALS)
def test_a_refusal_gives_the_hubs_reason_and_a_way_out(refuses_all, refusal, words, hub, session):
    hub.commit("lab/refused", {"config.json": b"{}", "model.safetensors": b"x"})
    hub.refusal, hub.refuses_all = refusal, refuses_all
    answer = session.error("hf://lab/refused")
    assert ("CheckpointError" in answer["kinds"]) == (refusal[0] < 500)
    for word in (*words, "no checkpoint is cached"):
        assert word in answer["error"]


@pytest.fixture(scope="module")
def outdated(hub, session, tmp_path_factory):
    """Return the logits of a cached checkpoint whose branch has moved since."""
    files, logits = checkpoint_files(tmp_path_factory.mktemp("old"), seed=6)
    hub.commit("lab/outdated", files)
    assert_close(session.logits("hf://lab/outdated"), logits)
    later, _ = checkpoint_files(tmp_path_factory.mktemp("new"), seed=7)
    hub.commit("lab/outdated", later)
    return logits


@pytest.mark.parametrize("refuses_all", [False, True])
@pytest.mark.parametrize("case", [*REFUSALS, ((404, "RepoNotFound", ""), ["private"])])
def test_a_refusal_gives_way_to_the_cache(refuses_all, case, outdated, hub, session):
    """As in the hub's own tools: a token that expired does not take a checkpoint away."""
    (hub.refusal, words), hub.refuses_all = case, refuses_all
    answer = session.ask("hf://lab/outdated")
    assert_close(np.array(answer["logits"]), outdated)
    (warning,) = answer["warnings"]
    for word in (*words, "using the cached checkpoint"):
        assert word in warning


@pytest.mark.parametrize("after_listing", [False, True])
def test_a_hub_that_never_answers_gives_way_to_the_cache(after_listing, outdated, hub, session):
    hub.after_listing = hub.answers.clear
    if not after_listing:
        hub.answers.clear()
    assert_close(session.logits("hf://lab/outdated", timeout=1), outdated)


def test_a_branch_that_moves_meanwhile_gives_one_commit(hub, session, tmp_path):
    files, logits = checkpoint_files(tmp_path / "a", seed=7)
    later, _ = checkpoint_files(tmp_path / "b", seed=8)
    commit = hub.commit("lab/racing", files)
    hub.after_listing = lambda: hub.commit("lab/racing", later)
    answer = session.ask("hf://lab/racing")
    assert answer["commit"] == commit
    assert_close(np.array(answer["logits"]), logits)


@pytest.mark.parametrize(
    "init",
    [
        *("hf://", "hf://lab", "hf:///repo", "hf://lab/repo@", "hf://lab//sub", "hf://@main"),
        *("hf://la b/repo", "hf://lab/a--b", "hf://lab/" + "r" * 97, "hf://lab/re?po"),
        *("hf://../x", "hf://lab/..", "hf://lab/repo/../../etc", "hf://lab/repo/a/../b"),
        *("hf://lab/repo//etc/passwd", "hf://lab/repo/./a", "hf://lab/repo/a\\..\\..\\b"),
        *("hf://lab/repo@../../main", "hf://lab/repo@/etc", "hf://lab/repo@v1/.."),
        *("hf://datasets/lab/repo", "hf://spaces/lab/repo@main"),
        *("https://huggingface.co/lab/repo/tree/main", "s3://bucket/model.pt"),
    ],
)
def test_malformed_names_are_refused_before_any_request(init, hub, session, outside):
    answer = session.error(init)
    assert "InvalidArgumentError" in answer["kinds"]
    assert "hf://org/repo" in answer["error"] or "plain relative names" in answer["error"]
    assert hub.requests == []


@pytest.mark.parametrize(
    ("page", "address"),
    [
        ("hf://lab/repo/tree/main", "give hf://lab/repo@main"),
        ("hf://lab/repo/tree/v1/step-100/best", "give hf://lab/repo/step-100/best@v1"),
        ("hf://lab/repo/blob/main/a", "give hf://lab/repo/a@main"),
    ],
)
def test_the_address_of_a_page_is_named_as_one(page, address, session):
    assert session.error(page)["error"].endswith(address)


def test_a_hub_that_lists_names_outside_the_repository(hub, session, tmp_path, outside):
    files, logits = checkpoint_files(tmp_path / "a", seed=5)
    evil = {
        "../../../../model-best.safetensors": b"evil",
        "/tmp/model-best.safetensors": b"evil",
        "..\\model-best.safetensors": b"evil",
    }
    hub.commit("lab/evil", evil | files)
    assert_close(session.logits("hf://lab/evil"), logits)
    hub.commit("lab/only-evil", evil | {"config.json": files["config.json"]})
    session.error("hf://lab/only-evil")


def test_command_dumps_from_the_hub_and_then_offline(hub, demo_checkpoint, demo_dataset, tmp_path):
    commit = hub.commit("2048former/tiny", files_under(demo_checkpoint, prefix="v0.1/"))
    environment = hub_environment(hub, tmp_path / "home")
    command = [sys.executable, "-m", "dump_activations"]
    command += ["--init", "hf://2048former/tiny/v0.1@main", "--dataset", str(demo_dataset)]
    command += ["--n-samples", "9", "--outputs", "head_logits", "--device", "cpu", "--allow-cpu"]
    demo = load_demo(demo_checkpoint)
    rows = read_dataset(demo_dataset)
    boards = naive_boards(rows[numpy_indices(len(rows), 9, 0)])
    expected = naive_dump(demo.state_dict, demo.config, boards, ["head_logits"])
    for name, extra in (("online", {}), ("offline", {"HF_HUB_OFFLINE": "1"})):
        path = tmp_path / f"{name}.safetensors"
        result = subprocess.run(
            [*command, "-o", str(path)],
            env=environment | extra,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        dump = read_dump(path)
        assert dump.metadata["checkpoint"] == "hf://2048former/tiny/v0.1@main"
        assert dump.metadata["hub_commit"] == commit
        assert_close(dump.numpy("head_logits"), expected["head_logits"])
    assert sorted(hub.downloads) == ["v0.1/config.json", "v0.1/model.safetensors"]


def test_a_download_is_reported_and_shows_no_bars(hub, session, tmp_path):
    files, _ = checkpoint_files(tmp_path / "a")
    hub.commit("lab/reported", files)
    session.ask("hf://lab/nowhere")
    before = session.stderr.read_text()
    answer = session.ask("hf://lab/reported")
    assert answer["phases"] == ["downloading hf://lab/reported", "loading the checkpoint"]
    assert session.stderr.read_text() == before
