"""Reading what was published to a folder: as an adapter, from a library, as training data."""

import shutil

import pytest

from acestep_pipeline.adapters.formats.locate import locate
from acestep_pipeline.adapters.library import AdapterLibrary
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.data.tracks import load_tracks
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.paths import LORA_WEIGHTS_NAME
from acestep_pipeline.storage.publishing import publish
from acestep_pipeline.storage.release_pull import pull_release
from tests.test_adapters import save_trained


@pytest.fixture
def shelf(tiny_dir, tmp_path, monkeypatch):
    """A folder with two published adapters, one of two releases."""
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))
    for seed, name in enumerate(("jazz", "keys")):
        save_trained(tiny_dir, tmp_path / "runs" / name, LoraSettings(r=2, lora_alpha=6.0), seed)
        publish(tmp_path / "runs" / name, str(tmp_path / "shelf" / name), show_progress=False)
    (tmp_path / "runs/jazz/training_args.json").write_text("{}")
    publish(tmp_path / "runs/jazz", str(tmp_path / "shelf/jazz"), force=True, show_progress=False)
    return tmp_path / "shelf"


def test_an_adapter_in_a_folder_that_was_published_to_is_loaded(shelf, tmp_path, tiny_pipeline, monkeypatch):
    weights = (tmp_path / "runs/jazz" / LORA_WEIGHTS_NAME).read_bytes()
    assert locate(str(shelf / "jazz")).read_bytes() == weights
    monkeypatch.chdir(shelf)
    assert locate("./jazz").with_name("training_args.json").is_file()
    tiny_pipeline.load_lora_weights(shelf / "jazz", adapter_name="jazz")
    assert tiny_pipeline.get_list_adapters()["transformer"] == ["jazz"]
    pull_release(str(shelf / "jazz"), tmp_path / "copy", show_progress=False)
    assert locate(str(tmp_path / "copy")).parent == tmp_path / "copy", "a pulled copy is a folder like any other"


def test_a_library_of_published_folders_checks_their_content(shelf, tmp_path):
    library = AdapterLibrary(shelf)
    assert library.names() == ["jazz", "keys"]
    path = library.fetch("keys")
    assert path.read_bytes() == (tmp_path / "runs/keys" / LORA_WEIGHTS_NAME).read_bytes()
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match="is not the published one"):
        library.fetch("keys")
    shutil.rmtree(tmp_path / "cache")
    for content in (shelf / "keys/content").iterdir():
        content.write_bytes(content.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="missing or damaged"):
        library.fetch("keys")


def test_music_in_a_folder_that_was_published_to_is_trained_on(demo_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))
    publish(demo_dir, str(tmp_path / "clips"), show_progress=False)
    here, _ = load_tracks(demo_dir)
    there, _ = load_tracks(tmp_path / "clips")
    assert [(track.id, track.sha256, track.tags) for track in here] == [(t.id, t.sha256, t.tags) for t in there]
