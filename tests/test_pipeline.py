"""The pipeline on every checkpoint layout, from folders and from a Hub served on this machine; XL's timbre token."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AceStepPipeline, AceStepTransformer1DModel, DiffusionPipeline
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from safetensors.torch import load_file

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.checkpoint_conversion import OriginalCheckpoint
from acestep_pipeline.checkpoint_source import resolve_checkpoint
from acestep_pipeline.conditioning import MAX_TEXT_TOKENS, PromptFields, count_lost_tokens, encode_condition
from acestep_pipeline.errors import UsageError
from acestep_pipeline.pipeline import prepend_timbre_special_token
from acestep_pipeline.storage.publishing import publish
from acestep_pipeline.tiny_checkpoint import build_tiny_pipeline, build_tokenizer, write_tiny_checkpoint
from tests.hub_server import serve_hub
from tests.original_layout import write_original_checkpoint

# Plain diffusers' Oobleck, loaded here for comparison, uses it.
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")

COMPONENTS = ("vae", "text_encoder", "tokenizer", "transformer", "condition_encoder", "scheduler")
PROMPT = PromptFields(prompt="ambient, warm pads", bpm=90, keyscale="C minor", timesignature="4", audio_duration=2.0)


def generate(pipeline: AceStepPipeline, output_type: str = "pt") -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt="ambient, warm pads",
        lyrics="[Instrumental]",
        audio_duration=2.0,
        num_inference_steps=2,
        guidance_scale=3.0,
        shift=1.0,
        generator=torch.Generator().manual_seed(3),
        output_type=output_type,
    ).audios


@pytest.fixture(scope="module")
def original_dir(tiny_dir, tmp_path_factory) -> Path:
    """The tiny checkpoint in the original layout, with a 5 Hz language model beside it. Read-only."""
    directory = tmp_path_factory.mktemp("original") / "checkpoint"
    write_original_checkpoint(ACEStepPipeline.from_pretrained(tiny_dir), directory)
    language_model = directory / "acestep-5Hz-lm-1.7B"
    language_model.mkdir()
    (language_model / "config.json").write_text("{}")
    (language_model / "model.safetensors").write_bytes(bytes(1000))
    return directory


@pytest.fixture(scope="module")
def reference(tiny_dir) -> dict[str, torch.Tensor]:
    """What plain diffusers generates with the tiny checkpoint: latents and audio."""
    pipeline = AceStepPipeline.from_pretrained(tiny_dir)
    return {output_type: generate(pipeline, output_type) for output_type in ("latent", "pt")}


# ---------------------------------------------------------------------------------------------------------------------
# S3


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_either_layout_loads_from_s3_published_or_not_and_only_what_is_needed(
    s3_folder, tiny_dir, original_dir, reference, tmp_path, monkeypatch
):
    monkeypatch.setenv("ACESTEP_CACHE_DIR", str(tmp_path / "cache"))
    s3_folder.put({f"plain/{name}": content for name, content in files_of(tiny_dir).items()} | {"plain/big.bin": b"x"})
    publish(tiny_dir, f"{s3_folder.url}/published")
    originals = files_of(original_dir)
    s3_folder.put({f"original/{name}": content for name, content in originals.items()})
    for name in ("plain", "published", "original"):
        pipeline = ACEStepPipeline.from_pretrained(f"{s3_folder.url}/{name}")
        assert torch.equal(generate(pipeline), reference["pt"]), name
    fetched = {path.name for path in (tmp_path / "cache" / "s3").rglob("*")}
    assert "big.bin" not in fetched and "acestep-5Hz-lm-1.7B" not in fetched
    with pytest.raises(UsageError, match=r"no ACE-Step 1.5 DiT in 'turbo' \(found: acestep-v15-base\); choose one"):
        resolve_checkpoint(f"{s3_folder.url}/original", variant_dir="turbo")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_folder_and_name_generate_what_plain_diffusers_does(tiny_dir, reference):
    for name in ("tiny", tiny_dir, str(tiny_dir)):
        assert torch.equal(generate(ACEStepPipeline.from_pretrained(name)), reference["pt"]), name


def test_original_layout_generates_the_same_bits(original_dir, reference):
    pipeline = ACEStepPipeline.from_pretrained(original_dir)
    assert torch.equal(generate(pipeline, "latent"), reference["latent"])
    assert torch.equal(generate(pipeline), reference["pt"])
    assert reference["pt"].std() > 0.01, "silence would be equal too"


def test_original_layout_by_variant_or_by_the_dits_own_folder(original_dir, reference):
    by_variant = ACEStepPipeline.from_pretrained(original_dir, variant_dir="acestep-v15-base")
    by_folder = ACEStepPipeline.from_pretrained(original_dir / "acestep-v15-base")
    for pipeline in (by_variant, by_folder):
        assert isinstance(pipeline, ACEStepPipeline)
        assert torch.equal(generate(pipeline, "latent"), reference["latent"])


def test_dtypes_apply_to_both_layouts(tiny_dir, original_dir):
    for folder in (tiny_dir, original_dir):
        pipeline = ACEStepPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, vae_dtype=torch.float32)
        dtypes = {name: getattr(pipeline, name).dtype for name in ("vae", "transformer", "condition_encoder")}
        bf16 = torch.bfloat16
        assert dtypes == {"vae": torch.float32, "transformer": bf16, "condition_encoder": bf16}, folder
        assert pipeline.text_encoder.dtype == torch.bfloat16


def usage_error(*args, **kwargs) -> str:
    with pytest.raises(UsageError) as caught:
        ACEStepPipeline.from_pretrained(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("component", COMPONENTS)
def test_component_missing_from_a_diffusers_folder_is_named(tiny_dir, tmp_path, component):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_dir, folder)
    shutil.rmtree(folder / component)
    message = usage_error(folder)
    assert f"misses {component};" in message
    assert str(folder) in message


def test_damaged_component_is_named(tiny_dir, original_dir, tmp_path):
    for source, part in ((tiny_dir, "transformer"), (original_dir, "vae"), (original_dir, "Qwen3-Embedding-0.6B")):
        folder = tmp_path / part
        shutil.copytree(source, folder)
        (weights,) = (folder / part).glob("*.safetensors")
        weights.write_bytes(weights.read_bytes()[:2000])
        assert str(folder) in usage_error(folder)


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "nothing", "a/b/c", "~/no-such-folder-here"])
def test_nonexistent_path_is_named(name):
    assert repr(name) in usage_error(name)


def test_file_in_the_place_of_a_folder(tiny_dir):
    assert "model_index.json" in usage_error(tiny_dir / "model_index.json")


def test_s3_address_without_credentials_says_what_to_do(monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    assert "no credentials" in usage_error("s3://bucket/model")


# ---------------------------------------------------------------------------------------------------------------------
# What an item of a batch sounds like


@pytest.mark.parametrize("guidance_scale", [1.0, 7.0])
def test_an_item_does_not_depend_on_its_batch(tiny_pipeline, guidance_scale):
    prompts = ["lo-fi", "a long description of quiet music with a piano, a double bass, brushes and some tape hiss"]
    lyrics = ["[verse]\nla la la la\n[chorus]\nla", "[Instrumental]"]
    settings = {"audio_duration": 1.0, "num_inference_steps": 2, "shift": 1.0, "output_type": "latent"}
    settings["guidance_scale"] = guidance_scale

    def run(call, chosen: slice) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        return call(prompt=prompts[chosen], lyrics=lyrics[chosen], generator=seeds[chosen], **settings).audios

    together = run(tiny_pipeline, slice(0, 2))
    for item in range(2):
        alone = run(tiny_pipeline, slice(item, item + 1))
        torch.testing.assert_close(together[item : item + 1], alone, rtol=1e-4, atol=1e-4)
    leaking = run(functools.partial(AceStepPipeline.__call__, tiny_pipeline), slice(0, 2))
    assert (leaking - together).abs().max() > 0.1, "diffusers hides padded conditions now: drop `padding_hidden`"
    assert not any(layer.cross_attn._forward_pre_hooks for layer in tiny_pipeline.transformer.layers)


def test_source_audio_is_encoded_alike_whatever_was_drawn_before(tiny_pipeline):
    source = torch.rand(2, 48_000, generator=torch.Generator().manual_seed(0)) - 0.5
    settings = {"prompt": "x", "task_type": "repaint", "src_audio": source, "reference_audio": source}
    settings |= {"num_inference_steps": 1, "repainting_start": 0.5, "output_type": "latent"}

    def run() -> torch.Tensor:
        return tiny_pipeline(generator=torch.Generator().manual_seed(0), **settings).audios

    torch.manual_seed(1)
    first, drawn = run(), torch.rand(1)
    torch.manual_seed(1)
    assert drawn == torch.rand(1), "the global generator is left alone"
    assert torch.equal(run(), first)


# ---------------------------------------------------------------------------------------------------------------------
# Audio coding in tiles


def test_tiled_encoding_equals_one_pass(tiny_pipeline):
    vae = tiny_pipeline.vae
    samples = round(5.1 * 48_000)  # 127.5 frames
    waveform = 0.3 * torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(0))
    assert vae.use_tiling
    assert samples > vae.tile_sample_min_length, "or there is only one tile"
    with torch.no_grad():
        tiled = vae.encode(waveform).latent_dist
        vae.disable_tiling()
        whole = vae.encode(waveform).latent_dist
    assert whole.mean.std() > 0.5
    assert tiled.mean.shape == whole.mean.shape
    torch.testing.assert_close(tiled.mean, whole.mean, rtol=0, atol=1e-4)
    torch.testing.assert_close(tiled.std, whole.std, rtol=0, atol=1e-4)


def test_tiled_decoding_has_no_seam(tiny_pipeline):
    vae = tiny_pipeline.vae
    latents = torch.randn(1, 16, vae.tile_latent_min_length + 6, generator=torch.Generator().manual_seed(0))
    overlap = vae.tile_latent_overlap
    with torch.no_grad():
        tiled = vae.decode(latents).sample
        vae.tile_latent_overlap = 2
        seamed = vae.decode(latents).sample
        vae.tile_latent_overlap = overlap
        vae.disable_tiling()
        whole = vae.decode(latents).sample
    assert tiled.shape == whole.shape and whole.std() > 0.05
    torch.testing.assert_close(tiled, whole, rtol=0, atol=1e-5)
    assert (seamed - whole).abs().max() > 1e-3, "with too little overlap there is a seam to be seen"


# ---------------------------------------------------------------------------------------------------------------------
# The tiny checkpoint


def test_tiny_checkpoint_depends_on_its_seed_alone(tiny_pipeline):
    before = torch.get_rng_state()
    torch.manual_seed(99)
    rebuilt, other = build_tiny_pipeline(), build_tiny_pipeline(seed=1)
    for name in ("vae", "text_encoder", "transformer", "condition_encoder", "audio_tokenizer"):
        expected = getattr(tiny_pipeline, name).state_dict()
        for key, tensor in getattr(rebuilt, name).state_dict().items():
            assert torch.equal(tensor, expected[key]), f"{name}.{key}"
    assert not torch.equal(other.transformer.proj_in_conv.weight, rebuilt.transformer.proj_in_conv.weight)
    assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(99).get_state()), "the global RNG moved"
    torch.set_rng_state(before)


def test_tiny_checkpoint_has_the_real_rates_at_toy_width(tiny_pipeline):
    assert tiny_pipeline.latents_per_second == 25.0
    assert tiny_pipeline.sample_rate == 48_000
    assert not tiny_pipeline.is_turbo
    assert tiny_pipeline.transformer.config.audio_acoustic_hidden_dim == 16
    assert tiny_pipeline.transformer.config.in_channels == 48
    assert tiny_pipeline.condition_encoder.config.timbre_hidden_dim == 16
    assert tiny_pipeline.vae.hop_length == 1920
    with torch.no_grad():
        latents = tiny_pipeline.vae.encode(torch.zeros(1, 2, 48_000)).latent_dist.mean
    assert latents.shape == (1, 16, 25)


def test_tiny_silence_latent_is_encoded_silence(tiny_pipeline):
    silence = tiny_pipeline.condition_encoder.silence_latent
    assert silence.shape == (1, 15_000, 16)
    with torch.no_grad():
        encoded = tiny_pipeline.vae.encode(torch.zeros(1, 2, 100 * 1920)).latent_dist.mean.transpose(1, 2)
    torch.testing.assert_close(silence[:, :68], encoded[:, :68], rtol=0, atol=1e-4)
    assert silence.abs().amin(dim=(0, 2)).min() > 0, "a frame of zeros"


def test_tiny_tokenizer_round_trips_any_text():
    tokenizer = build_tokenizer()
    generator = np.random.default_rng(0)
    points = generator.integers(0x20, 0x110000, size=4000)
    anything = "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
    for text in (anything, "Grüße, 你好\n\tمرحبا 🎵\0", "  two  spaces ", "[verse]\nla la la\n"):
        assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


def test_usual_prompt_fits_the_token_limit(tiny_pipeline):
    prompt = (
        "epic orchestral film score, soaring strings, brass fanfare, timpani, female choir, slow build to a "
        "triumphant climax, minor key, wide reverb, dramatic and hopeful, 4/4, mastered for cinema"
    )
    fields = PromptFields(prompt=prompt, bpm=96, keyscale="F# minor", timesignature="4", audio_duration=240.0)
    assert count_lost_tokens(tiny_pipeline, fields) == (0, 0)
    lost_text, _ = count_lost_tokens(tiny_pipeline, PromptFields(prompt=prompt * 20))
    assert lost_text > MAX_TEXT_TOKENS


def test_tiny_checkpoint_never_overwrites(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for path in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(UsageError, match="not an empty folder"):
            write_tiny_checkpoint(path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_tiny_checkpoint_is_a_plain_diffusers_checkpoint(tmp_path, reference):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert write_tiny_checkpoint(empty) == empty
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    for cls in (DiffusionPipeline, AceStepPipeline):
        pipeline = cls.from_pretrained(empty)
        assert type(pipeline) is AceStepPipeline
        assert torch.equal(generate(pipeline), reference["pt"])


# ---------------------------------------------------------------------------------------------------------------------
# XL: the timbre encoder's special token


def xl_pipeline(tiny_dir: Path, cls: type = ACEStepPipeline) -> AceStepPipeline:
    """The tiny checkpoint with a condition encoder (32) narrower than its DiT (64), as XL's is."""
    pipeline = AceStepPipeline.from_pretrained(tiny_dir)
    narrow = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        condition_encoder = AceStepConditionEncoder.from_config({**pipeline.condition_encoder.config, **narrow})
        transformer = AceStepTransformer1DModel.from_config(
            {**pipeline.transformer.config, "encoder_hidden_size": narrow["hidden_size"]}
        )
    condition_encoder.silence_latent.copy_(pipeline.condition_encoder.silence_latent)
    components = {**pipeline.components, "condition_encoder": condition_encoder, "transformer": transformer}
    return cls(**components)


