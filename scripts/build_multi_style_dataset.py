#!/usr/bin/env python
"""Turn folders of music into a Hugging Face dataset to train on: `acestep-lora dataset build` under another name."""

import sys

from acestep_pipeline.cli import main

if __name__ == "__main__":
    main(["dataset", "build", *sys.argv[1:]])
