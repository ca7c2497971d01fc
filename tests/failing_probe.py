"""The flagship script, in which process 1 fails: while it caches, or in the middle of an update."""

import os
import sys

import train_ace_step_lora
from acestep_pipeline import flow_matching
from acestep_pipeline.data import latent_cache
from acestep_pipeline.errors import RunError, UsageError, one_sentence_errors

where = os.environ["FAIL_WHERE"]
interpolate, calls = flow_matching.interpolate, []


def fail_in_the_loop(*args):
    """A defect of ours, at the third micro-batch."""
    calls.append(1)
    if len(calls) == 3:
        raise ZeroDivisionError("of process 1")
    return interpolate(*args)


def fail_while_caching(vae, audio, decoded):
    """Something that only this process finds."""
    raise (UsageError if where == "usage" else RunError)("process 1 can't go on.")


if __name__ == "__main__":
    if os.environ.get("RANK") == "1":
        if where == "loop":
            flow_matching.interpolate = fail_in_the_loop
        else:
            latent_cache.encode_latents = fail_while_caching
    with one_sentence_errors():
        train_ace_step_lora.train(train_ace_step_lora.arguments.parse_args(sys.argv[1:]))