def condition(pipeline: AceStepPipeline) -> torch.Tensor:
    """`encoder_hidden_states` as inference computes them: `[tokens, dim]`."""
    return encode_condition(pipeline, PROMPT).encoder_hidden_states


def change_special_token(pipeline: AceStepPipeline) -> None:
    pipeline.condition_encoder.timbre_encoder.special_token.data += 1.0


def test_diffusers_still_ignores_the_timbre_special_token(tiny_dir):
    pipeline = xl_pipeline(tiny_dir, AceStepPipeline)
    before = condition(pipeline)
    change_special_token(pipeline)
    assert torch.equal(condition(pipeline), before), (
        "diffusers prepends the timbre encoder's special token now: remove `prepend_timbre_special_token`, which "
        "would prepend it a second time, after checking what diffusers does for 2 B checkpoints"
    )


def test_xl_uses_the_timbre_special_token(tiny_dir):
    pipeline = xl_pipeline(tiny_dir)
    plain, ours = condition(xl_pipeline(tiny_dir, AceStepPipeline)), condition(pipeline)
    changed_rows = (ours - plain).abs().amax(dim=-1) > 1e-3
    assert changed_rows.sum() == 1, "only the timbre embedding differs from plain diffusers"
    change_special_token(pipeline)
    assert not torch.equal(condition(pipeline), ours)


