"""With a warm latent cache a run fetches and reads the DiT alone, and ends in the same adapter."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from safetensors.torch import load_file, save

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.cli import main
from acestep_pipeline.data.encoders import Encoders, fingerprint
from acestep_pipeline.data.latent_cache import LatentCache
from acestep_pipeline.data.tracks import load_tracks
from acestep_pipeline.errors import RunError, UsageError
from acestep_pipeline.jobs.places import Places
from acestep_pipeline.jobs.worker import Worker
from acestep_pipeline.storage.publishing import publish
from acestep_pipeline.training.base_model import load_base
from acestep_pipeline.training.fetching import fetch_meanwhile
from benchmarks import cold_start
from tests.hub_server import Hub, serve_hub
from tests.original_layout import write_original_checkpoint
from tests.s3_server import corrupting_proxy
from tests.test_hub import free_port, use_endpoint
from tests.training_runs import metrics, train_here

WEIGHTS = "pytorch_lora_weights.safetensors"
RUN = {"max_train_steps": 2, "lora_dropout": 0.2, "max_duration_s": 2, "max_train_samples": 2}
DIT, VAE = "transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
# Of which the condition encoder is a part.
ORIGINAL_DIT = {"acestep-v15-base/model.safetensors", "acestep-v15-base/silence_latent.pt"}


@pytest.fixture(scope="module")
def original_dir(tiny_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("original") / "checkpoint"
    return write_original_checkpoint(ACEStepPipeline.from_pretrained(tiny_dir), directory)


@pytest.fixture(scope="module")
def warm(tiny_dir, demo_dir, tmp_path_factory) -> Path:
    """A run from a folder for which all of the checkpoint was loaded, and the latent cache that it left."""
    root = tmp_path_factory.mktemp("warm")
    settings = {"pretrained_model_name_or_path": tiny_dir, "latent_cache_dir": root / "latents"}
    train_here(demo_dir, root / "run", **settings, **RUN)
    return root


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def weights_in(names: Iterable[str]) -> set[str]:
    return {name for name in names if name.endswith((".safetensors", ".pt"))}


def load(address: str | Path, latents: Path, **checkpoint) -> tuple[torch.nn.Module, Encoders]:
    checkpoint["pretrained_model_name_or_path"] = str(address)
    return load_base(checkpoint, latent_cache_dir=latents, weight_dtype=torch.float32, device=torch.device("cpu"))


def assert_same(loaded: tuple, other: tuple) -> None:
    """The same DiT, and the same facts about the encoders."""
    assert fingerprint(loaded[0]) == fingerprint(other[0])
    for name, value in vars(loaded[1].facts).items():
        expected = getattr(other[1].facts, name)
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected, name


def assert_same_run(run: Path, other: Path) -> None:
    assert (run / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert metrics(run) == metrics(other)
    known, also = (json.loads((each / "training_args.json").read_text()) for each in (run, other))
    facts = known.keys() - {"arguments"}
    assert {name: known[name] for name in facts} == {name: also[name] for name in facts}


def spoil(path: Path) -> None:
    """Change bytes of a file, and not its size nor its time; not under who has it mapped."""
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-100:] = 100 * b"?"
    path.unlink()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


# --- folders ---------------------------------------------------------------------------------------------------------


def test_of_a_folder_the_dit_alone_is_read(tiny_dir, demo_dir, warm, tmp_path, capsys):
    """The other weights are spoilt, which who read them would notice."""
    folder = tmp_path / "model"
    for name, content in files_of(tiny_dir).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    before = load(folder, warm / "latents")
    music = shutil.copytree(
        demo_dir, tmp_path / "music", ignore=lambda _, names: [n for n in names if "techno" not in n]
    )
    for name in weights_in(files_of(folder)) - {DIT}:
        spoil(folder / name)
    after = load(folder, warm / "latents")
    assert_same(after, before)
    assert "pipeline" not in vars(after[1]), "the encoders were not loaded"
    settings = {"pretrained_model_name_or_path": folder, "latent_cache_dir": warm / "latents", **RUN}
    train_here(demo_dir, tmp_path / "run", **settings)
    assert_same_run(tmp_path / "run", warm / "run")
    command = ["cache", "--train_data_dir", str(music), "--min_duration_s", "1", "--max_duration_s", "2"]
    model = ["--pretrained_model_name_or_path", str(folder), "--mixed_precision", "no"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *model, "--latent_cache_dir", str(warm / "latents")])
    assert ended.value.code == 0, capsys.readouterr().err
    # A file that was written to since is looked at again.
    os.utime(folder / VAE)
    assert load(folder, warm / "latents")[1].facts.vae_key != before[1].facts.vae_key


# --- S3 --------------------------------------------------------------------------------------------------------------


class Remote:
    """A checkpoint below an S3 folder, and machines that have a latent cache in common."""

    def __init__(self, s3_folder, monkeypatch, tmp_path: Path):
        self.address, self.folder = f"{s3_folder.url}/model", s3_folder
        self._monkeypatch, self._tmp_path = monkeypatch, tmp_path
        self.latents = tmp_path / "latents"

    def put(self, files: dict[str, bytes]) -> None:
        self.folder.put({f"model/{name}": content for name, content in files.items()})

    def on(self, machine: str) -> Path:
        """Go on with this machine's project cache; returns where its copy of the checkpoint lies."""
        self._monkeypatch.setenv("ACESTEP_CACHE_DIR", str(self._tmp_path / machine))
        return self._tmp_path / machine / "s3" / self.folder.server.bucket / self.folder.name / "model"

    def load(self, machine: str) -> tuple[torch.nn.Module, Encoders]:
        self.on(machine)
        return load(self.address, self.latents)

    def fetched(self, machine: str) -> set[str]:
        """The weights that a machine has."""
        return weights_in(files_of(self.on(machine)))


