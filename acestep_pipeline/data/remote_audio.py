"""Audio files that lie on S3 or the Hub and are fetched each time they are read; and what they are, remembered.

What reading a file once has told (`AudioFacts`) is kept in the cache folder, by the file's address, size and tag. So a
later run over the same files, whose latents are cached, fetches none of them.
"""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from ..files import sha256
from ..storage.remote_folder import RemoteFolder
from .audio import AudioInfo, probe_audio
from .remembered import remembered
from .text.file_tags import read_file_tags


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

    @classmethod
    def from_json(cls, content: dict) -> "AudioFacts":
        """Of what `dataclasses.asdict` made; raises `KeyError` or `TypeError` for anything else."""
        return cls(**content | {"info": AudioInfo(**content["info"])})


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

    def read() -> dict:
        with audio.folder.fetched(audio.name) as fetched:
            return asdict(read_facts(fetched, with_tags=True))

    return remembered("remote-audio", audio.folder.key(audio.name), read, AudioFacts.from_json)
