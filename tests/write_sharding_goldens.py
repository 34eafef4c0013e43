"""Writes tests/goldens/shardings/: how the parameters of some models are cut on some meshes.

    python -m tests.write_sharding_goldens

A refactoring leaves these files as they are. What changes a sharding on purpose writes them anew, and the change shows
in the diff: {path: [mesh axis, list of them, or null; per dimension]}.
"""

import json
from pathlib import Path

from jaxmm.models.transfusion import PRESETS, SYSTEM
from jaxmm.sharding import abstract_mesh, parameter_shardings
from jaxmm.training.config import load_config, model_config

FOLDER = Path(__file__).parent / "goldens" / "shardings"
DIGITS = str(Path(__file__).parents[1] / "experiments" / "digits" / "transfusion.py")

# {file: (model's config, sizes of the mesh)}
CASES = {
    "transfusion-7b-fsdp64": (lambda: PRESETS["7b"], dict(fsdp=64)),
    "transfusion-7b-fsdp16-tensor4": (lambda: PRESETS["7b"], dict(fsdp=16, tensor=4)),
    "transfusion-0.16b-fsdp256": (lambda: PRESETS["0.16b"], dict(fsdp=256)),
    "transfusion-digits-fsdp8": (lambda: model_config(load_config(DIGITS)), dict(fsdp=8)),
    "transfusion-digits-fsdp4-tensor2": (lambda: model_config(load_config(DIGITS)), dict(fsdp=4, tensor=2)),
}


def shardings(case: str) -> dict[str, list]:
    """{path: the cut of each dimension} as a golden holds it."""
    config, sizes = CASES[case]
    specs = parameter_shardings(SYSTEM.blueprint(config()).parameters, abstract_mesh(**sizes))
    return {path: [list(cut) if isinstance(cut, tuple) else cut for cut in specs[path].spec] for path in sorted(specs)}


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in CASES:
        lines = [f"  {json.dumps(path)}: {json.dumps(cuts)}" for path, cuts in shardings(case).items()]
        (FOLDER / f"{case}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
