"""The vendors' names of GPUs, and where they are written down."""

import pytest

from acestep_pipeline.errors import UsageError
from acestep_pipeline.jobs.gpu_names import VENDORS, check_gpu


@pytest.mark.parametrize("vendor", VENDORS)
def test_names_are_taken_as_the_vendor_spells_them(vendor):
    for name, most in VENDORS[vendor].items():
        assert check_gpu(vendor, name) == name
        assert check_gpu(vendor, f"{name}:{most}") == f"{name}:{most}"
        with pytest.raises(UsageError, match="in a machine"):
            check_gpu(vendor, f"{name}:{most + 1}")


@pytest.mark.parametrize(
    ("vendor", "name", "said"),
    [
        ("modal", "H1OO", "did you mean H100?"),
        ("modal", "h100", "did you mean H100?"),
        ("modal", "A100-8OGB", "did you mean A100-80GB?"),
        ("modal", "RTX4090", "has no GPU"),
        ("lambda", "H1OO", "did you mean H100?"),
        ("runpod", "RTX-4090", "did you mean RTX4090?"),
        ("runpod", "RTX409O", "did you mean RTX4090?"),
        ("modal", "H100:", "has 1 to 8"),
        ("modal", "H100:0", "has 1 to 8"),
        ("modal", "H100:x", "has 1 to 8"),
        ("modal", "", "has no GPU"),
    ],
)
def test_others_are_refused_with_what_was_meant(vendor, name, said):
    with pytest.raises(UsageError) as refused:
        check_gpu(vendor, name)
    assert said in str(refused.value)
