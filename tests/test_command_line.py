"""What every command does about flags in another spelling, and about a reader that has gone."""

import os
import shlex
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch

from acestep_pipeline import cli
from acestep_pipeline.errors import one_sentence_errors
from acestep_pipeline.training import arguments
from acestep_pipeline.training.optimization import build_lr_scheduler


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["generate", "--prompt", "x", "--lyric", "f"], "unrecognized arguments: --lyric f; did you mean --lyrics?"),
        (["doctor", "--ofline"], "did you mean --offline?"),
        (["adapters", "info", "x", "--pictures=a.png"], "did you mean --picture?"),
        (["doctor", "--zzz"], "unrecognized arguments: --zzz\n"),
    ],
)
def test_a_misspelt_flag_is_told_its_name(capsys, argv, said):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_flags_are_read_with_either_dash():
    parser = cli.build_parser()
    built = parser.parse_args(["dataset", "build", "--data_dir", "a", "--output_dir=b", "--min-duration-s", "3"])
    assert (built.data_dir, str(built.output_dir), built.min_duration_s) == (["a"], "b", 3.0)
    trained = arguments.parse_args(["--train-data-dir", "a", "--lr-warmup-steps=3", "--no-use-dora", "--preset=smoke"])
    assert (trained.train_data_dir, trained.lr_warmup_steps, trained.use_dora) == ("a", 3, False)


def test_a_reader_that_has_gone_ends_the_command_without_a_word():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "acestep_pipeline.cli", "storage", "cost", "--template"]
    with os.fdopen(writing, "w") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_warnings_are_lines():
    doubt = (UserWarning("this is doubtful"), UserWarning, "write.py", 38)
    with one_sentence_errors():
        assert warnings.formatwarning(*doubt) == "warning: this is doubtful\n"
    assert "write.py:38" in warnings.formatwarning(*doubt)


def test_cache_refuses_what_training_would_and_names_the_training(tmp_path, capsys):
    (tmp_path / "my music").mkdir()
    noise = np.random.default_rng(0).normal(0, 0.05, (96_000, 2))
    soundfile.write(tmp_path / "my music" / "a.wav", noise, 48_000)
    shared = ["--pretrained_model_name_or_path", "tiny", "--train_data_dir", str(tmp_path / "my music")]
    for wrong in ("-3", "nan"):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["cache", *shared, f"--max_duration_s={wrong}"])
        assert stopped.value.code == 2 and "--max_duration_s must be" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        cli.main(["cache", *shared, "--min_duration_s", "1"])
    *_, last = capsys.readouterr().out.splitlines()
    assert done.value.code == 0
    command = ["accelerate", "launch", "train_ace_step_lora.py", "--preset", "c", *shared, "--min_duration_s", "1.0"]
    assert shlex.split(last.removeprefix("Next: ")) == command


def test_a_warm_up_as_long_as_the_run_is_told():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = {"optimizer": optimizer, "lr_scheduler": "constant_with_warmup", "num_updates": 100}
    build_lr_scheduler(**schedule, lr_warmup_steps=99)
    with pytest.warns(UserWarning, match="--lr_warmup_steps 100 is no less than the run's 100 updates"):
        build_lr_scheduler(**schedule, lr_warmup_steps=100)
