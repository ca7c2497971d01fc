"""Named sets of training arguments, one YAML file each in `presets/`, keyed by the flags of the training script."""

from importlib import resources

from .errors import UsageError


def preset_names() -> list[str]:
    """Every preset there is, sorted."""
    files = resources.files(__package__).joinpath("presets").iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def load_preset(name: str) -> dict:
    """Flag names without dashes -> values.

    Raises:
        UsageError: there is no such preset.
    """
    if name not in preset_names():
        raise UsageError(f"there is no preset {name!r}; choose one of {', '.join(preset_names())}.")
    import yaml  # which a command's help does without

    text = resources.files(__package__).joinpath("presets", f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
