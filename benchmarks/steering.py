"""What steering costs on the default model, beside llama.cpp's own control vector.

python benchmarks/steering.py [--rounds N]     same as `mien bench --out benchmarks/results/steering.json`
"""

import sys
from pathlib import Path

from mien.cli import cli

if __name__ == "__main__":
    results = Path(__file__).parent / "results" / "steering.json"
    cli(["bench", "--out", str(results), *sys.argv[1:]])
