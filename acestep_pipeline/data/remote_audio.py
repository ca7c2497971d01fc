"""Audio files that lie on S3 or the Hub and are fetched each time they are read; and what they are, remembered.

What reading a file once has told (`AudioFacts`) is kept in the cache folder, by the file's address, size and tag. So a
later run over the same files, whose latents are cached, fetches none of them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import sha256, write_text
from ..paths import cache_dir
from ..storage.copies import file_errors
from ..storage.remote_folder import RemoteFolder
from .audio import AudioInfo, probe_audio
from .text.file_tags import read_file_tags

# Raise when what a file is read for changes.
FACTS_VERSION = 1


@dataclass(frozen=True, eq=False)
class RemoteAudio:
    """The encoded file `name` of a folder on S3 or the Hub."""

    folder: RemoteFolder
    name: str

    def read(self) -> bytes:
        """The bytes of the file, fetched anew. Raises as `RemoteFolder.fetched`."""
        with self.folder.fetched(self.name) as path:
            return path.read_bytes()


@dataclass(frozen=True)
class AudioFacts:
    """What an audio file is: its headers, the SHA-256 of its bytes, and the raw fields that the tags inside it give,
    with warnings about them."""

    info: AudioInfo
    sha256: str
    tags: dict
    warnings: list[str]


def read_facts(source: Path | bytes, *, with_tags: bool) -> AudioFacts:
    """Probe and hash a file, or a file's bytes, and read the tags inside it if they are asked for.

    Raises:
        AudioError, OSError: it can't be used, or not be read.
    """
    info = probe_audio(source)
    digest = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else sha256(source)
    return AudioFacts(info, digest, *(read_file_tags(source) if with_tags else ({}, [])))


def remote_facts(audio: RemoteAudio) -> AudioFacts:
    """The facts of a file that lies elsewhere: remembered, or else read from the file, once for all processes here.

    Raises as `read_facts` and `RemoteFolder.fetched`.
    """
    from filelock import FileLock

    identity = audio.folder.files[audio.name]
    key = json.dumps([audio.folder.place, audio.name, identity.size, identity.tag])
    name = hashlib.sha256(key.encode()).hexdigest()
    folder = cache_dir() / f"remote-audio-v{FACTS_VERSION}" / name[:2]
    path = folder / f"{name}.json"
    facts = _remembered(path)
    if facts is None:
        with file_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock")
        with lock:
            facts = _remembered(path)
            if facts is None:
                with audio.folder.fetched(audio.name) as fetched:
                    facts = read_facts(fetched, with_tags=True)
                with file_errors(folder):
                    write_text(path, json.dumps(asdict(facts), ensure_ascii=False))
    return facts


def _remembered(path: Path) -> AudioFacts | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return AudioFacts(**content | {"info": AudioInfo(**content["info"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or damaged: it is read again
