"""The library: what it lists, fetches, refuses, keeps and lets go, on a folder, S3 and the Hub, from many threads."""

import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.adapters.library import AdapterLibrary
from acestep_pipeline.adapters.settings import LoraSettings
from acestep_pipeline.adapters.weights import adapter_layers, loaded_adapters
from acestep_pipeline.data.encoders import fingerprint
from acestep_pipeline.errors import UsageError
from acestep_pipeline.paths import LORA_WEIGHTS_NAME
from acestep_pipeline.training.manifest import seal
from tests.hub_server import serve_hub
from tests.test_adapters import save_trained, velocity

NAMES = ["blues.v1", "jazz", "keys", "lofi"]  # a dot and an attribute of ModuleDict: no names for a module


@pytest.fixture(scope="module")
def shelf(tiny_dir, tmp_path_factory) -> Path:
    """A folder of four adapters, and other things. Read-only."""
    root = tmp_path_factory.mktemp("shelf")
    for seed, name in enumerate(NAMES):
        save_trained(tiny_dir, root / name, LoraSettings(r=2 + seed, lora_alpha=6.0), seed)
    shutil.move(root / "lofi" / LORA_WEIGHTS_NAME, root / "lofi.safetensors")
    shutil.rmtree(root / "lofi")
    (root / "notes").mkdir()
    (root / "notes/readme.md").write_text("no adapter")
    (root / ".hidden").mkdir()
    return root


@pytest.fixture(scope="module")
def pipeline(tiny_dir) -> ACEStepPipeline:
    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def library(pipeline, shelf):
    yield AdapterLibrary(shelf, pipeline=pipeline, max_resident=2)
    pipeline.unload_lora_weights()


@pytest.fixture(scope="module")
def expected(tiny_dir, shelf) -> dict[str, torch.Tensor]:
    """What each adapter predicts at weight 0.8, by itself; "" is the base."""
    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    expected = {"": velocity(pipeline)}
    for path in shelf.iterdir():
        if path.stem in ("notes", ".hidden"):
            continue
        pipeline.load_lora_weights(path, adapter_name="alone")
        pipeline.set_adapters("alone", 0.8)
        expected[path.name.removesuffix(".safetensors")] = velocity(pipeline)
        pipeline.unload_lora_weights()
    return expected


def test_it_lists_loads_and_lets_the_longest_unused_go(library, pipeline, expected):
    assert library.names() == NAMES and library.resident == []
    for name, resident in (
        ("jazz", ["jazz"]),
        ("lofi", ["jazz", "lofi"]),
        ("jazz", ["lofi", "jazz"]),
        ("keys", ["jazz", "keys"]),
        ("blues.v1", ["keys", "blues.v1"]),
    ):
        with library.use({name: 0.8}):
            assert torch.equal(velocity(pipeline), expected[name])
        assert library.resident == resident and len(loaded_adapters(pipeline.transformer)) == len(resident)
        assert torch.equal(velocity(pipeline), expected[""])


def test_what_was_loaded_and_active_before_is_so_again(library, pipeline, shelf, expected):
    pipeline.load_lora_weights(shelf / "jazz", adapter_name="jazz")  # not the library's
    pipeline.set_adapters("jazz", 0.8)
    with library.use({"jazz": 0.1, "lofi": -0.3}):
        assert len(pipeline.get_active_adapters()) == 2 and "jazz" not in pipeline.get_active_adapters()
    assert torch.equal(velocity(pipeline), expected["jazz"])
    pipeline.unload_lora_weights()
    with library.use({"lofi": 0.8}):  # it is loaded again
        assert torch.equal(velocity(pipeline), expected["lofi"])


