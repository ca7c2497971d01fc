"""What a collection of tracks is, in a few numbers: for the model card and `training_args.json`."""

from collections import Counter
from collections.abc import Iterable, Sequence

from ..prompt_fields import INSTRUMENTAL
from .tracks import Track

NOT_STATED = "not stated"
# Of each kind the most frequent ones are told.
_MOST = 20


def summarise_tracks(tracks: Sequence[Track]) -> dict:
    """The number of `tracks`, their `minutes`, how many have lyrics (`with_lyrics`), and counts of tracks by `genres`,
    `languages` (of those with lyrics), `licenses` (as stated) and `machine_made` fields, the most frequent first."""
    sung = [track for track in tracks if track.lyrics != INSTRUMENTAL]
    return {
        "tracks": len(tracks),
        "minutes": round(sum(track.duration_s for track in tracks) / 60, 2),
        "with_lyrics": len(sung),
        "genres": _count(track.genre for track in tracks if track.genre),
        "languages": _count(track.language for track in sung if track.language),
        "licenses": _count(track.rights.license.strip() or NOT_STATED for track in tracks),
        "machine_made": _count(field for track in tracks for field in track.machine_made),
    }


def _count(values: Iterable[str]) -> dict[str, int]:
    counts = Counter(values)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:_MOST])
