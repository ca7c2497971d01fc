"""What the model is told about a clip, in words. No tensors, so that reading text does not wait for torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from .data.text.languages import LANGUAGES, normalise_language
from .data.text.musical_terms import BPM_RANGE, TIME_SIGNATURES, parse_bpm, parse_keyscale, parse_timesignature
from .errors import UsageError

# What the model is trained for is 10 to 600 s; its silence buffer ends at 600 s.
MAX_DURATION_S = 600.0

# Tasks of the model that start from audio (`diffusers.pipelines.ace_step`).
SOURCE_TASKS = ("cover", "repaint", "extract", "lego", "complete")

INSTRUMENTAL = "[Instrumental]"


@dataclass(frozen=True)
class PromptFields:
    """What the model is told about a clip: arguments, by name, of `AceStepPipeline.__call__` and `encode_prompt`."""

    prompt: str
    lyrics: str = INSTRUMENTAL
    vocal_language: str = "unknown"
    bpm: int | None = None
    keyscale: str | None = None
    timesignature: str | None = None
    audio_duration: float = 60.0


def known_language(text: str, *, name: str = "vocal_language") -> str:
    """`de` for `German`; raises `UsageError`, which calls the value `name`, for a language the model doesn't know."""
    language = normalise_language(text)
    if language not in LANGUAGES:
        raise UsageError(f"{name} {text!r} is none that the model knows: {', '.join(sorted(LANGUAGES))}.")
    return language


def known_keyscale(text: str, *, name: str = "keyscale") -> str:
    """`A minor` for `Am`; raises `UsageError` for what is no key."""
    keyscale = parse_keyscale(text)
    if keyscale is None:
        raise UsageError(f"{name} {text!r} is no key; write it like 'C minor' or 'F# major'.")
    return keyscale


def known_bpm(value: object, *, name: str = "bpm") -> int:
    """A whole number; raises `UsageError` for one that the model doesn't know."""
    bpm = parse_bpm(value)
    if bpm is None:
        raise UsageError(f"{name} must be {BPM_RANGE[0]} to {BPM_RANGE[1]}, not {value!r}.")
    return bpm


def checked_request(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments, by name, of `AceStepPipeline.__call__`, spelt as the model was trained with them.

    diffusers would take any text for a key or a language, and a duration of 0 for a minute.

    Raises:
        UsageError: a duration, language, key, tempo or time signature that the model doesn't know; a path where audio
            is meant, or a task without the audio that it starts from.
    """
    request = dict(given)
    duration_s = given.get("audio_duration")
    # Source audio has a length of its own.
    unset = duration_s is None or any(given.get(name) is not None for name in ("src_audio", "audio_codes"))
    lowest = float("-inf") if unset else 0.0
    if duration_s is not None and not (isinstance(duration_s, Real) and lowest < duration_s <= MAX_DURATION_S):
        raise UsageError(f"audio_duration must be above 0 and at most {MAX_DURATION_S:g} seconds, not {duration_s!r}.")
    for name in ("src_audio", "reference_audio"):
        if isinstance(given.get(name), str | os.PathLike):
            raise UsageError(
                f"{name} must be a waveform, a tensor [channels, samples] at 48 kHz, not the path "
                f"{str(given[name])!r}; read the file first, or use `acestep-lora generate`."
            )
    task = given.get("task_type", "text2music")
    if task in SOURCE_TASKS and given.get("src_audio") is None and given.get("audio_codes") is None:
        raise UsageError(f"task_type={task!r} needs src_audio, a waveform at 48 kHz.")
    language = given.get("vocal_language")
    if isinstance(language, str):
        request["vocal_language"] = known_language(language)
    elif isinstance(language, list | tuple):
        request["vocal_language"] = [known_language(one) for one in language]
    if given.get("keyscale"):
        request["keyscale"] = known_keyscale(given["keyscale"])
    if given.get("bpm") is not None:
        request["bpm"] = known_bpm(given["bpm"])
    if given.get("timesignature"):
        request["timesignature"] = parse_timesignature(str(given["timesignature"]))
        if request["timesignature"] is None:
            beats = ", ".join(TIME_SIGNATURES)
            raise UsageError(f"timesignature must be one of {beats} (beats in a bar), not {given['timesignature']!r}.")
    return request
