"""Jobs: what the schema takes, and what it refuses in one sentence."""

import subprocess
import sys

import pytest

from acestep_pipeline.errors import UsageError
from acestep_pipeline.jobs.places import Places
from acestep_pipeline.jobs.schema import MAX_JOB_BYTES, parse_job
from acestep_pipeline.jobs.training_flags import FIELDS, MAXIMA, TEXTS, check_flags, may_set, training_flags
from acestep_pipeline.training.argument_checks import BOUNDS
from acestep_pipeline.training.arguments import build_parser, parse_args

TRAIN = {"task": "train", "data": "s3://bucket/music"}
GENERATE = {"task": "generate", "prompt": "slow blues"}


@pytest.fixture
def places(tmp_path) -> Places:
    for name in ("data", "model", "output"):
        (tmp_path / name).mkdir()
    return Places(tmp_path / "data", tmp_path / "model", tmp_path / "output", "s3://bucket", str(tmp_path / "output"))


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ([], "must be an object"),
        ({"task": "trian"}, "did you mean train"),
        ({"task": ["train"]}, "task must be one of"),
        ({"task": "train"}, "data is missing"),
        (TRAIN | {"dat": "s3://bucket/x"}, "did you mean data"),
        (TRAIN | {"arguments": {"rnak": 8}}, "did you mean rank"),
        (TRAIN | {"arguments": {"rank": 0}}, "--rank must be positive"),
        (TRAIN | {"arguments": {"rank": 10**6}}, "arguments.rank must be at most 512"),
        (TRAIN | {"arguments": {"rank": "8"}}, "must be a whole number"),
        (TRAIN | {"arguments": {"rank": True}}, "must be a whole number"),
        (TRAIN | {"arguments": {"learning_rate": float("nan")}}, "must be a number"),
        (TRAIN | {"arguments": {"use_dora": "yes"}}, "must be true or false"),
        (TRAIN | {"arguments": {"preset": "cc"}}, "must be one of c, loo"),
        (TRAIN | {"arguments": {"output_dir": "/etc"}}, "field 'name'"),
        (TRAIN | {"arguments": {"train_data_dir": "/etc"}}, "field 'data'"),
        (TRAIN | {"arguments": {"cache_dir": "/etc"}}, "can't be set by a job"),
        (TRAIN | {"arguments": {"logging_dir": "/etc"}}, "can't be set by a job"),
        (TRAIN | {"arguments": {"report_to": "wandb"}}, "can't be set by a job"),
        (TRAIN | {"arguments": {"validation_data_dir": "/etc"}}, "can't be set by a job"),
        (TRAIN | {"arguments": {"max_duration_s": 700.0}}, "--max_duration_s must"),
        (TRAIN | {"arguments": {"validation_steps": 5, "validation_epochs": 1}}, "give one of them"),
        (TRAIN | {"data": "file:///etc/passwd"}, "can't be read by a job"),
        (TRAIN | {"data": "FILE:/etc/passwd"}, "can't be read by a job"),
        (TRAIN | {"data": "http://169.254.169.254/latest/meta-data"}, "can't be read by a job"),
        (TRAIN | {"data": "http://[::1]:8000/x"}, "can't be read by a job"),
        (TRAIN | {"data": "https://10.0.0.1/x"}, "can't be read by a job"),
        (TRAIN | {"data": "//host/share"}, "can't be read by a job"),
        (TRAIN | {"data": "/etc"}, "lies outside"),
        (TRAIN | {"data": "../output"}, "lies outside"),
        (TRAIN | {"data": "x\0y"}, "must be one line"),
        (TRAIN | {"data": "missing"}, "is not there"),
        (TRAIN | {"data": "s3://other/music"}, "must lie below s3://bucket"),
        (TRAIN | {"data": "s3://bucket2/music"}, "must lie below s3://bucket"),
        (TRAIN | {"data": "s3://bucket/../other/x"}, "leads elsewhere"),
        (TRAIN | {"data": "s3://key:secret@bucket/music"}, "is not an address"),
        (TRAIN | {"data": "hf://owner/name"}, "hf://datasets/owner/name"),
        (TRAIN | {"data": "hf://datasets/../../etc"}, "is no repository"),
        (TRAIN | {"model": "/etc"}, "lies outside"),
        (TRAIN | {"model": "../data"}, "lies outside"),
        (TRAIN | {"model": "s3://other/model"}, "must lie below"),
        (TRAIN | {"variant_dir": "../x"}, "must begin with a letter"),
        (TRAIN | {"name": ".."}, "must begin with a letter"),
        (TRAIN | {"name": "a/b"}, "may have letters"),
        (TRAIN | {"upload": "/output"}, "upload must be an address"),
        (TRAIN | {"upload": "s3://other/x"}, "must lie below"),
        (TRAIN | {"links_valid_s": 10**9}, "links_valid_s should be less"),
        (TRAIN | {"time_limit_s": 1}, "time_limit_s should be greater"),
        (GENERATE | {"duration_s": 601}, "duration_s should be less"),
        (GENERATE | {"duration_s": float("inf")}, "duration_s should be"),
        (GENERATE | {"variations": 1000}, "variations should be less"),
        (GENERATE | {"variations": "2"}, "should be a valid integer"),
        (GENERATE | {"num_inference_steps": 10**6}, "num_inference_steps should be less"),
        (GENERATE | {"prompt": "x" * 3000}, "at most 2000"),
        (GENERATE | {"adapters": {"../secret": 1.0}}, "must begin with a letter"),
        (GENERATE | {"adapters": {"a": 9.0}}, "less than or equal to 2"),
        (GENERATE | {"adaptres": {}}, "did you mean adapters"),
        (GENERATE | {"src_audio": "/etc/passwd"}, "is no field of this job"),
        (GENERATE | {"lyrics": "x" * MAX_JOB_BYTES}, "a job may have 256 KiB"),
        ({"task": "validate_dataset", "data": "hf://a/b"}, "write hf://datasets/owner/name"),
        ({"task": "convert_adapter", "adapter": "/etc/passwd", "to": "peft"}, "lies outside"),
        ({"task": "convert_adapter", "adapter": "s3://bucket/lora/x", "to": "gguf"}, "should be 'diffusers'"),
    ],
)
def test_what_a_job_may_not_ask_for(job, said, places):
    with pytest.raises(UsageError) as refused:
        parse_job(job, places)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600


