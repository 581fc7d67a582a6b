"""``python -m nce_ext`` prints what this installation can do; paste it into a bug report."""

from __future__ import annotations

import nce_ext


def main() -> None:
    for name, value in nce_ext.build_info().items():
        if isinstance(value, dict):
            for what, why in value.items():
                print(f"{name:9} {what}: {why}")
        elif isinstance(value, list):
            print(f"{name:9} {', '.join(map(str, value))}")
        else:
            print(f"{name:9} {value}")


if __name__ == "__main__":
    main()