@pytest.fixture
def remote(s3_folder, monkeypatch, tmp_path) -> Remote:
    return Remote(s3_folder, monkeypatch, tmp_path)


@pytest.mark.parametrize("layout", ["plain", "published", "original"])
def test_a_machine_with_the_latent_cache_fetches_the_dit_alone_from_s3(layout, remote, tiny_dir, original_dir):
    if layout == "published":
        publish(tiny_dir, remote.address)
    else:
        remote.put(files_of(original_dir if layout == "original" else tiny_dir))
    cold = remote.load("first")
    assert VAE in remote.fetched("first")
    assert_same(remote.load("second"), cold)
    assert remote.fetched("second") == (ORIGINAL_DIT if layout == "original" else {DIT})


@pytest.mark.parametrize("layout", ["plain", pytest.param("original", marks=pytest.mark.slow)])
def test_such_a_run_ends_in_the_same_adapter(layout, remote, tiny_dir, original_dir, demo_dir, warm, tmp_path):
    remote.put(files_of(original_dir if layout == "original" else tiny_dir))
    remote.latents = warm / "latents"
    remote.load("first")
    remote.on("second")
    settings = {"pretrained_model_name_or_path": remote.address, "latent_cache_dir": remote.latents, **RUN}
    train_here(demo_dir, tmp_path / "run", **settings)
    assert remote.fetched("second") == (ORIGINAL_DIT if layout == "original" else {DIT})
    assert_same_run(tmp_path / "run", warm / "run")


def test_what_the_cache_lacks_is_encoded_by_encoders_that_are_fetched_then(remote, tiny_dir, demo_dir, warm):
    remote.put(files_of(tiny_dir))
    remote.load("first")
    transformer, encoders = remote.load("second")
    cache = LatentCache(remote.latents, encoders)
    assert remote.fetched("second") == {DIT}
    tracks, _ = load_tracks(demo_dir, min_duration_s=1, show_progress=False)
    entry, _ = cache.prepare(next(track for track in tracks if "techno" in track.id), 2.0)
    assert encoders.pipeline.transformer is transformer
    assert VAE in remote.fetched("second")
    for file in (entry.latents_file, entry.windows[0].condition_file):
        assert file.read_bytes() == (warm / "latents" / file.relative_to(remote.latents)).read_bytes()


