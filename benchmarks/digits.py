"""The main job, three times: trains experiments/digits/<system>.py for three seeds and prints what each reached.

    python benchmarks/digits.py [--system transfusion] [--seeds 0 1 2] [--workdir runs/benchmark]

Wall time is that of the whole command, start of Python and final report included; beside it stands the time of a fixed
matrix product in the same run, because a laptop's seconds say little without it.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

BOUNDS = {
    "naming_accuracy": (0.95, ">="),
    "drawing_accuracy": (0.95, ">="),
    "drawing_variance_ratio": (0.5, ">="),
    "drawing_copies": (0.05, "<="),
}


def train(system: str, seed: int, workdir: Path) -> dict[str, float]:
    """Run the command that the README gives; return its report with the wall time of the whole command."""
    if workdir.exists():
        sys.exit(f"{workdir} is there already: remove it, or give another --workdir")
    command = [sys.executable, "-m", "jaxmm.cli", "train", "--config", f"experiments/digits/{system}.py"]
    begin = time.perf_counter()
    subprocess.run(
        [*command, "--workdir", str(workdir), f"--config.seed={seed}"], check=True, stdout=subprocess.DEVNULL
    )
    return json.loads((workdir / "report.json").read_text()) | {"command_seconds": time.perf_counter() - begin}


def main() -> None:
    """Print one row per seed, and which bounds hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--system", default="transfusion")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=Path, default=Path("runs/benchmark"))
    options = parser.parse_args()
    columns = [*BOUNDS, "judge_accuracy", "command_seconds", "matmul_seconds"]
    print("| seed | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    missed = []
    for seed in options.seeds:
        report = train(options.system, seed, options.workdir / f"{options.system}-{seed}")
        print(f"| {seed} | " + " | ".join(f"{report[column]:.4g}" for column in columns) + " |", flush=True)
        for name, (bound, sign) in BOUNDS.items():
            held = report[name] >= bound if sign == ">=" else report[name] <= bound
            missed += [] if held else [f"seed {seed}: {name} {report[name]:.4g}, wanted {sign} {bound}"]
    print("\n".join(missed) or "all bounds hold")


if __name__ == "__main__":
    main()
