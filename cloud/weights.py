"""The weight files of a target, as far as they can be judged without loading them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from edgecloud.errors import ModelError


def check_safetensors(folder: Path) -> None:
    """Open the header of every weight file. Raises ModelError that names the first broken one."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder} holds no *.safetensors file; save the model with save_pretrained")
    for path in files:
        try:
            with safe_open(path, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is truncated or damaged ({error}); fetch or copy it again") from error