def test_other_encoders_at_the_same_address_are_not_taken_for_the_known_ones(remote, tiny_dir):
    remote.put(files_of(tiny_dir))
    before = remote.load("first")
    remote.put({VAE: save({name: 1.01 * tensor for name, tensor in load_file(tiny_dir / VAE).items()})})
    after = remote.load("second")
    assert VAE in remote.fetched("second")
    assert after[1].facts.vae_key != before[1].facts.vae_key
    assert after[1].facts.text_key == before[1].facts.text_key


def test_a_file_that_something_wrote_to_is_fetched_again_from_s3(remote, tiny_dir):
    remote.put(files_of(tiny_dir))
    before = remote.load("first")
    copy = remote.on("first") / DIT
    spoil(copy)
    os.utime(copy, (0, 0))
    assert_same(remote.load("first"), before)
    assert copy.read_bytes() == (tiny_dir / DIT).read_bytes()


def test_content_that_is_not_what_the_manifest_says_is_refused(remote, tiny_dir):
    manifest = publish(tiny_dir, remote.address).manifest
    (dit,) = (file for file in manifest.files if file.file == DIT)
    remote.put({manifest.key(dit): bytes(dit.size)})
    with pytest.raises(RunError, match="the content of .*model.safetensors is damaged"):
        remote.load("first")
    assert remote.fetched("first") == set()
    remote.put({manifest.key(dit): (tiny_dir / DIT).read_bytes()})
    assert remote.load("first")


@pytest.mark.slow
def test_what_samples_need_comes_while_the_dit_trains(remote, tiny_dir, demo_dir, warm, tmp_path, capsys):
    remote.put(files_of(tiny_dir))
    remote.latents = warm / "latents"
    remote.load("first")
    remote.on("second")
    process = fetch_meanwhile({"pretrained_model_name_or_path": remote.address})
    assert process.wait(timeout=120) == 0
    assert remote.fetched("second") == remote.fetched("first")
    # It ends with the process that started it.
    remote.on("third")
    process = fetch_meanwhile({"pretrained_model_name_or_path": remote.address})
    process.stdin.close()
    assert process.wait(timeout=120) == 1
    # In a run, which listens in the end.
    remote.on("fourth")
    settings = {"pretrained_model_name_or_path": remote.address, "latent_cache_dir": remote.latents, **RUN}
    listening = {"num_validation_samples": 1, "validation_duration_s": 1, "validation_inference_steps": 1}
    train_here(demo_dir, tmp_path / "run", **settings | listening)
    assert "is fetched while the DiT trains" in capsys.readouterr().out
    assert list((tmp_path / "run" / "samples").glob("*.wav"))
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (warm / "run" / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_a_worker_whose_latents_are_cached_fetches_the_dit_alone(remote, tiny_dir, demo_dir, tmp_path):
    remote.put(files_of(tiny_dir))
    arguments = {"preset": "smoke", "mixed_precision": "no", "min_duration_s": 1, "num_validation_samples": 0} | RUN
    job = {"task": "train", "data": str(demo_dir), "model": remote.address, "arguments": arguments}
    for machine in ("first", "second"):
        remote.on(machine)
        Worker(Places(data=demo_dir, output=tmp_path / "output" / machine)).run(job, job_id="1")
        if machine == "first":
            assert VAE in remote.fetched("first")
            shutil.copytree(tmp_path / "first" / "latents", tmp_path / "second" / "latents")
    assert remote.fetched("second") == {DIT}
    assert_same_run(*(tmp_path / "output" / machine / "1" for machine in ("first", "second")))


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tiny_dir, original_dir, tmp_path, monkeypatch) -> Iterator[Hub]:
    repositories = {
        "someone/diffusers": {"main": tiny_dir},
        "ACE-Step/Ace-Step1.5": {"main": original_dir},
        "ACE-Step/acestep-v15-base": {"main": original_dir / "acestep-v15-base"},
    }
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))
    with serve_hub(repositories) as served:
        use_endpoint(monkeypatch, served.url)
        yield served
    close_session()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("someone/diffusers", {f"someone/diffusers/{DIT}"}),
        ("hf://ACE-Step/Ace-Step1.5", {f"ACE-Step/Ace-Step1.5/{name}" for name in ORIGINAL_DIT}),
        (
            "ACE-Step/acestep-v15-base",
            {f"ACE-Step/acestep-v15-base/{Path(name).name}" for name in ORIGINAL_DIT}
            | {"ACE-Step/Ace-Step1.5/acestep-v15-base/silence_latent.pt"},
        ),
    ],
)
def test_a_machine_with_the_latent_cache_fetches_the_dit_alone_from_the_hub(
    name, expected, hub, tmp_path, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "first"))
    cold = load(name, tmp_path / "latents")
    assert any(file.endswith(VAE) for file in hub.downloads)
    hub.downloads.clear()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "second"))
    assert_same(load(name, tmp_path / "latents"), cold)
    assert weights_in(hub.downloads) <= expected
    assert any(file.endswith("model.safetensors") for file in hub.downloads)
    # Again, and while the Hub is down.
    hub.downloads.clear()
    use_endpoint(monkeypatch, f"http://127.0.0.1:{free_port()}")
    assert_same(load(name, tmp_path / "latents"), cold)
    assert hub.downloads == []
    with pytest.raises(UsageError, match="can't be reached"):
        load(name, tmp_path / "latents")[1].pipeline.encode_prompt("", "")


