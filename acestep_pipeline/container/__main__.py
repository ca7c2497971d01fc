"""What the image's entrypoint runs: `python -m acestep_pipeline.container [ARGUMENT ...]`."""

import os
import sys

from ..errors import one_sentence_errors
from .variables import describe_table

HELP = """Fine-tune ACE-Step 1.5 with LoRA, use an adapter, build a dataset, serve jobs: MODE says which.

  MODE=train     train on /data with the model in /model; results go to /output; a restart with the same settings
                 resumes. Arguments are those of train_ace_step_lora.py.
  MODE=smoke     five updates on the mounted model and data, or on embedded ones: does everything work here?
  MODE=generate  music. Arguments are those of acestep-lora generate; files are relative to /output.
  MODE=dataset   pack /data into /output/dataset. Arguments are those of acestep-lora dataset build.
  MODE=runpod    RunPod's serverless worker. Arguments are those of RunPod's own package (--rp_serve_api, …).
  MODE=lambda    AWS Lambda's function: datasets and adapters. Writes below /tmp alone.
  MODE=shell     a shell

Exit status: 0 done, 1 the work failed, 2 wrong usage or input, 130 or 143 stopped by SIGINT or SIGTERM after a
checkpoint (once training has begun), 137 killed, with what the last checkpoint has.

Environment variables, and the training argument that each sets:
"""


def main(arguments: list[str]) -> None:
    """Become what MODE and the other variables say."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP + describe_table())
        return
    from .command import choose_command, run

    run(choose_command(os.environ, arguments))


if __name__ == "__main__":
    with one_sentence_errors(debug="--debug" in sys.argv):
        main(sys.argv[1:])
