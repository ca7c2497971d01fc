"""What a run's validation curve says in plain words: no measurable effect, learned, or overfitted since update N."""

import numpy as np
from scipy import stats

# Below a thousandth of the base model's loss a change counts as none.
MIN_EFFECT = 1e-3
# Overfitted: so much of what was gained at the best update is lost at the end.
LOST_SHARE = 0.1


def paired_change(before: dict[str, float], after: dict[str, float]) -> tuple[float, float, float]:
    """Mean change of the loss over tracks, with its 95 % t interval (paired; infinitely wide for a single track)."""
    differences = np.array([after[track] - before[track] for track in before])
    mean = float(differences.mean())
    if len(differences) < 2 or np.ptp(differences) == 0:
        return (mean, mean, mean) if len(differences) > 1 else (mean, -np.inf, np.inf)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
    return mean, float(low), float(high)


def describe_effect(validations: list[dict]) -> str:
    """A verdict and its numbers, from the lines of `validation.jsonl`; the first, at update 0, is the base model's.

    Overfitted: the last loss is above the lowest by at least `MIN_EFFECT` of the base's and `LOST_SHARE` of the gain,
    and the interval of that rise excludes 0. Learned: it fell by at least `MIN_EFFECT` and its interval excludes 0.
    """
    if len(validations) < 2:
        return "Whether it learned or overfitted can't be judged without held-out tracks: --validation_fraction 0.1."
    base, last, best = validations[0], validations[-1], min(validations, key=lambda line: line["loss"])
    change, low, high = paired_change(base["tracks"], last["tracks"])
    rise, rise_low, _ = paired_change(best["tracks"], last["tracks"])
    smallest = MIN_EFFECT * base["loss"]
    numbers = (
        f"loss on {len(base['tracks'])} held-out tracks {base['loss']:.4f} without the adapter, {last['loss']:.4f} "
        f"with it (change {change:+.4f}, 95 % interval {low:+.4f} to {high:+.4f})"
    )
    if len(base["tracks"]) < 2:
        return f"One held-out track gives no interval and no verdict, hold out more: {numbers}."
    if rise >= max(smallest, LOST_SHARE * (base["loss"] - best["loss"])) and rise_low > 0:
        use = "use best/" if best["update"] else "no update was better than the base model"
        return f"Overfitted since update {best['update']} ({best['loss']:.4f}; {use}): {numbers}."
    if change <= -smallest and high < 0:
        return f"Learned: {numbers}."
    if abs(change) < smallest or low < 0 < high:
        return f"No measurable effect on held-out tracks: {numbers}."
    return f"Worse than without the adapter; try a lower --learning_rate: {numbers}."
