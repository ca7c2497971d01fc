"""How often the automatic BPM and key are right, on MIDI files rendered to sound: their tempo is written in them.

    python benchmarks/auto_tags.py --midi-dir DIR --soundfont FILE.sf2 [--music-dir DIR] [--output RESULT.json]

Each file is rendered with FluidSynth as it is and at other tempi (the default tempo of MIDI, 120, is over-represented
otherwise). A tempo counts as right within 4 %, with octave errors wrong. Keys are those of chord progressions written
here in all 24 keys, and those of the files that declare a key other than MIDI's default of C major. Noise, silence, a
tone, random clicks and babble must give nothing. `--music-dir` adds what share of real recordings is accepted.

On Debian: `apt-get install fluidsynth timgm6mb-soundfont openttd-openmsx` gives FluidSynth, a sound font and 31 files;
`pip install mido` reads them.
"""

import argparse
import collections
import io
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from acestep_pipeline.data.audio import AUDIO_SUFFIXES, probe_audio, read_audio, stream_audio
from acestep_pipeline.data.building.auto_tags import (
    BPM_THRESHOLD,
    KEY_THRESHOLD,
    NOTES,
    MiddleSection,
    estimate_tags,
    require_librosa,
)
from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors

# Semitones above the tonic and mode of each chord of some common progressions. The loop i VI III VII is left out: it
# is vi IV I V of the relative major as well, so that neither key is wrong.
PROGRESSIONS = {
    "major": (
        ((0, "major"), (7, "major"), (9, "minor"), (5, "major")),
        ((0, "major"), (5, "major"), (7, "major"), (0, "major")),
        ((2, "minor"), (7, "major"), (0, "major"), (9, "minor")),
    ),
    "minor": (
        ((0, "minor"), (8, "major"), (5, "minor"), (7, "major")),
        ((0, "minor"), (5, "minor"), (7, "major"), (0, "minor")),
        ((0, "minor"), (10, "major"), (8, "major"), (7, "major")),
    ),
}
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
PROGRAMS = (0, 4, 16, 24, 27, 48, 80, 88)  # pianos, organ, guitars, strings, synthesizers


@dataclass(frozen=True)
class Result:
    """One estimate; `truth` is None where no answer is right."""

    name: str
    field: str
    truth: float | str | None
    value: int | str | None
    confidence: float
    right: bool
    seconds: float


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--midi-dir", type=Path, required=True, help="MIDI files, searched recursively")
    parser.add_argument("--soundfont", type=Path, required=True, help="the .sf2 that FluidSynth plays them with")
    parser.add_argument("--tempo-scales", type=float, nargs="+", default=[1.0, 0.81, 1.23])
    parser.add_argument("--progressions", type=int, default=48, help="number of chord progressions to write")
    parser.add_argument("--music-dir", type=Path, help="recordings of which to say what share is accepted")
    parser.add_argument("--output", type=Path, help="write every estimate and the table as JSON")
    return parser.parse_args(input_args)


def main(input_args: list[str] | None = None) -> dict:
    args = parse_args(input_args)
    require_librosa()
    try:
        import mido
    except ImportError as error:
        raise UsageError("this benchmark reads MIDI with mido: pip install mido") from error
    files = sorted(path for path in args.midi_dir.rglob("*") if path.suffix.lower() in {".mid", ".midi"})
    if not files or not args.soundfont.is_file():
        raise UsageError("--midi-dir must hold MIDI files and --soundfont must name a .sf2 file.")
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for file in files:
            bpm, key = truth(mido.MidiFile(file))
            for scale in args.tempo_scales:
                jobs.append((file.stem, at_tempo(mido, file, scale), {"bpm": bpm * scale, "declared key": key}))
        for number in range(args.progressions):
            key, midi = progression(mido, number)
            jobs.append((f"progression {number}", midi, {"written key": key}))
        with ThreadPoolExecutor(2) as pool:  # renders ahead of the estimates; the files are small
            sounds = pool.map(lambda job: render(job[1], args.soundfont, Path(folder)), jobs)
            for (name, _, wanted), waveform in zip(jobs, sounds, strict=True):
                results += judge(name, waveform, wanted)
    for name, waveform in not_music().items():
        results += judge(name, waveform, {"bpm": None, "written key": None}, label="not music")
    table = {"bpm threshold": BPM_THRESHOLD, "key threshold": KEY_THRESHOLD, **summarise(results)}
    if args.music_dir:
        table["recordings"] = recordings(args.music_dir)
    print(json.dumps(table, indent=2))
    if args.output:
        args.output.write_text(json.dumps({"table": table, "results": [asdict(r) for r in results]}, indent=1))
    return table


