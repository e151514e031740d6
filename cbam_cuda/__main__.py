"""``python -m cbam_cuda``: prints `cbam_cuda.info()`."""

from __future__ import annotations

from .info import info


def main() -> None:
    """Print what this installation can do."""
    facts = info()
    print(f"cbam_cuda {facts['version']}, torch {facts['torch']}")
    print("backends")
    for name, state in facts["backends"].items():
        print(f"  {name:10} {state}")
    print("build")
    if facts["build"] is None:
        print("  the compiled module did not load")
        return
    for key, value in facts["build"].items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"  {key:20} {shown if shown not in ('', None) else '-'}")


if __name__ == "__main__":
    main()
