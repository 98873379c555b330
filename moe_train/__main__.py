"""``python -m moe_train`` is the command `moe-train`."""

from moe_train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