def test_xl_timbre_has_one_position_more_and_takes_the_first(tiny_dir):
    pipeline = xl_pipeline(tiny_dir)
    timbre_encoder = pipeline.condition_encoder.timbre_encoder
    seen = {}
    timbre_encoder.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    silence = pipeline.condition_encoder.silence_latent[:, :750]
    with torch.no_grad():
        timbre_encoder(silence, torch.arange(1))
        projected = torch.nn.functional.linear(silence, *timbre_encoder.embed_tokens.parameters())
    assert seen["hidden_states"].shape == (1, 751, 32)
    assert torch.equal(seen["hidden_states"][0, 0], timbre_encoder.special_token[0, 0])
    torch.testing.assert_close(seen["hidden_states"][:, 1:], projected, rtol=0, atol=1e-6)


def test_xl_token_is_prepended_once_however_often_the_pipeline_is_built(tiny_dir):
    pipeline = xl_pipeline(tiny_dir)
    once = condition(pipeline)
    again = ACEStepPipeline(**pipeline.components)
    prepend_timbre_special_token(again.condition_encoder)
    assert torch.equal(condition(again), once)
    assert len(again.condition_encoder.timbre_encoder.embed_tokens._forward_hooks) == 1


def test_xl_survives_a_diffusers_round_trip(tiny_dir, tmp_path):
    pipeline = xl_pipeline(tiny_dir)
    pipeline.save_pretrained(tmp_path / "xl")
    loaded = ACEStepPipeline.from_pretrained(tmp_path / "xl")
    assert torch.equal(condition(loaded), condition(pipeline))
    assert torch.equal(generate(loaded, "latent"), generate(pipeline, "latent"))


