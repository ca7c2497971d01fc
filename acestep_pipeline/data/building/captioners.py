"""The hook for a captioning model: a function of the user's that describes a track (`--captioner MODULE:FUNCTION`).

It is called as `function(waveform, sample_rate, fields)`: float32 `[2, samples]` at 48 kHz, and what is known
about the track. It returns the tags as text, or a dict with any of `CAPTION_FIELDS`.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ...errors import RunError, UsageError
from ..text.musical_terms import parse_bpm, parse_keyscale, parse_timesignature

CAPTION_FIELDS = ("tags", "genre", "language", "lyrics", "bpm", "keyscale", "timesignature")
Captioner = Callable[[np.ndarray, int, dict], str | dict]


def load_captioner(name: str) -> Captioner:
    """The function that `module:function` names, modules in the current directory included.

    Raises:
        UsageError: there is no such module or function, it can't be imported, or it can't be called.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise UsageError(f"--captioner {name}: write MODULE:FUNCTION, such as my_captioner:caption.")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise UsageError(f"--captioner {name}: {module_name} can't be imported ({_cause(error)}).") from error
    finally:
        sys.path.remove(here)
    function = getattr(module, function_name, None)
    if function is None:
        raise UsageError(f"--captioner {name}: {module_name} has no function {function_name}.")
    if not callable(function):
        raise UsageError(f"--captioner {name}: {function_name} is a {type(function).__name__}, not a function.")
    return function


def apply_captioner(
    function: Captioner, waveform: np.ndarray, sample_rate: int, fields: dict
) -> tuple[dict, str | None]:
    """What the captioner says about one track.

    Args:
        function: as `load_captioner` gives it.
        waveform: float32 `[2, samples]`.
        sample_rate: Hz, 48,000 by contract.
        fields: what is known about the track; the function gets a copy.

    Returns:
        The fields it gave, in the spelling of `Track`, empty ones left out; and None, or a sentence about what it
        raised for this track (the fields are then empty: one track's trouble does not stop the run).

    Raises:
        RunError: it returned what the contract does not know; that is a mistake in it, the same for every track.
    """
    try:
        answer = function(waveform, sample_rate, dict(fields))
    except Exception as error:  # a user's function may raise anything, and the other tracks do not suffer for it
        return {}, f"the captioner failed on it ({_cause(error)})"
    if isinstance(answer, str):
        answer = {"tags": answer}
    if not isinstance(answer, dict):
        raise RunError(f"the captioner returned {type(answer).__name__}; it must return text or a dict.")
    unknown = [str(key) for key in answer if key not in CAPTION_FIELDS]
    if unknown:
        known = ", ".join(CAPTION_FIELDS)
        raise RunError(f"the captioner returned unknown fields ({', '.join(unknown)}); known are {known}.")
    return {key: value for key, given in answer.items() if (value := _checked(key, given)) is not None}, None


def _checked(field: str, given: object) -> int | str | None:
    """A field's value in the spelling of `Track`, None for an empty one. Raises `RunError`."""
    if given is None or given == "":
        return None
    if not isinstance(given, str) and not (field in {"bpm", "timesignature"} and type(given) in {int, float}):
        raise RunError(f"the captioner returned {field} as {type(given).__name__}, not text.")
    parse = {"bpm": parse_bpm, "keyscale": parse_keyscale, "timesignature": parse_timesignature}.get(field)
    value = parse(given if field == "bpm" else str(given)) if parse else given.strip() or None
    if parse and value is None:
        raise RunError(f"the captioner returned the {field} {given!r}, which is not one that ACE-Step knows.")
    return value


def _cause(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
