"""MODE=smoke: five optimizer updates, in two runs of which the second resumes, then a second of music; what passed.

`python -m acestep_pipeline.container.smoke NUM_PROCESSES OUTPUT DATA [training argument ...]`
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import RunError, one_sentence_errors
from ..paths import LORA_WEIGHTS_NAME, cache_dir, holds_something
from .command import launcher

UPDATES, RESUMED_AFTER = 5, 3
GENERATED_S = 1.0
PROMPT = "piano, calm"


class SmokeTest:
    """The test's steps, in order; each returns a line on what it saw, and raises `RunError` or `UsageError`."""

    def __init__(self, num_processes: int, output: Path, data: Path, flags: list[str]) -> None:
        """Take the number of GPUs (0: the CPU), the volume to write in, the data (embedded clips if there is none),
        and further arguments of the training script."""
        self.num_processes, self.data, self.flags = num_processes, data, flags
        self.run_dir = output / "smoke"
        named = os.environ.get("ACESTEP_MODEL") or ("/model" if holds_something(Path("/model")) else "tiny")
        self.model = ["--pretrained_model_name_or_path", named]
        if "--variant_dir" in flags:
            self.model += ["--variant_dir", flags[flags.index("--variant_dir") + 1]]
        self.model_name = named

    def device(self) -> str:
        """A product on the device, so that the driver is used."""
        import torch

        from ..hardware import default_device, describe_device

        device = torch.device("cpu") if self.num_processes == 0 else default_device()
        if not torch.ones(64, 64, device=device).matmul(torch.ones(64, 64, device=device)).eq(64).all():
            raise RunError(f"{describe_device(device)} computes a wrong matrix product; look at its driver.")
        asked = "; NUM_GPUS=0 asks for no GPU" if self.num_processes == 0 else f"; {self.num_processes} in use"
        return describe_device(device) + asked

    def audio(self) -> str:
        """Decode a track as training does, write it, and read what was written."""
        from ..data.audio import SAMPLE_RATE, read_audio, write_audio
        from ..data.demo_music import render_demo_dataset
        from ..data.tracks import load_tracks

        if "://" not in str(self.data) and not holds_something(self.data):
            self.data = cache_dir() / "demo-music"
            render_demo_dataset(self.data)
        tracks, problems = load_tracks(str(self.data), min_duration_s=1.0, show_progress=False)
        waveform = read_audio(tracks[0].source)
        # Of compressed formats, too: what a codec is missing for shows here, and not after hours of training.
        for suffix in (".wav", ".flac", ".ogg"):
            file = self.run_dir.with_name(f".smoke-audio{suffix}")
            try:
                write_audio(file, waveform[:, :SAMPLE_RATE], sample_rate=SAMPLE_RATE)
                length = read_audio(file).shape[1]
            finally:
                file.unlink(missing_ok=True)
            if length != min(SAMPLE_RATE, waveform.shape[1]):
                raise RunError(f"a second of audio written as {suffix} came back as {length / SAMPLE_RATE:.2f} s.")
        skipped = sum(problem.skipped for problem in problems)
        return f"{len(tracks)} tracks in {self.data}, {skipped} unusable; decoded {tracks[0].id}, wrote wav, flac, ogg"

    def loop(self) -> str:
        """The first updates."""
        from ..training.run_directory import METRICS_NAME
        from ..training.tracking import read_metrics

        self._train(RESUMED_AFTER, "--overwrite_output_dir")
        losses = [line["loss"] for line in read_metrics(self.run_dir / METRICS_NAME)]
        if len(losses) != RESUMED_AFTER or None in losses:
            raise RunError(f"{self.run_dir / METRICS_NAME} has the losses {losses}, not {RESUMED_AFTER} finite ones.")
        return f"{RESUMED_AFTER} updates of {self.model_name}, losses {', '.join(f'{loss:.4f}' for loss in losses)}"

    def checkpoint(self) -> str:
        """Go on from what the first updates left."""
        from ..training.run_directory import METRICS_NAME, find_checkpoint
        from ..training.tracking import read_metrics

        begun = find_checkpoint(self.run_dir, "latest")
        self._train(UPDATES, "--resume_from_checkpoint", "latest")
        updates = [line["update"] for line in read_metrics(self.run_dir / METRICS_NAME)]
        if begun is None or updates != list(range(1, UPDATES + 1)):
            raise RunError(f"resuming from {begun} made updates {updates}, not 1 to {UPDATES}.")
        return f"{begun.name} is whole, and updates {RESUMED_AFTER + 1} to {UPDATES} went on from it"

    def adapter(self) -> str:
        """Load the adapter into the pipeline, generate, and read the file."""
        from ..data.audio import SAMPLE_RATE, read_audio

        file = self.run_dir / "smoke.wav"
        command = [sys.executable, "-m", "acestep_pipeline.cli", "generate", *self.model]
        command += ["--adapter", str(self.run_dir), "--prompt", PROMPT, "--duration", f"{GENERATED_S:g}"]
        self._run([*command, "--num_inference_steps", "4", "--output", str(file)])
        waveform = read_audio(file)
        if waveform.shape[1] != round(GENERATED_S * SAMPLE_RATE) or not waveform.any():
            raise RunError(f"{file} has {waveform.shape[1] / SAMPLE_RATE:.2f} s of sound, or silence.")
        return f"{self.run_dir / LORA_WEIGHTS_NAME} loads; {GENERATED_S:g} s with it is in {file}"

    def _train(self, updates: int, *flags: str) -> None:
        command = [*launcher(self.num_processes), "--preset", "smoke", "--exp_name", "smoke", *self.model]
        command += ["--train_data_dir", str(self.data), "--output_dir", str(self.run_dir)]
        command += ["--num_validation_samples", "0", "--max_train_steps", str(updates)]
        self._run([*command, *self.flags, *flags])

    def _run(self, command: list[str]) -> None:
        status = subprocess.run(command).returncode
        if status:
            raise RunError(f"the command above ended with status {status}; its last line says why.")


def main(arguments: list[str]) -> None:
    """Run all steps; a line on stdout for each that passed.

    Raises:
        RunError: a step failed; names it.
    """
    num_processes, output, data, *flags = arguments
    test = SmokeTest(int(num_processes), Path(output), Path(data) if "://" not in data else data, flags)
    shutil.rmtree(test.run_dir, ignore_errors=True)
    passed = []
    for name in ("device", "audio", "loop", "checkpoint", "adapter"):
        try:
            line = f"passed  {name + ':':<12}{getattr(test, name)()}"
        except RunError as error:
            raise RunError("\n".join([f"smoke test, {name}: {error}", *(f"  {line}" for line in passed)])) from error
        passed.append(line)
        print(line, flush=True)
    print("\n".join(["", "Smoke test passed:", *passed]), flush=True)


if __name__ == "__main__":
    with one_sentence_errors(debug="--debug" in sys.argv):
        main(sys.argv[1:])
