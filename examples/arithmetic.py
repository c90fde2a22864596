"""Vectors are values: load, compare, add, save.

python examples/arithmetic.py
"""

import mien

NAMES = ("joy", "sadness", "anger", "fear", "calm")


def main() -> None:
    vectors = {name: mien.load(name) for name in NAMES}
    print(f"{'cosine':8}" + "".join(f"{name:>9}" for name in NAMES))
    for a in NAMES:
        print(f"{a:8}" + "".join(f"{vectors[a].cosine(vectors[b]):9.2f}" for b in NAMES))
    bittersweet = 0.5 * vectors["joy"] + 0.5 * vectors["sadness"]
    print(f"\n{bittersweet}, norm {bittersweet.norm():.1f}")


if __name__ == "__main__":
    main()