def test_several_at_once_and_in_one_batch(library, pipeline, expected):
    def generate(prompts: list[str], seeds: list[int], **kwargs) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        options = {"audio_duration": 1, "num_inference_steps": 2, "output_type": "latent"}
        return pipeline(prompts, generator=generators, **options, **kwargs).audios

    with library.loaded("keys", "blues.v1") as held:
        mixed = generate(["calm", "wild"], [1, 2], adapters=[(held["keys"], 0.8), held["blues.v1"]])
        with library.use({"keys": 0.8}):
            torch.testing.assert_close(mixed[:1], generate(["calm"], [1]), rtol=0, atol=1e-5)
        with pytest.raises(UsageError, match="3 adapters at once, and max_resident=2"):
            with library.use({"jazz": 0.5}):
                pass
        assert sorted(library.resident) == ["blues.v1", "keys"]
    with pytest.raises(UsageError, match="3 adapters at once"):
        with library.use({"jazz": 0.5, "keys": 0.4, "lofi": 0.2}):
            pass
    with library.use({"jazz": 0.8}):
        assert torch.equal(velocity(pipeline), expected["jazz"])


def test_evictions_leave_no_memory_behind_and_the_base_as_it_was(library, pipeline, shelf):
    base = fingerprint(pipeline.transformer) if not loaded_adapters(pipeline.transformer) else None

    def tensors() -> int:
        gc.collect()
        return sum(item.numel() for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter))

    sizes = []
    for _ in range(4):
        for name in ("jazz", "lofi", "keys", "blues.v1"):
            with library.use({name: 1.0}):
                pass
        sizes.append(tensors())
    assert len(set(sizes[1:])) == 1
    pipeline.unload_lora_weights()
    assert base == fingerprint(pipeline.transformer)


def test_requests_of_many_threads_each_get_their_adapter(library, pipeline, expected):
    barrier = threading.Barrier(6)

    def request(number: int) -> bool:
        if number < 6:
            barrier.wait()
        name = NAMES[number % 4]
        with library.use({name: 0.8}):
            return torch.equal(velocity(pipeline), expected[name])

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(request, range(30)))
    assert len(library.resident) == len(loaded_adapters(pipeline.transformer)) == 2
    assert torch.equal(velocity(pipeline), expected[""])
    assert not [layer for _, layer in adapter_layers(pipeline.transformer) if layer.active_adapters]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"rock": 1.0}, "has no adapter 'rock'; it has: blues.v1, jazz, keys, lofi"),
        ({"jazz": 3}, "from -2 to 2, not 3"),
        ({"jazz": {"layers.9": 1.0}}, "matches none of the layers"),
    ],
)
def test_wrong_requests_leave_the_pipeline_as_it_was(library, pipeline, expected, weights, said):
    with pytest.raises(UsageError) as caught:
        with library.use(weights):
            pass
    assert said in str(caught.value)
    assert torch.equal(velocity(pipeline), expected[""])
    with library.use({"lofi": 0.8}):
        assert torch.equal(velocity(pipeline), expected["lofi"])


def test_wrong_libraries(pipeline, tmp_path, shelf):
    for root, said in (
        (tmp_path, "holds no adapters"),
        (tmp_path / "missing", "is no folder"),
        ("nonsense", "is no folder"),
    ):
        with pytest.raises(UsageError, match=said):
            AdapterLibrary(root)
    for number in (0, -1, 2.5, True):
        with pytest.raises(UsageError, match="max_resident must be a positive number"):
            AdapterLibrary(shelf, max_resident=number)
    with pytest.raises(UsageError, match="without a pipeline"):
        with AdapterLibrary(shelf).use({"jazz": 1.0}):
            pass


def test_a_changed_file_is_refused_until_it_is_accepted(pipeline, shelf, tmp_path, expected):
    root = tmp_path / "shelf"
    shutil.copytree(shelf, root)
    library = AdapterLibrary(root, pipeline=pipeline, max_resident=1)
    assert library.fetch("jazz") == root / "jazz" / LORA_WEIGHTS_NAME
    shutil.copy(root / "blues.v1" / LORA_WEIGHTS_NAME, root / "jazz" / LORA_WEIGHTS_NAME)
    for again in (library, AdapterLibrary(root, pipeline=pipeline)):  # remembered across processes
        with pytest.raises(UsageError, match=r"'jazz' has changed since it was first used .*accept\('jazz'\)"):
            with again.use({"jazz": 0.8}):
                pass
    assert library.resident == []
    library.accept("jazz")
    with library.use({"jazz": 0.8}):
        assert torch.equal(velocity(pipeline), expected["blues.v1"])
    pipeline.unload_lora_weights()


