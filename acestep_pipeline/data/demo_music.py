"""The offline demo dataset: short clips of six genres, synthesised with numpy, for when no real music can be fetched.

Every clip is a step sequencer over band-limited additive tones and filtered noise. Waveforms here are
[channels=2, samples] float at the clip's own sample rate; times are seconds, frequencies Hz, pitches MIDI numbers.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf

from acestep_pipeline.errors import UsageError

RENDER_VERSION = 1  # part of the stamp: raise it whenever the same settings would render other samples
STAMP_NAME = "demo.json"
PEAK = 10 ** (-3 / 20)  # -3 dBFS
STEPS_PER_BEAT = 4  # the sequencer's grid is sixteenth notes
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # semitones above the tonic
PITCH_CLASSES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
LICENSE_TEXT = """The clips in this folder were rendered by this project (acestep_pipeline.data.demo_music): nobody
else's recording, sample or score is in them. They are released under CC0 1.0 (public domain dedication),
https://creativecommons.org/publicdomain/zero/1.0/: use them for anything, without asking or crediting.
"""


@dataclass(frozen=True)
class Timbre:
    """A tone: partial k has amplitude k^-rolloff and dies away `damping * (k - 1)` nepers/s faster than the first."""

    partials: int
    rolloff: float
    damping: float = 0.0
    attack_s: float = 0.004
    decay_s: float = 0.5  # time constant towards the sustain level
    sustain: float = 0.0
    release_s: float = 0.06
    detune_cents: float = 4.0  # between the voice on the left and the one on the right
    drive: float = 0.0  # gain into a tanh, 0 for none


@dataclass(frozen=True)
class Part:
    """One line of the sequencer. In `pattern`, a step is a sixteenth and the pattern repeats for the whole clip.

    Tones: `x` the chord, `0`–`3` one of its notes, `o` its root an octave up, `?` a random note of it, `-` holds the
    note before, `.` rests. Drums: `x` a hit, `g` a ghost note.
    """

    sound: Timbre | str
    pattern: str
    gain: float
    low: int = 0  # tones: the lowest MIDI note; chords are folded into the octave above it
    pan: float = 0.0  # -1 left … 1 right


@dataclass(frozen=True)
class Style:
    genre: str
    tags: str
    bpm: int
    tonic: int  # pitch class, C = 0
    mode: str  # a key of SCALES
    chords: tuple[int, ...]  # scale degree of each bar's root, I = 0
    parts: tuple[Part, ...]
    chord_size: int = 3
    beats_per_bar: int = 4
    swing: float = 0.0  # how late every second sixteenth comes, in sixteenths
    pump: float = 0.0  # how far the kick ducks the tones, 0–1
    reverb_s: float = 1.0  # time constant × ln(1000): T60
    wet: float = 0.15
    lowpass_hz: float = 16_000.0
    crackle: float = 0.0
    suffix: str = ".wav"  # 16-bit PCM for wav and flac, Vorbis for ogg
    sample_rate: int = 48_000


KEYS = Timbre(8, 1.4, damping=2.5, decay_s=0.9, sustain=0.15, release_s=0.15)
PIANO = Timbre(12, 1.3, damping=1.4, decay_s=0.7, sustain=0.05, release_s=0.2, detune_cents=2)
ORGAN = Timbre(8, 0.9, attack_s=0.01, decay_s=1.0, sustain=0.8, detune_cents=8)
PAD = Timbre(12, 1.3, attack_s=0.25, decay_s=2.0, sustain=0.8, release_s=0.3, detune_cents=12)
SLOW_PAD = Timbre(7, 1.7, attack_s=1.2, decay_s=4.0, sustain=0.8, release_s=1.5, detune_cents=9)
BELL = Timbre(4, 1.2, damping=1.5, decay_s=0.8, release_s=0.6, detune_cents=6)
ROUND_BASS = Timbre(4, 1.8, damping=1.0, decay_s=0.6, sustain=0.5, detune_cents=0)
SAW_BASS = Timbre(24, 0.9, damping=1.2, decay_s=0.25, sustain=0.3, detune_cents=3)
STAB = Timbre(20, 0.8, damping=3.0, decay_s=0.15, release_s=0.08, detune_cents=14)
LEAD = Timbre(14, 1.0, damping=0.4, attack_s=0.02, decay_s=0.6, sustain=0.5, release_s=0.15, detune_cents=10)
GUITAR = Timbre(16, 0.9, damping=2.5, decay_s=0.18, sustain=0.1, release_s=0.03, detune_cents=8, drive=2.0)

STYLES = (
    Style(
        "lo-fi hip hop", "lo-fi hip hop, chill, electric piano, jazzy chords, dusty drums, vinyl crackle, mellow",
        78, 5, "major", (1, 4, 0, 5), (
            Part(KEYS, "x-----x---x-----", 0.2, low=57, pan=-0.2),
            Part(KEYS, "....?-?-....?---........?-?-?---", 0.2, low=72, pan=0.35),
            Part(ROUND_BASS, "0-----..0-..2---", 0.24, low=33),
            Part("kick", "x.....x...x.....", 0.5), Part("snare", "....x.......x..g", 0.5, pan=0.1),
            Part("hat", "x.x.x.xgx.x.x.xg", 0.3, pan=-0.3),
        ), chord_size=4, swing=0.3, lowpass_hz=6_500, crackle=0.05, reverb_s=0.8, wet=0.2,
    ),
    Style(
        "techno", "techno, driving, four on the floor, acid bass, analog synths, dark, club, instrumental",
        128, 9, "minor", (0, 0, 5, 3), (
            Part(SAW_BASS, "..0.0.0o..0.0.20", 0.24, low=33),
            Part(STAB, "...x..x....x..x.", 0.26, low=60, pan=0.25),
            Part(PAD, "x---------------", 0.12, low=57),
            Part("kick", "x...x...x...x...", 0.7), Part("clap", "....x.......x...", 0.6),
            Part("hat", "..x...x...x...x.", 0.6, pan=0.2), Part("hat", "gggggggggggggggg", 0.5, pan=-0.35),
        ), pump=0.55, suffix=".flac",
    ),
    Style(
        "synthwave", "synthwave, 1980s, retro, arpeggiated synth, analog pads, gated snare, nostalgic, instrumental",
        100, 2, "minor", (0, 5, 2, 6), (
            Part(SAW_BASS, "0-0-0-0-0-0-o-o-", 0.22, low=36),
            Part(STAB, "012o012o012o210o", 0.26, low=62, pan=-0.4),
            Part(PAD, "x---------------", 0.14, low=57),
            Part(LEAD, "?---..?-?-----..?-----?-?-------", 0.2, low=74, pan=0.25),
            Part("kick", "x...x...x...x...", 0.55), Part("snare", "....x.......x...", 0.65),
            Part("hat", "..x...x...x...x.", 0.5, pan=0.3),
        ), pump=0.35, reverb_s=1.8, wet=0.25, suffix=".ogg",
    ),
    Style(
        "waltz", "waltz, classical, solo piano, elegant, graceful, acoustic, triple metre, instrumental",
        144, 7, "major", (0, 5, 1, 4, 0, 3, 4, 0), (
            Part(PIANO, "0-----------", 0.36, low=36, pan=-0.25),
            Part(PIANO, "....x---x---", 0.2, low=55, pan=-0.1),
            Part(PIANO, "?---?---?---?-------?---?-----?-?---?-----------", 0.34, low=71, pan=0.25),
        ), beats_per_bar=3, reverb_s=1.6, wet=0.2, suffix=".flac", sample_rate=44_100,
    ),
    Style(
        "ambient", "ambient, ethereal, slow, warm pads, bells, spacious reverb, meditative, instrumental",
        66, 4, "major", (0, 4, 5, 3), (
            Part(SLOW_PAD, "x---------------", 0.15, low=55),
            Part(ROUND_BASS, "0---------------", 0.12, low=28),
            Part(BELL, "?---..?---....?-....?---?-......", 0.22, low=76, pan=0.4),
            Part(BELL, "..........?---....?---........?-", 0.18, low=84, pan=-0.5),
        ), chord_size=4, reverb_s=3.5, wet=0.5, lowpass_hz=11_000,
    ),
    Style(
        "funk rock", "funk rock, groovy, syncopated bass, distorted rhythm guitar, organ, tight drums, instrumental",
        106, 11, "minor", (0, 0, 3, 6), (
            Part(SAW_BASS, "0..0.0o...0.0.2.", 0.28, low=35),
            Part(GUITAR, "..x...xx..x..x..", 0.2, low=59, pan=-0.4),
            Part(ORGAN, "x-------..x-----", 0.11, low=64, pan=0.4),
            Part("kick", "x..x......x.....", 0.6), Part("snare", "....x..g.g..x..g", 0.7, pan=0.05),
            Part("hat", "x.x.x.x.x.x.x.xg", 0.5, pan=0.3),
        ), chord_size=4, reverb_s=0.7, wet=0.15, suffix=".ogg",
    ),
)  # fmt: skip


def _tone(timbre: Timbre, pitch: int, duration_s: float, rate: int) -> np.ndarray:
    """One note, [2, samples]: partials below 0.45 × `rate` only, so nothing aliases (except through `drive`)."""
    time = np.arange(int((duration_s + timbre.release_s) * rate)) / rate
    hertz = 440.0 * 2 ** ((pitch - 69) / 12)
    partials = max(1, min(timbre.partials, int(0.45 * rate / hertz)))
    amplitudes = np.arange(1, partials + 1) ** -timbre.rolloff
    amplitudes /= np.sqrt(np.sum(amplitudes**2))
    fade_per_partial = np.exp(-timbre.damping * time)
    voices = []
    for cents in (-timbre.detune_cents / 2, timbre.detune_cents / 2):
        phase = 2 * np.pi * hertz * 2 ** (cents / 1200) * time
        previous, current, twice_cosine = np.zeros_like(time), np.sin(phase), 2 * np.cos(phase)
        voice, fade = np.zeros_like(time), np.ones_like(time)
        for amplitude in amplitudes:
            voice += amplitude * fade * current
            # sin((k + 1) x) = 2 cos(x) sin(k x) - sin((k - 1) x)
            previous, current = current, twice_cosine * current - previous
            fade = fade * fade_per_partial
        voices.append(np.tanh(timbre.drive * voice) if timbre.drive else voice)
    envelope = timbre.sustain + (1 - timbre.sustain) * np.exp(-time / timbre.decay_s)
    envelope *= np.clip(time / timbre.attack_s, 0, 1) * np.clip((time[-1] - time) / timbre.release_s, 0, 1)
    left, right = voices
    return np.stack([left + 0.4 * right, right + 0.4 * left]) * envelope / 1.2


def _filter(waveform: np.ndarray, rate: int, *, low_hz: float = 0.0, high_hz: float = np.inf) -> np.ndarray:
    """Band-pass [..., samples] from `low_hz` to `high_hz` with second-order-Butterworth-like slopes and zero phase."""
    samples = waveform.shape[-1]
    hertz = np.fft.rfftfreq(samples, 1 / rate)
    gain = 1 / np.sqrt(1 + (hertz / high_hz) ** 4)
    gain *= hertz**2 / np.sqrt(hertz**4 + max(low_hz, 1e-3) ** 4)
    return np.fft.irfft(np.fft.rfft(waveform) * gain, samples)


def _drum(kind: str, rate: int, rng: np.random.Generator) -> np.ndarray:
    """One drum hit, [2, samples], peaking near 1: a falling sine for the kick, filtered noise for the others."""
    time = np.arange(int(0.4 * rate)) / rate
    noise = rng.standard_normal((2, time.size)) * 0.5 + rng.standard_normal(time.size) * 0.5  # half of it is mono
    if kind == "kick":
        phase = 2 * np.pi * (46 * time + 120 * 0.03 * (1 - np.exp(-time / 0.03)))  # 166 Hz falling to 46 Hz
        click = _filter(noise, rate, low_hz=800, high_hz=5_000) * np.exp(-time / 0.004)
        hit = np.sin(phase) * np.exp(-time / 0.13) + 0.3 * click
    elif kind == "snare":
        body = np.sin(2 * np.pi * 185 * time) * np.exp(-time / 0.05)
        hit = 0.6 * body + 0.8 * _filter(noise, rate, low_hz=900, high_hz=7_500) * np.exp(-time / 0.075)
    elif kind == "clap":
        burst = sum(np.where(time >= at, np.exp(-(time - at) / decay), 0) for at, decay in
                    ((0, 0.006), (0.011, 0.006), (0.022, 0.07)))  # fmt: skip
        hit = 1.2 * _filter(noise, rate, low_hz=800, high_hz=3_500) * burst
    else:  # hat
        hit = _filter(noise, rate, low_hz=6_500, high_hz=13_000) * np.exp(-time / 0.03)
    fade = np.clip(time / 0.001, 0, 1) * np.clip((time[-1] - time) / 0.02, 0, 1)
    return np.broadcast_to(hit, (2, time.size)) * fade


def _chord_pitches(style: Style, tonic: int, bar: int, low: int) -> list[int]:
    """MIDI notes of the bar's chord in the order root, third, fifth (, seventh), each in [`low`, `low` + 12)."""
    scale, root = SCALES[style.mode], style.chords[bar % len(style.chords)]
    return [low + (tonic + scale[(root + 2 * i) % 7] - low) % 12 for i in range(style.chord_size)]


