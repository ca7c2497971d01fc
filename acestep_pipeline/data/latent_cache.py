"""The latent cache: VAE means and standard deviations, and condition tensors, computed once per track and model.

Files are named by the content they came from (audio hash and VAE; text and encoders), so another run, another folder
or another rank finds them, and another model never does.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..conditioning import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS, PromptFields, encode_condition
from ..engines import map_in_order
from ..errors import RunError
from ..progress import progress_bar
from .audio import AudioError, read_audio, stream_audio
from .cache_files import cache_folder, read_header, write_cache_file
from .encoders import Encoders
from .remote_shards import SHELF
from .text.lyrics import cut_to_window, lines_beyond
from .text.variants import TextOptions, make_wordings
from .tiled_encoding import encode_in_tiles
from .tracks import Problem, Track

# Crops are whole multiples of this, so that the duration the model is told is exact and the DiT's patches of two
# frames (at 25 frames a second) are never padded.
CROP_STEP_S = 2
# Decoding goes ahead of encoding in so many threads (one of them decodes and resamples some 350 times as fast as the
# music plays), with `engines.LOOK_AHEAD` tracks each; longer tracks than this (115 MB) wait for their turn.
DECODING_THREADS = 2
MAX_AHEAD_S = 300.0
NO_TEXT_OPTIONS = TextOptions()


@dataclass(frozen=True)
class Window:
    """A crop of a track: the latent frame it starts at, and what the model is told about it.

    `shuffled` and `without_tags` are the same crop told otherwise (`text.variants.Wordings`), themselves without any.
    """

    start_frame: int
    fields: PromptFields
    condition_file: Path
    num_condition_tokens: int
    shuffled: tuple["Window", ...] = ()
    without_tags: "Window | None" = None

    def wordings(self) -> tuple["Window", ...]:
        """The window itself, and all that it is told otherwise."""
        return (self, *self.shuffled, *([self.without_tags] if self.without_tags else []))


@dataclass(frozen=True)
class CachedTrack:
    """A track ready to train on: where its tensors are, and the windows that it is heard in.

    All windows are `crop_frames` long. `weight` is the track's `sampling_weight`, `repeats` are its `repeats`.
    """

    id: str
    latents_file: Path
    num_frames: int
    crop_frames: int
    windows: tuple[Window, ...]
    weight: float = 1.0
    repeats: int = 1

    def is_here(self) -> bool:
        """Whether its files are on this machine."""
        told = [wording for window in self.windows for wording in window.wordings()]
        return self.latents_file.is_file() and all(wording.condition_file.is_file() for wording in told)


def crop_frames(num_frames: int, max_duration_s: float, frames_per_second: float) -> int:
    """Length of a training crop: a duration bucket, so that tracks of almost one length share forward passes.

    Buckets are multiples of `CROP_STEP_S` in eight steps from each power of two to the next (…, 120, 128, 144, 160 s,
    …), and `max_duration_s` rounded down to such a multiple. A track is heard in windows of the longest one within it,
    at least eight ninths of what it could be.
    """
    step = round(CROP_STEP_S * frames_per_second)
    longest = int(max_duration_s * frames_per_second) // step
    steps = min(num_frames // step, longest)
    coarse = max(0, steps.bit_length() - 4)
    return (steps if steps == longest else steps >> coarse << coarse) * step


def plan_windows(num_frames: int, crop_frames: int) -> tuple[int, ...]:
    """First frames of the fewest windows that cover a track evenly: every frame is in one of them, or in two."""
    last = num_frames - crop_frames
    gaps = -(-num_frames // crop_frames) - 1
    return tuple(index * last // gaps for index in range(gaps + 1)) if gaps else (0,)


def prompt_fields(track: Track, prompt: str, lyrics: str, duration_s: float) -> PromptFields:
    """What the model is told about a crop of `duration_s` seconds of `track`, in which `lyrics` are sung.

    `prompt` is one of the track's `Wordings`.
    """
    return PromptFields(
        prompt=prompt,
        lyrics=lyrics,
        vocal_language=track.language,
        bpm=track.bpm,
        keyscale=track.keyscale,
        timesignature=track.timesignature,
        audio_duration=duration_s,
    )


class LatentCache:
    """Encodes tracks with the frozen encoders, which are loaded for the first that isn't cached, and keeps the results
    on disk."""

    def __init__(self, directory: Path, encoders: Encoders, text: TextOptions = NO_TEXT_OPTIONS) -> None:
        """Find or make the folders of these encoders; raises `UsageError` if that can't be done.

        `text` says in which words tracks are told.
        """
        self.encoders = encoders
        self.text = text
        self._damaged: list[str] = []
        facts = encoders.facts
        self.latents_dir = cache_folder(directory, f"latents-{facts.vae_key}")
        self.conditions_dir = cache_folder(directory, f"conditions-{facts.text_key}")

    def decode(self, track: Track) -> np.ndarray | None:
        """The waveform that `prepare` will need, `[2, samples]`, from any thread.

        None where it needs none, and where it had better decode for itself: a long track, which would take too much
        memory meanwhile, or one that can't be decoded, whose error belongs in its turn.
        """
        if track.duration_s > MAX_AHEAD_S or self._latents_path(track).is_file():
            return None
        try:
            return read_audio(track.source, sample_rate=self.encoders.facts.sample_rate)
        except (AudioError, OSError):
            return None

    def prepare(
        self, track: Track, max_duration_s: float, decoded: np.ndarray | None = None
    ) -> tuple[CachedTrack | None, list[Problem]]:
        """Encode what is not cached yet; `decoded` is what `decode` gave.

        Returns:
            The cached track, or None if its audio can't be used, and the problems found.
        """
        try:
            latents_file, num_frames = self._latents(track, decoded)
        except AudioError as error:
            return None, [Problem(track.id, str(error), skipped=True)]
        rate = self.encoders.facts.latents_per_second
        crop = crop_frames(num_frames, max_duration_s, rate)
        if not crop:
            reason = f"it decodes to {num_frames / rate:.1f} s; a crop needs at least {CROP_STEP_S} s"
            return None, [Problem(track.id, reason, skipped=True)]
        windows, problems = self._windows(track, num_frames, crop)
        problems += [
            Problem(track.id, f"its cache file {name} was damaged and is made again", skipped=False)
            for name in self._damaged
        ]
        self._damaged.clear()
        return CachedTrack(
            id=track.id,
            latents_file=latents_file,
            num_frames=num_frames,
            crop_frames=crop,
            windows=windows,
            weight=track.sampling_weight,
            repeats=track.repeats,
        ), problems

    def locate(self, entry: CachedTrack) -> CachedTrack:
        """A track that another process cached, with the paths that its files have, or would have, in this cache."""

        def here(window: Window) -> Window:
            return replace(
                window,
                condition_file=self.conditions_dir / window.condition_file.name,
                shuffled=tuple(map(here, window.shuffled)),
                without_tags=here(window.without_tags) if window.without_tags else None,
            )

        windows = tuple(map(here, entry.windows))
        return replace(entry, latents_file=self.latents_dir / entry.latents_file.name, windows=windows)

    def _windows(self, track: Track, num_frames: int, crop: int) -> tuple[tuple[Window, ...], list[Problem]]:
        """The windows of a track, each with its condition; windows that are told the same share one."""
        rate = self.encoders.facts.latents_per_second
        song_s, crop_s = num_frames / rate, crop / rate
        starts = plan_windows(num_frames, crop)
        lyrics = [cut_to_window(track.lyrics, start / rate, start / rate + crop_s, song_s=song_s) for start in starts]
        wordings = make_wordings(
            track.tags,
            self.text,
            trigger_word=track.trigger_word,
            trigger_position=track.trigger_position,
            key=track.sha256,
        )
        conditions: dict[PromptFields, tuple[Path, int, int, int]] = {}

        def window(start: int, words: str, prompt: str, **others) -> Window:
            fields = prompt_fields(track, prompt, words, crop_s)
            if fields not in conditions:
                conditions[fields] = self._condition(fields)
            return Window(start, fields, *conditions[fields][:2], **others)

        windows = []
        for told in zip(starts, lyrics, strict=True):
            without = None if wordings.without_tags is None else window(*told, wordings.without_tags)
            shuffled = tuple(window(*told, prompt) for prompt in wordings.shuffled)
            windows.append(window(*told, wordings.given, shuffled=shuffled, without_tags=without))
        lost_text, lost_lyrics = (max(condition[part] for condition in conditions.values()) for part in (2, 3))
        reasons = []
        if lost_text:
            reasons.append(f"its tags are cut: {lost_text} tokens beyond the model's {MAX_TEXT_TOKENS} are lost")
        if lost_lyrics:
            reasons.append(f"its lyrics are cut: {lost_lyrics} tokens beyond the model's {MAX_LYRIC_TOKENS} are lost")
        if late := lines_beyond(track.lyrics, song_s):
            reasons.append(f"{late} lines of its lyrics are timed beyond its end at {song_s:.1f} s and are left out")
        return tuple(windows), [Problem(track.id, reason, skipped=False) for reason in reasons]

    def _latents_path(self, track: Track) -> Path:
        return self.latents_dir / f"{track.sha256}.safetensors"

    def _latents(self, track: Track, decoded: np.ndarray | None) -> tuple[Path, int]:
        path = self._latents_path(track)
        header = self._header(path)
        if header is None:
            audio = track.source if decoded is None else None  # to ask for it may be to fetch it
            write_cache_file(path, encode_latents(self.encoders.pipeline.vae, audio, decoded), {})
            header = read_header(path)
        return path, header["shapes"]["mean"][0]

    def _condition(self, fields: PromptFields) -> tuple[Path, int, int, int]:
        key = hashlib.sha256(json.dumps(asdict(fields), sort_keys=True).encode()).hexdigest()
        path = self.conditions_dir / f"{key}.safetensors"
        header = self._header(path)
        if header is None:
            encoded = encode_condition(self.encoders.pipeline, fields)
            lost = {"lost_text": str(encoded.lost_text_tokens), "lost_lyrics": str(encoded.lost_lyric_tokens)}
            write_cache_file(path, {"encoder_hidden_states": encoded.encoder_hidden_states}, lost)
            header = read_header(path)
        num_tokens = header["shapes"]["encoder_hidden_states"][0]
        return path, num_tokens, int(header["metadata"]["lost_text"]), int(header["metadata"]["lost_lyrics"])

    def _header(self, path: Path) -> dict | None:
        """`read_header`; a file that is there and can't be used is remembered as damaged."""
        header = read_header(path)
        if header is None and path.is_file():
            self._damaged.append(path.name)
        return header


