"""How fast a validated dataset build is beside a plain loop over `librosa.load`, on the same music in the same run.

    python benchmarks/dataset_build.py --data-dir MUSIC --output dataset_build.json

Every measurement runs in a process of its own with one thread for each numerical library, all of them alternate
`--repeats` times, and medians are compared. librosa must be installed; it is no part of the package.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
# Ratio, the least it should be, and what it says.
TARGETS = {
    "read_1_vs_librosa": (1.0, "decode + resample against librosa.load, one core"),
    "read_2_vs_librosa": (1.7, "decode + resample on two workers against librosa.load"),
    "build_1_vs_librosa": (1.0, "whole validated build against librosa.load, one core"),
    "build_2_vs_build_1": (1.7, "validated build on two workers against one"),
}
HOUR_LIMIT_MIB = 1024
ALIASING_LIMIT_DB = -100.0


def find_music(data_dir: Path) -> list[Path]:
    """Every audio file below a folder, in order."""
    from acestep_pipeline.data.audio import AUDIO_SUFFIXES

    return sorted(path for path in data_dir.rglob("*") if path.suffix.lower() in AUDIO_SUFFIXES)


# --- what a measuring process does; each returns a number -----------------------------------------------------------


def time_librosa(data_dir: Path) -> float:
    import librosa

    files = find_music(data_dir)
    librosa.load(files[0], sr=48_000, mono=False, duration=1.0)  # imports and look-ups are not what is compared
    start = time.perf_counter()
    for path in files:
        librosa.load(path, sr=48_000, mono=False)
    return time.perf_counter() - start


def time_read(data_dir: Path, *, num_workers: int) -> float:
    from acestep_pipeline.data.audio import read_audio
    from acestep_pipeline.engines import map_in_order

    files = find_music(data_dir)
    start = time.perf_counter()
    for _ in map_in_order(lambda path: read_audio(path).shape, files, num_workers=num_workers):
        pass
    return time.perf_counter() - start


def time_build(data_dir: Path, *, num_workers: int) -> float:
    """Into a new directory, with an empty cache; imports are not counted, as they are not for librosa."""
    import datasets  # noqa: F401
    import scipy.fft
    import scipy.signal  # noqa: F401
    from matplotlib.figure import Figure  # noqa: F401

    from acestep_pipeline.data.building.build_report import BuildOptions
    from acestep_pipeline.data.building.ingest import build_dataset

    options = BuildOptions(validate_audio=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACESTEP_CACHE_DIR"] = os.path.join(folder, "cache")
        start = time.perf_counter()
        build_dataset([data_dir], Path(folder) / "out", options, num_workers=num_workers, show_progress=False)
        return time.perf_counter() - start


def measure_aliasing(_: Path) -> float:
    """The strongest image, in dB of the tone, of an 18 kHz tone at 44.1 kHz that is read at 48 kHz."""
    import io

    import numpy as np
    import soundfile

    from acestep_pipeline.data.audio import read_audio

    buffer = io.BytesIO()
    tone = 0.5 * np.sin(2 * np.pi * 18_000 * np.arange(4 * 44_100) / 44_100)
    soundfile.write(buffer, np.stack([tone, tone], axis=1), 44_100, format="WAV", subtype="DOUBLE")
    middle = read_audio(buffer.getvalue())[0, 48_000 : 3 * 48_000].astype(np.float64)
    spectrum = np.abs(np.fft.rfft(middle * np.kaiser(len(middle), 20)))
    peak = int(spectrum.argmax())
    spectrum[peak - 100 : peak + 101], crest = 0, spectrum[peak]
    return float(20 * np.log10(spectrum.max() / crest))


def measure_hour(_: Path) -> float:
    """Peak resident memory, MiB, of a process that builds a dataset of one track of an hour."""
    import numpy as np
    import soundfile

    with tempfile.TemporaryDirectory() as folder:
        os.environ["ACESTEP_CACHE_DIR"] = os.path.join(folder, "cache")
        music = Path(folder) / "music"
        music.mkdir()
        minute = 0.1 * np.random.default_rng(0).standard_normal((60 * 44_100, 2), np.float32)
        with soundfile.SoundFile(music / "hour.wav", "w", 44_100, 2, "PCM_16") as sound:
            for _ in range(60):
                sound.write(minute)
        (music / "hour.tags.txt").write_text("noise, white, long, loud, steady")
        from acestep_pipeline.data.building.build_report import BuildOptions
        from acestep_pipeline.data.building.ingest import build_dataset

        options = BuildOptions(validate_audio=True)
        build_dataset([music], Path(folder) / "out", options, num_workers=1, show_progress=False)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


MEASUREMENTS = {
    "librosa_s": time_librosa,
    "read_1_s": lambda folder: time_read(folder, num_workers=1),
    "read_2_s": lambda folder: time_read(folder, num_workers=2),
    "build_1_s": lambda folder: time_build(folder, num_workers=1),
    "build_2_s": lambda folder: time_build(folder, num_workers=2),
    "aliasing_db": measure_aliasing,
    "hour_peak_mib": measure_hour,
}

# --- the run --------------------------------------------------------------------------------------------------------


def run_apart(name: str, data_dir: Path) -> float:
    """One measurement in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--data-dir", str(data_dir), "--measure", name]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        command, env=os.environ | ONE_THREAD | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return float(result.stdout.splitlines()[-1])


def run_all(data_dir: Path, repeats: int) -> dict:
    """Every figure, the ratios they give, and what they were measured on."""
    from acestep_pipeline.data.audio import probe_audio

    infos = [probe_audio(path) for path in find_music(data_dir)]
    rates = Counter(info.sample_rate for info in infos)
    timed = [name for name in MEASUREMENTS if name.endswith("_s")]
    runs: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(repeats):
        for name in timed:
            runs[name].append(run_apart(name, data_dir))
            print(f"{name:<16}{runs[name][-1]:8.1f}", file=sys.stderr, flush=True)
    median = {name: statistics.median(values) for name, values in runs.items()}
    return {
        "machine": {"cores": os.cpu_count(), "processor": platform.processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("librosa", "numpy", "scipy", "soundfile", "soxr", "datasets")},
        "tracks": len(infos),
        "minutes": round(sum(info.duration_s for info in infos) / 60, 1),
        "sample_rates": {str(rate): count for rate, count in sorted(rates.items())},
        "runs": runs,
        "median": median,
        "read_1_vs_librosa": median["librosa_s"] / median["read_1_s"],
        "read_2_vs_librosa": median["librosa_s"] / median["read_2_s"],
        "build_1_vs_librosa": median["librosa_s"] / median["build_1_s"],
        "build_2_vs_build_1": median["build_1_s"] / median["build_2_s"],
        "aliasing_db": run_apart("aliasing_db", data_dir),
        "hour_peak_mib": run_apart("hour_peak_mib", data_dir),
    }


def describe(result: dict) -> str:
    """The table for a person."""
    lines = [f"{result['tracks']} tracks, {result['minutes']} min, {result['machine']['cores']} cores"]
    rows = [
        (name, result[name], result[name] >= least, f">= {least}", text) for name, (least, text) in TARGETS.items()
    ]
    aliasing, hour = result["aliasing_db"], result["hour_peak_mib"]
    limit = f"<= {ALIASING_LIMIT_DB:.0f}"
    rows.append(("aliasing_db", aliasing, aliasing <= ALIASING_LIMIT_DB, limit, "18 kHz tone, 44.1 to 48 kHz"))
    rows.append(("hour_peak_mib", hour, hour < HOUR_LIMIT_MIB, f"< {HOUR_LIMIT_MIB}", "building a 1-hour track"))
    for name, value, met, target, text in rows:
        lines.append(f"{name:<20}{value:>9.2f}  {target:<8}{'met' if met else 'MISSED':<8}{text}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="a folder of music, of 2 hours or more")
    parser.add_argument("--output", type=Path, help="write every figure to this JSON file")
    parser.add_argument("--repeats", type=int, default=3, help="how often each is timed; medians are compared")
    parser.add_argument("--measure", choices=MEASUREMENTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.data_dir.is_dir():
        parser.error(f"--data-dir {args.data_dir} is not a folder")
    if args.measure:
        print(MEASUREMENTS[args.measure](args.data_dir))
        return
    result = run_all(args.data_dir, args.repeats)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(describe(result))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