def _sequence(part: Part, style: Style, bpm: int, tonic: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Play one part for the whole clip, [2, `samples`], with small random differences in loudness and timing."""
    rate, step_s = style.sample_rate, 60 / bpm / STEPS_PER_BEAT
    track = np.zeros((2, samples))
    pan = np.sqrt(np.clip([1 - part.pan, 1 + part.pan], 0, None))[:, None]
    sounds: dict[object, np.ndarray] = {}
    for step in range(int(np.ceil(samples / rate / step_s))):
        symbol = part.pattern[step % len(part.pattern)]
        loudness, late_s = rng.uniform(0.85, 1.0), rng.uniform(0, 0.004)
        choice = int(rng.integers(style.chord_size))  # drawn at every step, so that patterns don't shift each other
        if symbol in ".-":
            continue
        if isinstance(part.sound, str):
            if not sounds:
                sounds[part.sound] = _drum(part.sound, rate, rng)
            hits, loudness = [sounds[part.sound]], loudness * (0.35 if symbol == "g" else 1.0)
        else:
            chord = _chord_pitches(style, tonic, step // (style.beats_per_bar * STEPS_PER_BEAT), part.low)
            named = {"x": chord, "o": [chord[0] + 12], "?": [chord[choice]]}
            pitches = named[symbol] if symbol in named else [chord[int(symbol)]]
            rest = part.pattern[step % len(part.pattern) + 1 :]
            length_s = (1 + len(rest) - len(rest.lstrip("-"))) * step_s
            for pitch in pitches:
                if (pitch, length_s) not in sounds:
                    sounds[pitch, length_s] = _tone(part.sound, pitch, length_s, rate)
            hits = [sounds[pitch, length_s] for pitch in pitches]
        start = int((step * step_s + (style.swing * step_s if step % 2 else 0) + late_s) * rate)
        for hit in hits:
            room = max(0, min(hit.shape[1], samples - start))
            track[:, start : start + room] += part.gain * loudness * pan * hit[:, :room]
    return track


def _render_clip(style: Style, bpm: int, tonic: int, duration_s: float, rng: np.random.Generator) -> np.ndarray:
    """The mastered clip, [2, samples] float64 peaking at -3 dBFS, faded at both ends."""
    rate, samples = style.sample_rate, round(duration_s * style.sample_rate)
    time = np.arange(samples) / rate
    tones, drums = np.zeros((2, samples)), np.zeros((2, samples))
    for part in style.parts:
        (drums if isinstance(part.sound, str) else tones)[:] += _sequence(part, style, bpm, tonic, samples, rng)
    tones *= 1 - style.pump * np.exp(-(time % (60 / bpm)) / 0.1)

    # Reverberation: convolution with noise that dies away; it differs between the sides, which gives the width.
    tail_s = np.arange(int(style.reverb_s * rate)) / rate
    tail = rng.standard_normal((2, tail_s.size)) * np.exp(-np.log(1000) / style.reverb_s * tail_s)
    tail = _filter(tail, rate, low_hz=250, high_hz=5_000)
    tail /= np.sqrt(np.sum(tail**2, axis=1, keepdims=True))
    size = 1 << (samples + tail_s.size - 1).bit_length()
    send = tones + 0.35 * drums
    reverb = np.fft.irfft(np.fft.rfft(send, size) * np.fft.rfft(tail, size), size)[:, :samples]

    mix = _filter(tones + drums + style.wet * reverb, rate, low_hz=28, high_hz=style.lowpass_hz)
    pops = rng.standard_normal((2, samples)) * (rng.random(samples) < 25 / rate)  # about 25 a second
    mix += style.crackle * _filter(6 * pops, rate, low_hz=500, high_hz=6_000)
    mix = np.tanh(1.2 * mix / np.quantile(np.abs(mix), 0.999))  # soft limiter: rounds off only the loudest peaks
    fade_out_s = min(0.8, duration_s / 4)
    mix *= np.clip(time / 0.01, 0, 1) * np.sin(np.pi / 2 * np.clip((duration_s - time) / fade_out_s, 0, 1)) ** 2
    return mix * (PEAK / np.abs(mix).max())


def _write_clip(folder: Path, index: int, duration_s: float, seed: int) -> str:
    """Render clip `index` and its sidecars into `folder`; returns the audio file's name.

    Key and tempo are the style's own for its first clip at seed 0 and vary elsewhere.
    """
    style, rng = STYLES[index % len(STYLES)], np.random.default_rng([seed, index])
    vary = seed != 0 or index >= len(STYLES)
    bpm = style.bpm + (int(rng.integers(-5, 6)) if vary else 0)
    tonic = (style.tonic + (int(rng.integers(12)) if vary else 0)) % 12
    waveform = _render_clip(style, bpm, tonic, duration_s, rng)

    stem = f"{index + 1:02d}_{style.genre.replace(' ', '_').replace('-', '')}"
    audio_path = folder / f"{stem}{style.suffix}"
    subtype = "VORBIS" if style.suffix == ".ogg" else "PCM_16"
    quality = {"compression_level": 0.1} if subtype == "VORBIS" else {}  # coarser coding overshoots the peak by 1 dB
    with sf.SoundFile(audio_path, "w", style.sample_rate, 2, subtype, **quality) as file:
        for second in np.array_split(waveform.T, np.ceil(duration_s)):  # one long Vorbis write overflows the C stack
            file.write(second)
    key = {"keyscale": f"{PITCH_CLASSES[tonic]} {style.mode}", "timesignature": str(style.beats_per_bar)}
    metadata = {"genre": style.genre, "bpm": bpm, **key, "language": "unknown"}
    (folder / f"{stem}.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (folder / f"{stem}.tags.txt").write_text(style.tags + "\n", encoding="utf-8")
    if index == 0:  # one clip says so explicitly; the others show that the file may be absent
        (folder / f"{stem}.lyrics.txt").write_text("[Instrumental]\n", encoding="utf-8")
    return audio_path.name


def _existing_clips(directory: Path, settings: dict) -> list[Path] | None:
    """The clips of a complete set with the same settings; None where nothing is in the way; else `UsageError`."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return None
    try:
        stamp = json.loads((directory / STAMP_NAME).read_text(encoding="utf-8"))
        clips = [directory / name for name in stamp["clips"]]
        if all(stamp[key] == value for key, value in settings.items()) and all(clip.is_file() for clip in clips):
            return clips
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no stamp of ours: whatever is there belongs to somebody else
    raise UsageError(
        f"{directory} already exists and isn't a complete demo dataset with these settings ({settings}); "
        "choose another directory, or remove this one"
    )


def render_demo_dataset(directory: Path, *, num_clips: int = 6, duration_s: float = 12.0, seed: int = 0) -> list[Path]:
    """Render `num_clips` instrumental stereo clips of `duration_s` seconds with sidecars, and return the audio files.

    Beside each clip lie `<stem>.tags.txt` (descriptors) and `<stem>.json` (genre, bpm, keyscale, timesignature,
    language). The styles take turns; formats are wav, flac and ogg at 48 kHz and one at 44.1 kHz, peaking at -3 dBFS.
    The same arguments give the same samples on the same machine. The folder appears under its name only when complete;
    one rendered earlier with the same settings is returned as it is.

    Raises:
        UsageError: `directory` holds anything else, or a number is out of range.
    """
    directory = Path(directory)
    if num_clips < 1 or not duration_s >= 1 or seed < 0:
        raise UsageError(f"{num_clips=}, {duration_s=}, {seed=}: need at least one clip, one second and a seed ≥ 0")
    settings = {"version": RENDER_VERSION, "num_clips": num_clips, "duration_s": float(duration_s), "seed": seed}
    clips = _existing_clips(directory, settings)
    if clips is not None:
        return clips
    target = directory.resolve()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise UsageError(f"can't write to {target.parent} ({error.strerror}); choose another directory") from error
    with temporary:
        staging = Path(temporary.name) / "clips"
        staging.mkdir()
        names = [_write_clip(staging, index, duration_s, seed) for index in range(num_clips)]
        (staging / "LICENSE.txt").write_text(LICENSE_TEXT, encoding="utf-8")
        (staging / STAMP_NAME).write_text(json.dumps(settings | {"clips": names}, indent=2) + "\n", encoding="utf-8")
        staging.rename(target)
    return [directory / name for name in names]