def test_2b_conditions_are_plain_diffusers(tiny_dir, tiny_pipeline):
    before = condition(tiny_pipeline)
    assert torch.equal(before, condition(AceStepPipeline.from_pretrained(tiny_dir)))
    change_special_token(tiny_pipeline)
    assert torch.equal(condition(tiny_pipeline), before)


# ---------------------------------------------------------------------------------------------------------------------
# The Hub

# Answers each line of cases on stdin with a line: where each checkpoint's parts are, or the `UsageError`'s message.
RESOLVE = """
import json, sys
from acestep_pipeline.errors import UsageError
from acestep_pipeline.checkpoint_source import resolve_checkpoint

def resolve(name, variant_dir, revision):
    try:
        found = resolve_checkpoint(name, variant_dir=variant_dir, revision=revision, cache_dir=sys.argv[1])
    except UsageError as error:
        return str(error)
    return {part: str(path) for part, path in getattr(found, "__dict__", {"diffusers": found}).items()}

for line in sys.stdin:
    print(json.dumps([resolve(*case) for case in json.loads(line)]), flush=True)
"""
# Each repository's transformer and text encoder carry a number, so that a test sees which ones were found.
# (name, variant_dir, revision): marks of the transformer and the text encoder.
FOUND = {
    ("someone/tiny-diffusers", None, None): [11, 1],
    ("someone/tiny-diffusers", None, "v2"): [12, 1],
    ("ACE-Step/Ace-Step1.5", None, None): [13, 2],
    ("ACE-Step/Ace-Step1.5", "acestep-v15-turbo", None): [13, 2],
    ("ACE-Step/acestep-v15-base", None, None): [14, 2],
    ("ACE-Step/acestep-v15-base", "acestep-v15-base", None): [14, 2],
    ("ACE-Step/Ace-Step1.5", "acestep-v15-base", None): [14, 2],
    ("someone/two", "acestep-v15-sft", None): [15, 3],
}
# What the message holds.
REFUSED = {
    ("someone/two", None, None): ("acestep-v15-sft, acestep-v15-turbo", "--variant_dir"),
    ("someone/two", "acestep-v15-base", None): ("acestep-v15-sft, acestep-v15-turbo", "someone/acestep-v15-base"),
    ("someone/missing", None, None): ("no model 'someone/missing'",),
    ("someone/tiny-diffusers", None, "v3"): ("no model 'someone/tiny-diffusers'", "'v3'"),
    ("someone/something-else", None, None): ("someone/something-else", "found: none"),
    ("some--one/b..ad", None, None): ("no model 'some--one/b..ad'",),
}


