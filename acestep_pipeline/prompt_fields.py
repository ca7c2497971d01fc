"""What the model is told about a clip, in words. No tensors, so that reading text does not wait for torch."""

from dataclasses import dataclass

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