@torch.no_grad()
def encode_latents(vae, audio: Path | bytes | None, decoded: np.ndarray | None = None) -> dict[str, torch.Tensor]:
    """Decode audio and encode it: `mean` and `std` of the VAE's posterior, float32 `[frames, channels]` on the CPU.

    The waveform is cut to whole latent frames (less than 40 ms are lost) and encoded in tiles, while it is decoded, so
    that memory doesn't grow with it; or from `decoded`, where that has been done.

    Raises:
        AudioError: the audio can't be decoded, or is shorter than one latent frame.
    """
    blocks = stream_audio(audio, sample_rate=vae.config.sampling_rate) if decoded is None else [decoded]
    posterior = encode_in_tiles(vae, blocks)
    tensors = {"mean": posterior.mean, "std": posterior.std}
    tensors = {name: tensor[0].transpose(0, 1).float().cpu().contiguous() for name, tensor in tensors.items()}
    if not all(torch.isfinite(tensor).all() for tensor in tensors.values()):
        raise AudioError("the VAE makes NaN or infinite latents of it")
    return tensors


def prepare_tracks(
    cache: LatentCache, tracks: list[Track], *, max_duration_s: float, show_progress: bool = True
) -> tuple[list[CachedTrack], list[Problem]]:
    """`LatentCache.prepare` over many tracks, with a progress bar in seconds of audio.

    While one is encoded, threads decode the next ones. Shards that were fetched for them are gone in the end.
    """
    cached, problems = [], []
    total = sum(track.duration_s for track in tracks)
    layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} s of audio [{elapsed}<{remaining}{postfix}]"
    with (
        contextlib.closing(SHELF),
        progress_bar(total=total, desc="Caching latents", bar_format=layout, disable=not show_progress) as bar,
        contextlib.closing(map_in_order(cache.decode, tracks, num_workers=DECODING_THREADS)) as ahead,
    ):
        for track in tracks:
            bar.set_postfix_str(track.id[-40:], refresh=False)
            entry, found = cache.prepare(track, max_duration_s, next(ahead))
            problems += found
            if entry is not None:
                cached.append(entry)
            bar.update(track.duration_s)
    return cached, problems


def load_latents(track: CachedTrack, window: Window | None = None) -> dict[str, torch.Tensor]:
    """`mean` and `std`, float32 `[frames, channels]`, of one window (nothing else is read) or of the whole track."""
    frames = slice(0, track.num_frames)
    if window is not None:
        frames = slice(window.start_frame, window.start_frame + track.crop_frames)
    with _still_there(track.latents_file), safe_open(track.latents_file, "pt") as file:
        return {name: file.get_slice(name)[frames] for name in ("mean", "std")}


def load_condition(window: Window) -> torch.Tensor:
    """`encoder_hidden_states`, `[tokens, dim]`, in the encoder's dtype."""
    with _still_there(window.condition_file):
        return load_file(window.condition_file)["encoder_hidden_states"]


@contextlib.contextmanager
def _still_there(file: Path) -> Iterator[None]:
    """Name a file of the cache that has been removed or damaged since it was written or looked at."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{file} of the latent cache was removed or damaged meanwhile; the same command with "
            "--resume_from_checkpoint latest goes on from the newest checkpoint, and fills the cache again."
        ) from error