def mark(pipeline: AceStepPipeline, transformer: int, text_encoder: int) -> None:
    pipeline.transformer.norm_out.weight.data[0] = transformer
    pipeline.text_encoder.norm.weight.data[0] = text_encoder


@pytest.fixture(scope="module")
def repositories(tiny_dir, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Repositories as the published ones are laid out, and others', with files in them that nobody needs."""
    root = tmp_path_factory.mktemp("repositories")
    pipeline = AceStepPipeline.from_pretrained(tiny_dir)
    for i, revision in enumerate(("main", "v2")):
        mark(pipeline, 11 + i, 1)
        pipeline.save_pretrained(root / "diffusers" / revision)
        (root / "diffusers" / revision / "everything.safetensors").write_bytes(bytes(1000))
        (root / "diffusers" / revision / "demo.wav").write_bytes(bytes(1000))
    mark(pipeline, 13, 2)
    write_original_checkpoint(pipeline, root / "main", "acestep-v15-turbo")
    (root / "main/config.json").write_text("{}")
    (root / "main/acestep-5Hz-lm-1.7B").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (root / "main/acestep-5Hz-lm-1.7B" / name).write_bytes(bytes(1000))
    mark(pipeline, 14, 0)
    write_original_checkpoint(pipeline, root / "base")
    mark(pipeline, 15, 3)
    write_original_checkpoint(pipeline, root / "two", "acestep-v15-sft")
    shutil.copytree(root / "main/acestep-v15-turbo", root / "two/acestep-v15-turbo")
    (root / "else").mkdir()
    (root / "else/README.md").write_text("nothing here")
    return {
        "someone/tiny-diffusers": {"main": root / "diffusers/main", "v2": root / "diffusers/v2"},
        "ACE-Step/Ace-Step1.5": {"main": root / "main"},
        "ACE-Step/acestep-v15-base": {"main": root / "base/acestep-v15-base"},
        "someone/two": {"main": root / "two"},
        "someone/something-else": {"main": root / "else"},
    }


class HubUser:
    """A process that resolves checkpoints, with the Hub at `url` and a cache of its own."""

    def __init__(self, url: str, cache_dir: Path):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(cache_dir), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", RESOLVE, str(cache_dir)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def resolve(self, cases: list[tuple]) -> dict[tuple, dict | str]:
        self.process.stdin.write(json.dumps(cases) + "\n")
        self.process.stdin.flush()
        return dict(zip(cases, json.loads(self.process.stdout.readline()), strict=True))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(timeout=60) == 0


@dataclass
class HubSession:
    """Every case resolved once from the served Hub, then some after it went down."""

    online: dict[tuple, dict | str]
    while_down: dict[tuple, dict | str]
    downloads: list[str]
    cache_dir: Path


UNCACHED = ("someone/never-seen", None, None)


@pytest.fixture(scope="module")
def session(repositories, tmp_path_factory) -> HubSession:
    cache_dir = tmp_path_factory.mktemp("hub")
    with serve_hub(repositories) as hub:
        user = HubUser(hub.url, cache_dir)
        online = user.resolve([*FOUND, *REFUSED])
    while_down = user.resolve([*FOUND, UNCACHED])
    user.close()
    return HubSession(online, while_down, hub.downloads, cache_dir)


def marks(parts: dict[str, str] | str) -> list[int]:
    """The numbers in the transformer and the text encoder of what was found."""
    assert isinstance(parts, dict), parts
    if "diffusers" in parts:
        folder = Path(parts["diffusers"])
        files = folder / "transformer/diffusion_pytorch_model.safetensors", folder / "text_encoder/model.safetensors"
    else:
        files = Path(parts["dit"]) / "model.safetensors", Path(parts["text_encoder"]) / "model.safetensors"
        assert (Path(parts["vae"]) / "diffusion_pytorch_model.safetensors").is_file()
    transformer, text_encoder = (load_file(file) for file in files)
    weight = transformer.get("norm_out.weight", transformer.get("decoder.norm_out.weight"))
    return [round(weight[0].item()), round(text_encoder["norm.weight"][0].item())]


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_hub_checkpoint_is_found(session, case):
    assert marks(session.online[case]) == FOUND[case]
    assert session.while_down[case] == session.online[case], "the cache serves while the Hub is down"


def assert_refused(message: dict | str, *parts: str) -> None:
    assert isinstance(message, str), message
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_hub_checkpoint_that_is_not_there_is_refused(session, case):
    assert_refused(session.online[case], *REFUSED[case])


def test_uncached_checkpoint_while_the_hub_is_down(session):
    assert_refused(session.while_down[UNCACHED], "someone/never-seen", "the Hub can't be reached")


def test_only_needed_files_are_downloaded_and_only_once(session):
    names = Counter(session.downloads)
    changed = "someone/tiny-diffusers/transformer/diffusion_pytorch_model.safetensors"
    assert [name for name, times in names.items() if times > 1] == [changed], "two revisions, one changed file"
    assert "ACE-Step/acestep-v15-base/model.safetensors" in names
    assert "ACE-Step/Ace-Step1.5/vae/diffusion_pytorch_model.safetensors" in names
    unneeded = [
        name for name in names if "5Hz-lm" in name or name.endswith((".wav", "README.md", "everything.safetensors"))
    ]
    assert unneeded == []
    assert "someone/two/acestep-v15-turbo/model.safetensors" not in names, "nobody asked for this variant"


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_cached_checkpoint_is_found_offline(session, case):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    name, variant_dir, revision = case
    found = resolve_checkpoint(name, variant_dir=variant_dir, revision=revision, cache_dir=str(session.cache_dir))
    parts = found.__dict__ if isinstance(found, OriginalCheckpoint) else {"diffusers": found}
    assert {part: str(path) for part, path in parts.items()} == session.online[case]


def test_cached_checkpoint_generates_offline(session):
    for name, mark in (("someone/tiny-diffusers", 11), ("ACE-Step/acestep-v15-base", 14)):
        pipeline = ACEStepPipeline.from_pretrained(name, cache_dir=str(session.cache_dir))
        assert pipeline.transformer.norm_out.weight[0].item() == mark
        assert generate(pipeline).isfinite().all()


def test_nothing_cached_and_offline(tmp_path):
    for name in ("ACE-Step/acestep-v15-base", "someone/tiny-diffusers"):
        message = usage_error(name, cache_dir=str(tmp_path))
        assert repr(name) in message
        assert "can't be reached" in message


def test_offline_with_only_a_part_cached(session, tmp_path):
    """Only the DiT's repository is in the cache: the message names the one that is not."""
    name = "models--ACE-Step--acestep-v15-base"
    shutil.copytree(session.cache_dir / name, tmp_path / name, symlinks=True)
    assert "'ACE-Step/Ace-Step1.5'" in usage_error("ACE-Step/acestep-v15-base", cache_dir=str(tmp_path))


def test_offline_with_one_of_two_variants_cached(session, tmp_path):
    """As after `hf download --include` of one variant: the other one's absence doesn't matter."""
    name = "models--someone--two"
    shutil.copytree(session.cache_dir / name, tmp_path / name, symlinks=True)
    (snapshot,) = (tmp_path / name / "snapshots").iterdir()
    shutil.rmtree(snapshot / "acestep-v15-turbo")
    for variant_dir in ("acestep-v15-sft", None):
        found = resolve_checkpoint("someone/two", variant_dir=variant_dir, cache_dir=str(tmp_path))
        assert found.dit == snapshot / "acestep-v15-sft"