def truth(midi) -> tuple[float, str | None]:
    """The tempo that lasts longest, and the key, if the file declares one and it is not the default of C major."""
    lasts: collections.Counter = collections.Counter()
    tempo, keys = 500_000, []  # microseconds a beat until a file says otherwise
    for message in midi:
        lasts[tempo] += message.time
        if message.type == "set_tempo":
            tempo = message.tempo
        elif message.type == "key_signature":
            keys.append(message.key)
    key = keys[0] if len(set(keys)) == 1 and keys[0] != "C" else None
    return 60e6 / lasts.most_common(1)[0][0], key and f"{key.rstrip('m')} {'minor' if key.endswith('m') else 'major'}"


def at_tempo(mido, file: Path, scale: float) -> bytes:
    """The file with every tempo multiplied by `scale`."""
    midi = mido.MidiFile(file)
    for track in midi.tracks:
        for index, message in enumerate(track):
            if message.type == "set_tempo":
                track[index] = message.copy(tempo=round(message.tempo / scale))
    midi.tracks[0].insert(0, mido.MetaMessage("set_tempo", tempo=round(500_000 / scale)))
    return to_bytes(midi)


def progression(mido, number: int, bars: int = 24) -> tuple[str, bytes]:
    """Chords, a bass and a melody of the scale in one of the 24 keys."""
    rng = random.Random(number)
    mode, tonic = ("major", "minor")[number % 2], number // 2 % 12
    chords = rng.choice(PROGRESSIONS[mode])
    midi = mido.MidiFile(ticks_per_beat=480)
    track = mido.MidiTrack([mido.MetaMessage("set_tempo", tempo=mido.bpm2tempo(rng.randint(80, 150)))])
    track += [mido.Message("program_change", channel=c, program=rng.choice(PROGRAMS)) for c in (0, 1)]
    track.append(mido.Message("program_change", channel=2, program=33))
    for bar in range(bars):
        root, quality = chords[bar % len(chords)]
        third = 4 if quality == "major" else 3
        chord = [48 + tonic + root % 12 + step for step in (0, third, 7)]
        scale = [72 + tonic + step for step in SCALES[mode]]
        held = [(0, note) for note in chord] + [(2, chord[0] - 12)]
        track += [mido.Message("note_on", channel=c, note=note, velocity=80) for c, note in held]
        for _ in range(4):
            # Every second note of a tune belongs to its chord.
            note = rng.choice(scale) if rng.random() < 0.5 else rng.choice(chord) + 24
            track.append(mido.Message("note_on", channel=1, note=note, velocity=90))
            track.append(mido.Message("note_off", channel=1, note=note, time=480))
        track += [mido.Message("note_off", channel=c, note=note) for c, note in held]
    midi.tracks.append(track)
    return f"{NOTES[tonic]} {mode}", to_bytes(midi)


def to_bytes(midi) -> bytes:
    buffer = io.BytesIO()
    midi.save(file=buffer)
    return buffer.getvalue()