def test_a_damaged_file_of_the_hub_is_fetched_again(hub, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    before = load("someone/diffusers", tmp_path / "latents")
    (file,) = (tmp_path / "hf").rglob(f"snapshots/*/{DIT}")

    def damage() -> None:
        spoil(file.resolve())
        os.utime(file.resolve(), (0, 0))

    damage()
    assert_same(load("someone/diffusers", tmp_path / "latents"), before)
    assert hub.downloads.count(f"someone/diffusers/{DIT}") == 2
    content, middle = (tiny_dir / DIT).read_bytes(), (tiny_dir / DIT).stat().st_size // 2
    assert file.read_bytes() == content
    # What is damaged on its way, once or each time.
    for times in (1, 9):
        damage()
        with corrupting_proxy(hub, content[middle : middle + 30], 30 * b"?", times) as (url, done):
            use_endpoint(monkeypatch, url)
            if times == 1:
                assert_same(load("someone/diffusers", tmp_path / "latents"), before)
                assert len(done) == 1 and file.read_bytes() == content
            else:
                with pytest.raises(RunError, match="diffusion_pytorch_model.safetensors arrived damaged 3 times"):
                    load("someone/diffusers", tmp_path / "latents")
                assert not file.exists()


# --- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_measured():
    cold_start.main(["--check"])
    run = {"stage": "first update", "hardware": "CPU", "seconds": {"median": 9.0, "min": 8.0, "max": 9.5}}
    rows = [run | {"way": way, "cpu_s": 7.26, "fetched_bytes": 1e9} for way in cold_start.WAYS]
    start = {"stage": "start", "way": "acestep-lora --help", "seconds": {"median": 0.4}, "hardware": "CPU"}
    lines = cold_start.table([start, *rows]).splitlines()
    assert lines[4] == "| latents cached: the DiT alone is fetched and loaded | 9.0 s (8.0–9.5) | 7.3 | 1,000 MB |"
    assert lines[-1] == "Started as processes: `acestep-lora --help` 0.40 s (CPU, S3 on the same machine)."
