"""The weights of a checkpoint's transformer, one at a time, by diffusers' names, of either layout."""

import json
from pathlib import Path

import torch
from diffusers import AceStepTransformer1DModel
from safetensors import SafetensorError, safe_open

from ...checkpoint_conversion import OriginalCheckpoint, component_configs, convert_key
from ...errors import UsageError


class BaseWeights:
    """Names, shapes and dtypes of a transformer's parameters, and each of them on demand, from mapped files."""

    def __init__(self, checkpoint: Path | OriginalCheckpoint):
        """Take what `checkpoint_source.resolve_checkpoint` found.

        Raises:
            UsageError: a file is missing or damaged.
        """
        original = isinstance(checkpoint, OriginalCheckpoint)
        self.folder = checkpoint.dit if original else Path(checkpoint) / "transformer"
        self._places: dict[str, tuple[Path, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        original_shapes: dict[str, tuple[int, ...]] = {}
        try:
            for path in _weight_files(self.folder):
                with safe_open(path, "np") as file:
                    for key in file.keys():
                        shape = tuple(file.get_slice(key).get_shape())
                        original_shapes[key] = shape
                        component, name = convert_key(key) if original else ("transformer", key)
                        if component == "transformer":
                            self._places[name] = path, key
                            self.shapes[name] = shape
            config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, SafetensorError) as error:
            what = " ".join(str(error).split())[:200]
            raise UsageError(f"the transformer in {self.folder} can't be read ({what}); download it again.") from error
        if original:
            config = component_configs(config, original_shapes)["transformer"]
        with torch.device("meta"):
            self.model = AceStepTransformer1DModel.from_config(config)
        if missing := sorted(self.model.state_dict().keys() - self._places.keys()):
            raise UsageError(f"the transformer in {self.folder} lacks {missing[0]}; download it again, complete.")

    def get(self, name: str) -> torch.Tensor:
        """One parameter, in the file's dtype."""
        path, key = self._places[name]
        with safe_open(path, "pt") as file:
            return file.get_tensor(key)

    def layer(self, name: str) -> torch.Tensor:
        """The weight of a layer, `[out, in]`."""
        return self.get(f"{name}.weight")


def _weight_files(folder: Path) -> list[Path]:
    """The shards that an index names, or the only file."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        weight_map = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"it has {len(files)} .safetensors files and no index")
    return files
