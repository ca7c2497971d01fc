"""A captioner that needs no model: four rules of thumb about loudness, brightness, density and stereo width.

    acestep-lora dataset build --data-dir music --output-dir dataset --captioner examples.caption_by_rules:caption

Rules hear neither instruments nor mood; use them to try the hook out. A model is plugged in the same way. In a file
`my_captioner.py` of the current directory, with any audio classifier of the Hub (`--captioner my_captioner:caption`):

    import functools, soxr

    @functools.cache  # loaded once, at the first track
    def model():
        from transformers import pipeline
        return pipeline("audio-classification", model="OWNER/MODEL")

    def caption(waveform, sample_rate, fields):
        mono = soxr.resample(waveform.mean(axis=0), sample_rate, 16_000)  # the rate that the model was trained with
        labels = model()({"raw": mono, "sampling_rate": 16_000}, top_k=8)
        return ", ".join(entry["label"] for entry in labels if entry["score"] > 0.1)
"""

import numpy as np

_BLOCK = 4096


def caption(waveform: np.ndarray, sample_rate: int, fields: dict) -> dict:
    """Tags for float32 `[2, samples]`; `fields` holds what is known already, such as `bpm`."""
    mono = waveform.mean(axis=0)
    blocks = mono[: len(mono) // _BLOCK * _BLOCK].reshape(-1, _BLOCK)[:: max(1, len(mono) // _BLOCK // 500)]
    rms = float(np.sqrt(np.mean(np.square(mono)))) if len(mono) else 0.0
    if not len(blocks) or rms < 1e-4:
        return {}
    power = np.square(np.abs(np.fft.rfft(blocks * np.hanning(_BLOCK)))).sum(axis=0)
    centroid_hz = float((power * np.fft.rfftfreq(_BLOCK, 1 / sample_rate)).sum() / power.sum())
    crest = float(np.abs(mono).max()) / rms
    side = float(np.sqrt(np.mean(np.square(waveform[0] - waveform[1])))) / 2
    tags = [
        "loud" if rms > 0.15 else "quiet" if rms < 0.03 else "",
        "bright" if centroid_hz > 2000 else "dark" if centroid_hz < 500 else "",
        "punchy" if crest > 8 else "dense" if crest < 4 else "",
        "wide stereo" if side > 0.5 * rms else "mono" if side < 0.01 * rms else "",
        _tempo_word(fields.get("bpm")),
    ]
    return {"tags": ", ".join(tag for tag in tags if tag)}


def _tempo_word(bpm: int | None) -> str:
    return "" if bpm is None else "slow" if bpm < 85 else "fast" if bpm > 135 else "mid-tempo"