def test_a_manifest_is_believed(shelf, tmp_path):
    root = tmp_path / "shelf"
    shutil.copytree(shelf, root)
    seal(root / "jazz")
    library = AdapterLibrary(root)
    library.fetch("jazz")
    shutil.copy(root / "blues.v1" / LORA_WEIGHTS_NAME, root / "jazz" / LORA_WEIGHTS_NAME)
    with pytest.raises(UsageError, match=f"not the published one: the SHA-256 of {LORA_WEIGHTS_NAME} is"):
        library.fetch("jazz")
    (root / "jazz" / "manifest.json").unlink()
    seal(root / "jazz")  # published anew
    library.fetch("jazz")
    (root / "jazz" / "manifest.json").write_text("[]")
    with pytest.raises(UsageError, match="manifest.json of .* can't be read"):
        library.fetch("jazz")


def test_a_library_on_s3(s3_folder, shelf, pipeline, tmp_path, expected):
    sealed = tmp_path / "jazz"
    shutil.copytree(shelf / "jazz", sealed)
    seal(sealed)
    weights = {name: (sealed if name == "jazz" else shelf / name) / LORA_WEIGHTS_NAME for name in ("jazz", "keys")}
    s3_folder.put(
        {f"lora/{name}/{LORA_WEIGHTS_NAME}": path.read_bytes() for name, path in weights.items()}
        | {"lora/jazz/manifest.json": (sealed / "manifest.json").read_bytes()}
        | {"lora/lofi.safetensors": (shelf / "lofi.safetensors").read_bytes()}
        | {"lora/jazz/checkpoint-5/optimizer.safetensors": bytes(100), "lora/notes/readme.md": b"no adapter"}
    )
    library = AdapterLibrary(f"{s3_folder.url}/lora", pipeline=pipeline, max_resident=1)
    assert library.names() == ["jazz", "keys", "lofi"]
    for name in ("jazz", "lofi", "keys"):
        with library.use({name: 0.8}):
            assert torch.equal(velocity(pipeline), expected[name])
    assert not list(library.fetch("jazz").parent.glob("checkpoint-*"))
    for name, said in (("jazz", "not the published one"), ("keys", "has changed since it was first used")):
        s3_folder.put({f"lora/{name}/{LORA_WEIGHTS_NAME}": (shelf / "lofi.safetensors").read_bytes()})
        with pytest.raises(UsageError, match=said):
            library.fetch(name)
    pipeline.unload_lora_weights()


HUB_PROGRAM = """
import json, sys
from acestep_pipeline.adapters.library import AdapterLibrary
from acestep_pipeline.errors import UsageError
for root in json.loads(sys.argv[1]):
    try:
        library = AdapterLibrary(root)
        print(json.dumps({name: library.fetch(name).stat().st_size for name in library.names()}))
    except UsageError as error:
        print(json.dumps(str(error)))
"""


def test_libraries_on_the_hub(shelf, tmp_path):
    repositories = {f"someone/{name}": {"main": shelf / name} for name in ("jazz", "keys")}
    repositories["other/jazz"] = {"main": shelf / "blues.v1"}
    slug = "someone/styles-0123456789abcdef01234567"
    with serve_hub(repositories) as hub:
        hub.collections[slug] = ["someone/jazz", "someone/keys"]
        roots = [
            slug,
            f"https://huggingface.co/collections/{slug}",
            ["someone/jazz", "other/jazz", "someone/keys"],
            "someone/none-0123456789abcdef01234567",
            ["someone/missing"],
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub"), "NO_PROXY": "127.0.0.1"}
        environment["ACESTEP_CACHE_DIR"] = str(tmp_path / "cache")
        command = [sys.executable, "-c", HUB_PROGRAM, json.dumps(roots)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    of_collection, of_address, of_list, missing, not_there = map(json.loads, result.stdout.splitlines())
    size = {name: (shelf / name / LORA_WEIGHTS_NAME).stat().st_size for name in ("jazz", "keys", "blues.v1")}
    assert of_collection == of_address == {"jazz": size["jazz"], "keys": size["keys"]}
    assert of_list == {"someone/jazz": size["jazz"], "other/jazz": size["blues.v1"], "keys": size["keys"]}
    assert "can't be listed: there is none that you can see" in missing and "no model 'someone/missing'" in not_there