def render(midi: bytes, soundfont: Path, folder: Path) -> np.ndarray:
    """The sound `[2, samples]` at 48 kHz."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        source, sound = Path(name, "in.mid"), Path(name, "out.wav")
        source.write_bytes(midi)
        command = ["fluidsynth", "-ni", "-q", "-r", "48000", "-g", "0.5", "-T", "wav", "-O", "s16", "-F", sound]
        try:
            subprocess.run([*command, soundfont, source], check=True, capture_output=True, timeout=300)
        except (OSError, subprocess.SubprocessError) as error:
            raise RunError(f"FluidSynth did not render a file: {error}") from error
        return read_audio(sound)


def judge(name: str, waveform: np.ndarray, wanted: dict, *, label: str = "") -> list[Result]:
    start = time.perf_counter()
    section = MiddleSection(duration_s=waveform.shape[1] / 48_000, sample_rate=48_000)
    section.add(waveform)
    tags = estimate_tags(section.mono())
    seconds = time.perf_counter() - start
    results = []
    for field, truth in wanted.items():
        if truth is None and not label:
            continue
        estimate = tags.bpm if field == "bpm" else tags.keyscale
        right = (
            (abs(estimate.value / truth - 1) <= 0.04 if field == "bpm" else same_key(estimate.value, truth))
            if (truth is not None and estimate.value is not None)
            else False
        )
        results.append(
            Result(name, f"{label} {field}".strip(), truth, estimate.value, estimate.confidence, right, seconds)
        )
    return results


def same_key(a: str, b: str) -> bool:
    flats = {"Db": "C#", "Eb": "D#", "Gb": "F#", "Ab": "G#", "Bb": "A#", "Cb": "B"}
    (note_a, mode_a), (note_b, mode_b) = a.split(), b.split()
    return flats.get(note_a, note_a) == flats.get(note_b, note_b) and mode_a == mode_b


def not_music(seconds: int = 60) -> dict[str, np.ndarray]:
    """Stereo sounds that have neither tempo nor key (a tone has a pitch, which is not a key)."""
    rng, count = np.random.default_rng(0), seconds * 48_000
    white = rng.standard_normal(count)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    pink = np.fft.irfft(spectrum / np.sqrt(np.maximum(1, np.arange(len(spectrum)))), count)
    clicks = np.zeros(count)
    clicks[rng.integers(0, count, 3 * seconds)] = 1
    clicks = np.convolve(clicks, np.exp(-np.arange(2000) / 300) * rng.standard_normal(2000))[:count]
    sounds = {
        "silence": np.zeros(count),
        "white noise": white,
        "pink noise": pink,
        "tone": np.sin(2 * np.pi * 440 * np.arange(count) / 48_000),
        "random clicks": clicks,
        "babble": pink * syllables(rng, count),
    }
    return {
        name: np.repeat(np.float32(0.2 * sound / max(1e-9, np.abs(sound).max()))[None], 2, axis=0)
        for name, sound in sounds.items()
    }


def syllables(rng: np.random.Generator, count: int) -> np.ndarray:
    """An envelope of three to ten bumps a second with pauses, as speech has."""
    envelope, position = np.zeros(count), 0
    while position < count:
        length = int(48_000 * rng.uniform(0.1, 0.35))
        envelope[position : position + length] = np.hanning(length)[: count - position] * rng.uniform(0.4, 1)
        position += length + int(48_000 * (rng.uniform(0, 0.06) if rng.random() < 0.8 else rng.uniform(0.2, 0.7)))
    return envelope


def summarise(results: list[Result]) -> dict:
    """Per field: how many there are, are right, are accepted, and are accepted and right."""
    table = {}
    for field in dict.fromkeys(result.field for result in results):
        of_field = [result for result in results if result.field == field]
        accepted = [r for r in of_field if r.confidence >= (BPM_THRESHOLD if "bpm" in field else KEY_THRESHOLD)]
        table[field] = {
            "total": len(of_field),
            "right": sum(result.right for result in of_field),
            "accepted": len(accepted),
            "accepted and right": sum(result.right for result in accepted),
            "median seconds": round(float(np.median([result.seconds for result in of_field])), 2),
        }
    return table


def recordings(folder: Path) -> dict:
    """What share of real recordings gets a tempo and a key; nobody wrote down which are right."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)
    accepted, seconds = collections.Counter(), []
    for file in files:
        section = MiddleSection(duration_s=probe_audio(file).duration_s, sample_rate=48_000)
        for block in stream_audio(file):
            section.add(block)
        start = time.perf_counter()
        tags = estimate_tags(section.mono())
        seconds.append(time.perf_counter() - start)
        accepted["bpm"] += tags.bpm.confidence >= BPM_THRESHOLD
        accepted["key"] += tags.keyscale.confidence >= KEY_THRESHOLD
    return {"total": len(files), **accepted, "median seconds": round(float(np.median(seconds)), 2) if files else None}


if __name__ == "__main__":
    with one_sentence_errors():
        main(sys.argv[1:])
