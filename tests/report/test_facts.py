"""What the page says of a run."""

from dump_activations import demo, dump
from dump_activations.report.facts import draw
from dump_activations.storage.reading.inspection import inspect


def test_all_that_a_run_says_of_itself_has_its_group(tmp_path):
    path = tmp_path / "a.safetensors"
    options = {"labels": ["move_dir"], "where": "max_rank > 3", "stats": True, "n_samples": 3}
    dump(demo.CHECKPOINT, demo.DATASET, path, device="cpu", allow_cpu=True, **options)
    page = draw(inspect(path))
    assert "<h3>Run</h3>" in page
    assert "<h3>More</h3>" not in page
