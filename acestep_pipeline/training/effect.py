"""What training did, in plain words: no measurable effect, learned, overfitted since update N, or worse; why, and what
to do next. All of it is arithmetic on losses that were measured before, so that a verdict can be checked by hand."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from .comparison import Comparison, percent

NO_EFFECT = "no measurable effect"
LEARNED = "learned"
OVERFITTED = "overfitted"
WORSE = "worse than without the adapter"

# Below a thousandth of the base model's loss a change counts as none.
MIN_EFFECT = 1e-3
# Overfitted: so much of what was gained at the best update is lost at the end, ...
LOST_SHARE = 0.1
# ... and so many times the noise of the curve. Simulated: of curves of 20 validations that are level, or fall and then
# are level, but for independent noise, one in fifty and one in thirteen rise by more.
NOISE_FACTOR = 5.0
# Still falling: of all that was gained, so much was gained in the last quarter of the run.
STILL_GAINED_SHARE = 0.1

FINAL, BEST, BASE = "the final adapter", "best/", "the base model"
HOLD_OUT = "--validation_fraction 0.1 holds tracks out"
LEARN_MORE = "three to ten times the --learning_rate, or more updates (--num_train_epochs, --max_train_steps)"


@dataclass(frozen=True)
class Verdict:
    """What happened, and what follows from it.

    Attributes:
        verdict: `NO_EFFECT`, `LEARNED`, `OVERFITTED` or `WORSE`.
        since_update: the update of the lowest validation loss, if it overfitted.
        judged_on: `held-out tracks`, or `training tracks` where there are no others (that is memory).
        why: a sentence.
        use: which adapter: the final one, the one in best/, or none.
        next: a sentence on what to do.
    """

    verdict: str
    since_update: int | None
    judged_on: str
    why: str
    use: str
    next: str

    @property
    def headline(self) -> str:
        """The verdict in a few words."""
        since = "" if self.since_update is None else f" since update {self.since_update}"
        return f"{self.verdict}{since} ({self.judged_on})"


# ---------------------------------------------------------------------------------------------------------------------
# The validation curve


def fall_and_rise(losses: np.ndarray) -> np.ndarray:
    """The curve next to `losses` (`[n]`) by least squares that falls to a lowest point and rises from there."""

    def fit(turn: int) -> np.ndarray:
        parts = ((losses[:turn], False), (losses[turn:], True))
        return np.concatenate([isotonic_regression(part, increasing=up).x for part, up in parts if len(part)])

    return min(map(fit, range(1, len(losses) + 1)), key=lambda curve: float(((curve - losses) ** 2).sum()))


def noise_of_curve(losses: np.ndarray, fitted: np.ndarray) -> float:
    """Standard deviation of validations about `fall_and_rise`: how far the weights wander from one to the next.

    The fit is so free that it takes up about half of the noise's square, which is made up for.
    """
    return float(np.sqrt(2 * ((losses - fitted) ** 2).mean()))


@dataclass(frozen=True)
class Curve:
    """What the validations of a run show: the base model's loss, the lowest and where, and the last; the rise from the
    lowest to the last, smoothed, and the share of tracks in which there is one; the noise; whether the loss still
    falls."""

    base: float
    best_update: int
    best_loss: float
    last_update: int
    last_loss: float
    rise: float
    share_of_tracks: float
    noise: float
    still_falls: bool

    @property
    def turned(self) -> bool:
        """Whether the loss rose again by more than what is negligible and noise of the curve, in most of the tracks.

        An interval over tracks is not asked for: these tracks' draws are the same throughout, so that a rise is one,
        and of the two mistakes that of using best/ without need costs nothing.
        """
        least = max(MIN_EFFECT * self.base, LOST_SHARE * (self.base - self.best_loss), NOISE_FACTOR * self.noise)
        return self.rise >= least and self.share_of_tracks > 0.5


def read_curve(validations: list[dict]) -> Curve | None:
    """The curve in the lines of `validation.jsonl`; the first, at update 0, is the base model's. None for fewer than
    two finite ones."""
    lines = [line for line in validations if line["loss"] is not None and np.isfinite(line["loss"])]
    if len(lines) < 2:
        return None
    losses = np.array([line["loss"] for line in lines])
    fitted = fall_and_rise(losses)
    best, last = lines[int(losses.argmin())], lines[-1]
    rises = np.array([last["tracks"][track] - best["tracks"][track] for track in last["tracks"]])
    before = [index for index, line in enumerate(lines) if line["update"] <= 0.75 * last["update"]][-1]
    return Curve(
        base=float(losses[0]),
        best_update=best["update"],
        best_loss=best["loss"],
        last_update=last["update"],
        last_loss=last["loss"],
        rise=float(fitted[-1] - fitted.min()),
        share_of_tracks=float((rises > 0).mean()),
        noise=noise_of_curve(losses, fitted),
        still_falls=bool(fitted[before] - fitted[-1] > STILL_GAINED_SHARE * (losses[0] - losses.min()) > 0),
    )


# ---------------------------------------------------------------------------------------------------------------------
# The verdict


def judge(
    held_out: Comparison | None, trained_on: Comparison, validations: list[dict], *, update_size: float
) -> Verdict:
    """The verdict on a run.

    It is *overfitted* if the validation loss rose from its lowest by at least `MIN_EFFECT` of the base's, `LOST_SHARE`
    of the gain and `NOISE_FACTOR` times the curve's noise, in most of the tracks; *learned* if the adapter lowers the
    loss by at least `MIN_EFFECT` of the base's with a 95 % interval that excludes 0; *worse* if it raises it so, or
    that of the training tracks.

    Args:
        held_out, trained_on: the losses with and without the adapter.
        validations: the lines of `validation.jsonl`; may be empty.
        update_size: relative norm of the whole update.
    """
    judged, on = (trained_on, "training tracks") if held_out is None else (held_out, "held-out tracks")
    change, smallest = judged.change, MIN_EFFECT * judged.loss_without
    curve = read_curve(validations) if held_out is not None else None

    def verdict(which: str, why: str, *, use: str, advice: str, since: int | None = None) -> Verdict:
        return Verdict(which, since, on, why, use, advice)

    if not np.isfinite(judged.with_adapter).all():
        why = "the loss with the adapter is not a finite number"
        return verdict(WORSE, why, use=_best_or_base(curve), advice="A lower --learning_rate or --max_grad_norm.")
    got_worse = trained_on.change.mean >= MIN_EFFECT * trained_on.loss_without and trained_on.change.low > 0
    if got_worse:
        why = f"the loss rose, on training tracks as well: {describe_change(trained_on)}"
        advice = "Training diverged: a third of the --learning_rate or less."
        return verdict(WORSE, why, use=_best_or_base(curve), advice=advice)
    if curve is not None and curve.turned:
        return verdict(
            OVERFITTED,
            _why_overfitted(curve, trained_on),
            use=_best_or_base(curve),
            advice=_advice_if_overfitted(curve),
            since=curve.best_update,
        )
    if change.mean <= -smallest and change.high < 0:
        return verdict(
            LEARNED, _why_learned(judged, trained_on, held_out), use=FINAL, advice=_advice_if_learned(curve)
        )
    if change.mean >= smallest and change.low > 0:
        why = f"the loss on {on} rose: {describe_change(judged)}"
        return verdict(WORSE, why, use=_best_or_base(curve), advice="A lower --learning_rate, or more tracks.")
    why, advice = _no_effect(judged, trained_on, held_out, update_size)
    return verdict(NO_EFFECT, why, use=FINAL if change.mean <= -smallest else BASE, advice=advice)


def describe_change(comparison: Comparison) -> str:
    """The numbers of a comparison, for a person."""
    change, base = comparison.change, comparison.loss_without
    number, draws = comparison.without.shape
    text = f"loss {base:.4f} without the adapter, {comparison.loss_with:.4f} with it ({percent(change.mean / base)}"
    if np.isfinite(change.low):
        text += f", 95 % interval {percent(change.low / base)} to {percent(change.high / base)}"
    over = f"{number} tracks, {draws} draws each" if number > 1 else f"one track, {draws} draws"
    return f"{text}; {over})"


def _best_or_base(curve: Curve | None) -> str:
    return BEST if curve is not None and curve.best_update else BASE


def _why_overfitted(curve: Curve, trained_on: Comparison) -> str:
    lowest = "the base model's own" if curve.best_update == 0 else f"of update {curve.best_update}"
    text = (
        f"validation loss rose from its lowest, {curve.best_loss:.4f} ({lowest}), to {curve.last_loss:.4f} at update "
        f"{curve.last_update}; without the adapter it is {curve.base:.4f}"
    )
    tracks = percent(curve.share_of_tracks, signed=False)
    return (
        f"{text}. It rose in {tracks} of the tracks, and the curve's noise is {curve.noise:.4f}. "
        f"On training tracks: {describe_change(trained_on)}"
    )


def _advice_if_overfitted(curve: Curve) -> str:
    more = "more tracks, a lower --rank or --learning_rate, or --caption_dropout and --lora_dropout"
    if curve.best_update == 0:
        return f"No update beat the base model on held-out tracks: {more}."
    return (
        f"best/ is the adapter of update {curve.best_update}; next time fewer updates, or --early_stopping_patience 3."
        f" To get further: {more}."
    )


def _why_learned(judged: Comparison, trained_on: Comparison, held_out: Comparison | None) -> str:
    if held_out is None:
        return (
            f"the training tracks' {describe_change(judged)}. That is memory: whether it carries over to other music "
            "is not known without held-out tracks"
        )
    return f"held-out tracks' {describe_change(judged)}; on training tracks {describe_change(trained_on)}"


def _advice_if_learned(curve: Curve | None) -> str:
    if curve is None:
        return f"Listen to it. To learn whether it is more than memory, and when to stop: {HOLD_OUT}."
    if curve.still_falls:
        return "The validation loss was still falling: more updates would lower it further."
    if curve.best_update <= 0.75 * curve.last_update:
        return (
            f"The validation loss has not fallen since update {curve.best_update}, nor clearly "
            "risen: more updates won't help."
        )
    return "Listen to it."


def _no_effect(
    judged: Comparison, trained_on: Comparison, held_out: Comparison | None, update_size: float
) -> tuple[str, str]:
    """Why there is none, and what to do: nothing was learned, only memory, or too few tracks to tell."""
    size = f"the update is {percent(update_size, signed=False)} of the adapted weights' norm"
    change, base = judged.change, judged.loss_without
    on = "training tracks'" if held_out is None else "held-out tracks'"
    remembered = trained_on.change.mean <= -MIN_EFFECT * trained_on.loss_without and trained_on.change.high < 0
    large = abs(change.mean) >= MIN_EFFECT * base
    if held_out is not None and remembered and not (large and change.mean < 0):
        why = f"{on} {describe_change(judged)}, while on training tracks {describe_change(trained_on)}: it is memory"
        return why, "More tracks, or held-out tracks of the same style; check that the tags describe both alike."
    if large:
        why = f"{on} {describe_change(judged)}: they are too few, or differ too much, to tell that from chance"
        return why, f"Hold out or train on more tracks, so that it can be told; or {LEARN_MORE}."
    return f"{on} {describe_change(judged)}; {size}", f"Make it learn more: {LEARN_MORE}."
