"""What the model can't be told is one sentence, from Python as from the command, and changes nothing."""

import dataclasses
import math

import pytest
import torch

from acestep_pipeline import ACEStepPipeline
from acestep_pipeline.errors import UsageError
from acestep_pipeline.prompt_fields import PromptFields, checked_request
from acestep_pipeline.training.validation import choose_prompts
from tests.test_adapters import velocity


@pytest.fixture(scope="module")
def pipeline(tiny_dir):
    pipeline = ACEStepPipeline.from_pretrained(tiny_dir)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"task_type": "cover"}, "task_type='cover' needs src_audio"),
        ({"src_audio": "a.wav"}, "not the path 'a.wav'; read the file first"),
        ({"audio_duration": 0}, "audio_duration must be above 0 and at most 600 seconds, not 0"),
        ({"audio_duration": -1.0}, "not -1.0"),
        ({"audio_duration": 3000}, "not 3000"),
        ({"audio_duration": math.nan}, "not nan"),
        ({"audio_duration": "30"}, "not '30'"),
        ({"keyscale": "H dur"}, "keyscale 'H dur' is no key; write it like"),
        ({"vocal_language": "klingon"}, "'klingon' is none that the model knows: ar, "),
        ({"prompt": ["a", "b"], "vocal_language": ["en", "elvish"]}, "'elvish' is none"),
        ({"bpm": 3}, "bpm must be 30 to 300"),
        ({"timesignature": "17"}, "timesignature must be one of 2, 3, 4, 6"),
        ({"task_type": "remix"}, "`task_type` must be one of"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be >= 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_requests_are_one_sentence_and_the_pipeline_goes_on(pipeline, given, said):
    before = velocity(pipeline)
    with pytest.raises(UsageError) as caught:
        pipeline(**{"prompt": "lo-fi", "audio_duration": 1, "num_inference_steps": 1} | given)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert torch.equal(velocity(pipeline), before)


def test_other_spellings_are_those_that_the_model_was_trained_with(pipeline):
    def generate(*args, **given):
        options = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent"}
        return pipeline(*args, **options, **given, generator=torch.Generator().manual_seed(0)).audios

    spelt = {"vocal_language": "German", "keyscale": "Am", "bpm": "96 BPM", "timesignature": "4/4"}
    usual = {"vocal_language": "de", "keyscale": "A minor", "bpm": 96, "timesignature": "4"}
    # The first arguments by their places, as diffusers allows.
    assert torch.equal(generate("lo-fi", "[verse]", 1, **spelt), generate("lo-fi", "[verse]", 1, **usual))
    with pytest.raises(TypeError, match="multiple values"):
        generate("lo-fi", prompt="other")


@pytest.mark.parametrize("given", [{}, {"audio_duration": None}, {"keyscale": ""}, {"bpm": None}])
def test_what_is_not_given_is_not_checked(given):
    assert checked_request({"prompt": "x"} | given) == {"prompt": "x"} | given


@pytest.mark.parametrize("duration", [None, -1, 0, 600])
def test_source_audio_has_a_length_of_its_own(duration):
    request = {"src_audio": torch.zeros(2, 48_000), "audio_duration": duration}
    assert checked_request(request) == request
    with pytest.raises(UsageError, match="audio_duration"):
        checked_request(request | {"audio_duration": 601})


def test_a_sample_of_a_track_in_another_language_can_be_made():
    track = PromptFields("chant", lyrics="[verse]", vocal_language="tlh")
    (heard,) = choose_prompts([track], prompt=None, num_samples=1, duration_s=10.0)
    assert heard == dataclasses.replace(track, audio_duration=10.0, vocal_language="unknown")
    checked_request(dataclasses.asdict(heard))