def test_what_is_refused_is_not_repeated_with_its_secrets(places):
    with pytest.raises(UsageError) as refused:
        parse_job(TRAIN | {"data": "https://user:hunter2@example.com/x?signature=abc"}, places)
    assert "hunter2" not in str(refused.value) and "abc" not in str(refused.value)


def test_a_link_that_leads_out_of_the_data_is_followed_and_refused(places, tmp_path):
    (places.data / "music").mkdir()
    (places.data / "elsewhere").symlink_to(tmp_path)
    assert parse_job(TRAIN | {"data": "music"}, places).data == "music"
    assert parse_job(TRAIN | {"data": str(places.data / "music")}, places).data == str(places.data / "music")
    with pytest.raises(UsageError, match="lies outside"):
        parse_job(TRAIN | {"data": "elsewhere/output"}, places)


@pytest.mark.parametrize(
    "model", ["tiny", "ACE-Step/Ace-Step1.5", "hf://ACE-Step/Ace-Step1.5", "s3://bucket/models/x"]
)
def test_models_that_a_job_may_name(model, places):
    assert parse_job(TRAIN | {"model": model, "upload": "s3://bucket/lora/x"}, places).model == model


def test_arguments_become_the_flags_that_the_script_reads():
    arguments = {
        "preset": "c",
        "rank": 8,
        "learning_rate": 1e-3,
        "use_dora": True,
        "allow_tf32": False,
        "validation_prompt": "--output_dir=/etc",
        "trigger_word": "zxqmood",
        "style_distance": 8,
        "timestep_mu": -0.5,
    }
    args = vars(check_flags(training_flags(arguments)))
    assert {name: args[name] for name in arguments} == arguments
    assert args["output_dir"] is None, "a text that looks like a flag stays a text"
    assert args["lora_alpha"] == 192, "what the job leaves out is the preset's"


def test_every_flag_of_the_script_is_set_by_a_job_or_refused_and_every_number_is_bounded():
    """A flag that is added to the script with free text is refused until somebody has thought about it."""
    flags = {action.dest: action for action in build_parser()._actions if action.option_strings}
    settable = {name for name, action in flags.items() if may_set(action)}
    assert TEXTS <= settable and MAXIMA.keys() <= flags.keys()
    assert FIELDS.keys() - {"push_to_s3"} <= flags.keys() and not FIELDS.keys() & settable
    free_text = {name for name in settable if not flags[name].choices and flags[name].nargs != 0
                 and flags[name].type not in (int, float)}  # fmt: skip
    assert free_text == TEXTS
    for name in settable:
        if flags[name].type is int:
            with pytest.raises(UsageError, match=f"arguments.{name} must be at most"):
                training_flags({name: 2**64})
    no_number = {name for name in settable if flags[name].type not in (int, float)}
    assert not no_number & {name for _, _, names in BOUNDS for name in names}
    assert vars(parse_args([])).keys() >= settable


def test_checking_a_job_imports_no_torch_and_no_vendor():
    code = (
        "import sys; from acestep_pipeline.jobs import places, schema, worker;"
        "schema.parse_job({'task': 'train', 'data': 's3://bucket/x'}, places.Places());"
        "print(sorted({'torch', 'diffusers', 'runpod', 'modal', 'boto3'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr
