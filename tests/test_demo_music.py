"""The rendered demo dataset, and the script that fetches real music (offline here, but for one slow test)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from acestep_pipeline.data.demo_music import PEAK, PITCH_CLASSES, render_demo_dataset
from acestep_pipeline.errors import UsageError

EXAMPLES = Path(__file__).parents[1] / "examples"
FETCH = EXAMPLES / "fetch_free_music.sh"
needs_debian = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs a Debian-like system")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    return render_demo_dataset(tmp_path_factory.mktemp("demo") / "clips")


def test_clips_have_the_asked_length_level_and_formats(clips):
    assert len(clips) == 6
    assert {clip.suffix for clip in clips} == {".wav", ".flac", ".ogg"}
    rates = []
    for clip in clips:
        waveform, rate = sf.read(clip)
        rates.append(rate)
        assert waveform.shape == (12 * rate, 2)
        assert np.abs(waveform).max() == pytest.approx(PEAK, rel=0.05)
        assert 0.1 < waveform.std() < 0.3, "neither near silence nor a square wave"
        assert np.abs(waveform[:, 0] - waveform[:, 1]).max() > 0.01, "stereo"
        assert np.abs(waveform[[0, -1]]).max() < 1e-3, "faded at both ends"
        assert np.abs(waveform.mean()) < 1e-3
    assert sorted(rates) == [44_100] + [48_000] * 5


def test_sidecars_describe_every_clip(clips):
    folder = clips[0].parent
    genres, keys, tempos = set(), set(), set()
    for clip in clips:
        tags = (folder / f"{clip.stem}.tags.txt").read_text().strip()
        assert "\n" not in tags and 5 <= len(tags.split(", ")) <= 10
        metadata = json.loads((folder / f"{clip.stem}.json").read_text())
        assert list(metadata) == ["genre", "bpm", "keyscale", "timesignature", "language"]
        tonic, mode = metadata["keyscale"].split()
        assert tonic in PITCH_CLASSES and mode in ("major", "minor")
        assert isinstance(metadata["bpm"], int)
        assert metadata["timesignature"] == ("3" if metadata["genre"] == "waltz" else "4")
        assert metadata["language"] == "unknown"
        genres.add(metadata["genre"])
        keys.add(metadata["keyscale"])
        tempos.add(metadata["bpm"])
    assert len(genres) == len(keys) == len(tempos) == 6
    assert [path.read_text() for path in folder.glob("*.lyrics.txt")] == ["[Instrumental]\n"]
    assert "CC0" in (folder / "LICENSE.txt").read_text()


def onset_autocorrelation(clip: Path) -> tuple[np.ndarray, float]:
    """Autocorrelation of the onset envelope (the rise of log energy in each 10 ms), and its frames a second."""
    waveform, rate = sf.read(clip)
    hop = rate // 100
    frames = waveform.mean(axis=1)[: len(waveform) // hop * hop].reshape(-1, hop)
    spectrum = np.log1p(100 * np.abs(np.fft.rfft(frames * np.hanning(hop))))
    onsets = np.maximum(np.diff(spectrum, axis=0), 0).sum(axis=1)
    onsets = onsets - onsets.mean()
    power = np.abs(np.fft.rfft(onsets, 2 * onsets.size)) ** 2
    return np.fft.irfft(power)[: onsets.size] / np.arange(onsets.size, 0, -1), rate / hop


@pytest.mark.parametrize("genre", ["techno", "synthwave", "funk rock"])
def test_the_tempo_is_the_declared_one(clips, genre):
    (clip,) = (clip for clip in clips if json.loads(clip.with_suffix(".json").read_text())["genre"] == genre)
    bpm = json.loads(clip.with_suffix(".json").read_text())["bpm"]
    correlation, frames_per_s = onset_autocorrelation(clip)
    lags = np.arange(int(0.25 * frames_per_s), int(2.0 * frames_per_s))  # 240 to 30 bpm
    measured = 60 * frames_per_s / lags[correlation[lags].argmax()]
    octaves = np.log2(measured / bpm)
    assert abs(octaves - round(octaves)) < np.log2(1.03), f"{measured:.1f} bpm measured, {bpm} declared"


def test_the_key_is_the_declared_one(clips):
    """The seven notes of the declared key hold nearly all of the energy between 200 and 1000 Hz."""
    for clip in clips:
        tonic, mode = json.loads(clip.with_suffix(".json").read_text())["keyscale"].split()
        waveform, rate = sf.read(clip)
        power = np.abs(np.fft.rfft(waveform.mean(axis=1))) ** 2
        hertz = np.fft.rfftfreq(len(waveform), 1 / rate)
        band = (hertz > 200) & (hertz < 1000)
        pitch_classes = np.round(12 * np.log2(hertz[band] / 440)).astype(int) + 9
        steps = (pitch_classes - PITCH_CLASSES.index(tonic)) % 12
        share = power[band][np.isin(steps, {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}[mode])]
        assert share.sum() / power[band].sum() > 0.85, clip.name


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(tmp_path):
    def rendered(name: str, **kwargs) -> list[np.ndarray]:
        clips = render_demo_dataset(tmp_path / name, num_clips=3, duration_s=2.0, **kwargs)
        return [sf.read(clip, dtype="int16")[0] for clip in clips]

    first, again, other = rendered("first"), rendered("again", seed=0), rendered("other", seed=1)
    for a, b, c in zip(first, again, other, strict=True):
        assert a.tobytes() == b.tobytes()
        assert np.mean(a != c) > 0.9


def test_styles_return_in_other_keys_beyond_the_sixth_clip(tmp_path):
    clips = render_demo_dataset(tmp_path / "demo", num_clips=7, duration_s=1.0)
    first, seventh = (json.loads(clips[index].with_suffix(".json").read_text()) for index in (0, 6))
    assert first["genre"] == seventh["genre"]
    assert (first["bpm"], first["keyscale"]) != (seventh["bpm"], seventh["keyscale"])


def test_a_complete_set_is_not_rendered_again(tmp_path):
    folder = tmp_path / "demo"
    clips = render_demo_dataset(folder, num_clips=1, duration_s=1.0)
    (folder / "01_lofi_hip_hop.tags.txt").write_text("edited by the user\n")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert render_demo_dataset(folder, num_clips=1, duration_s=1.0) == clips
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    with pytest.raises(UsageError, match="isn't a complete demo dataset with these settings"):
        render_demo_dataset(folder, num_clips=1, duration_s=1.0, seed=3)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_somebody_elses_folder_is_refused_untouched(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "song.wav").write_bytes(b"precious")
    with pytest.raises(UsageError, match=str(folder)):
        render_demo_dataset(folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "song.wav"]
    assert (folder / "song.wav").read_bytes() == b"precious"
    with pytest.raises(UsageError):
        render_demo_dataset(folder / "song.wav" / "demo")


def test_a_failed_rendering_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sf, "SoundFile", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        render_demo_dataset(tmp_path / "demo", num_clips=1, duration_s=1.0)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_says_what_comes_next(tmp_path):
    command = [sys.executable, EXAMPLES / "make_demo_dataset.py", tmp_path / "demo", "--num_clips=1", "--duration_s=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"--train_data_dir {tmp_path / 'demo'}" in done.stdout
    refused = subprocess.run([*command, "--seed=2"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1


# --- fetch_free_music.sh -----------------------------------------------------------------------------------------


def fetch(*arguments, **environment) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable} | {name: str(value) for name, value in environment.items()}
    return subprocess.run(["bash", FETCH, *arguments], capture_output=True, text=True, env=env)


def test_the_fetch_script_is_shellcheck_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, FETCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_fetch_script_explains_itself():
    done = fetch("--help")
    assert done.returncode == 0
    for word in ("DIR", "--styles", "--max-tracks", "--keep-debs"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["a", "b"],
        ["a", "--nonsense"],
        ["a", "--styles", "polka"],
        ["a", "--styles", ""],
        ["a", "--styles"],
        ["a", "--max-tracks", "0"],
        ["a", "--max-tracks", "some"],
    ],
)
def test_bad_usage_exits_with_2_and_one_sentence(arguments):
    done = fetch(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_missing_prerequisites_are_named(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    done = subprocess.run(["bash", FETCH, tmp_path], capture_output=True, text=True, env={"PATH": str(tools)})
    assert done.returncode == 1 and "Debian-like" in done.stderr


@needs_debian
def test_missing_python_unwritable_folder_unknown_package_and_no_network(tmp_path):
    done = fetch(tmp_path, PYTHON=tmp_path / "no-python")
    assert done.returncode == 1 and "make setup" in done.stderr
    (tmp_path / "file").touch()
    done = fetch(tmp_path / "file" / "music")
    assert done.returncode == 2 and "can't write to" in done.stderr

    config = tmp_path / "apt.conf"
    config.write_text(f'Dir::State::lists "{tmp_path / "lists"}"; Dir::Cache "{tmp_path / "cache"}";')
    (tmp_path / "lists").mkdir()
    done = fetch(tmp_path / "music", "--styles", "metal", APT_CONFIG=config)
    assert done.returncode == 1 and "apt-get update" in done.stderr

    if subprocess.run(["apt-cache", "show", "marsshooter-data"], capture_output=True).returncode == 0:
        config.write_text('Acquire::http::Proxy "http://127.0.0.1:9"; Acquire::Retries "0";')  # nobody listens there
        done = fetch(tmp_path / "music", "--styles", "metal", APT_CONFIG=config)
        assert done.returncode == 1 and "check the network" in done.stderr
    assert not (tmp_path / "music" / "metal").exists()


@pytest.fixture
def music_with_deb(tmp_path) -> Path:
    """A target folder that holds a "downloaded" package with two long tracks and one short one."""
    package = tmp_path / "package"
    for folder in ("DEBIAN", "usr/share/games/music", "usr/share/games/more", "usr/share/doc/marsshooter-data"):
        (package / folder).mkdir(parents=True)
    control = "Package: marsshooter-data\nVersion: 1.2-3\nArchitecture: all\nMaintainer: T <t@t.invalid>\n"
    (package / "DEBIAN/control").write_text(control + "Description: test\n")
    (package / "usr/share/doc/marsshooter-data/copyright").write_text("Files: *\nLicense: CC-BY-SA-3.0\n")
    for name, duration_s in (("music/Sad Song.ogg", 21), ("more/Sad Song.ogg", 22), ("music/jingle.ogg", 2)):
        with sf.SoundFile(package / "usr/share/games" / name, "w", 8000, 1) as file:
            file.title, file.artist, file.genre = "Sad Song", "Somebody", "Doom"
            for _ in range(duration_s):
                file.write(np.zeros(8000))
    debs = tmp_path / "music" / ".debs"
    debs.mkdir(parents=True)
    deb = debs / "marsshooter-data_1.2-3_all.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", package, deb], check=True, capture_output=True)
    return tmp_path / "music"


@needs_debian
def test_tracks_are_unpacked_described_and_resumed(music_with_deb):
    style = music_with_deb / "metal"
    command = (music_with_deb, "--styles", "metal", "--keep-debs")
    done = fetch(*command, "--max-tracks", "1")
    assert done.returncode == 0, done.stderr
    assert len(list(style.glob("*.ogg"))) == 1
    (first,) = style.glob("*.tags.txt")
    first.write_text("edited by the user\n")

    done = fetch(*command)
    assert done.returncode == 0, done.stderr
    assert sorted(path.stem for path in style.glob("*.ogg")) == ["Sad Song", "music_Sad Song"]
    assert first.read_text() == "edited by the user\n"
    tags = (style / "music_Sad Song.tags.txt").read_text().strip().split(", ")
    assert tags[:2] == ["metal", "doom"] and "sad" in tags and 5 <= len(tags) <= 10
    licence = (style / "music_Sad Song.license.txt").read_text()
    for fact in ("Somebody", "CC-BY-SA-3.0", "marsshooter-data 1.2-3", "usr/share/games/music/Sad Song.ogg"):
        assert fact in licence
    assert (style / "copyright").is_file()
    assert "make train DATA=" in done.stdout

    (style / "Sad Song.ogg").unlink()  # a lost track is brought back; a complete folder needs no package
    done = fetch(*command[:-1])
    assert done.returncode == 0 and (style / "Sad Song.ogg").is_file()
    assert not (music_with_deb / ".debs").exists()
    done = fetch(*command[:-1])
    assert done.returncode == 0 and "already complete" in done.stdout
    assert not list(music_with_deb.rglob("*.part"))


@pytest.mark.slow
@needs_debian
def test_real_music_is_fetched(tmp_path):
    done = fetch(tmp_path / "free music", "--styles", "electronic", "--max-tracks", "2")
    assert done.returncode == 0, done.stderr
    tracks = sorted((tmp_path / "free music/electronic").glob("*.ogg"))
    assert len(tracks) == 2
    for track in tracks:
        assert sf.info(track).duration >= 20
        assert len(track.with_suffix(".tags.txt").read_text().split(", ")) >= 5
        assert "Maxstack" in track.with_suffix(".license.txt").read_text()
