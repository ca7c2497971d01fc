"""What `training_speed.py` trains: models, windows and conditions; and what the ways of training differ in."""

from dataclasses import dataclass

from acestep_pipeline.presets import load_preset

FRAMES_PER_SECOND = 25
NUM_TRACKS = 16
# Text padded to 256 tokens, lyrics to 512, one or two of timbre.
PADDED_TOKENS = 770
PRESET = load_preset("c")


@dataclass(frozen=True)
class Case:
    """What is trained: a model, on so many windows of one length an update, of tracks whose condition tokens are
    spread evenly, in their logarithm, from the least to the most; and the share of checkpointed blocks."""

    size: str = "2b"
    seconds: int = 60
    least_tokens: int = 30
    most_tokens: int = 400
    checkpointing: float = 0.0
    windows: int = PRESET["effective_batch_size"]

    def tokens(self) -> list[int]:
        """Condition tokens of each track."""
        ratio = self.most_tokens / self.least_tokens
        return [round(self.least_tokens * ratio ** (index / (NUM_TRACKS - 1))) for index in range(NUM_TRACKS)]


@dataclass(frozen=True)
class Tricks:
    """What the script's loop does, each of which a way may leave out: all windows of an update in one pass; conditions
    no longer than the batch's longest; one call of AdamW for all parameters (foreach, on CUDA fused); no waiting for
    the device within an update; batches read ahead; and with `compiled`, blocks as compiled code."""

    one_pass: bool = True
    trimmed: bool = True
    joint_optimizer: bool = True
    no_waiting: bool = True
    read_ahead: bool = True
    compiled: bool = False


# What a way leaves out of ours, or adds to it; and the share of blocks that it checkpoints, if not the case's.
TRICKS = {
    "one_by_one": Tricks(one_pass=False),
    "padded": Tricks(trimmed=False),
    "plain_optimizer": Tricks(joint_optimizer=False),
    "waiting": Tricks(no_waiting=False),
    "not_read_ahead": Tricks(read_ahead=False),
    "compiled": Tricks(compiled=True),
}
RATIOS = {"checkpointed": 1.0, "half_checkpointed": 0.5}
