"""Convert a released FlashSloth checkpoint into a `from_pretrained` folder, or back.

    python jobs/convert.py --reference RELEASED_DIR --out OUR_DIR      released naming -> ours
    python jobs/convert.py --checkpoint OUR_DIR --out RELEASED_DIR     ours -> released naming

Weights are renamed, never recomputed: there and back gives the same bits. A key that is missing or unknown is listed
and the conversion refused; `--out` appears only when it is complete. The core install is enough to run this.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run the conversion that the flags ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--reference", type=Path, help="folder of a released checkpoint: config.json and safetensors")
    source.add_argument("--checkpoint", type=Path, help="folder of one of our checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; it must be new or empty")
    given = parser.parse_args(argv)
    # The model's libraries take seconds to import; --help and a misspelt flag are answered before.
    from flashsloth.conversion import ConversionError, from_released, to_released

    try:
        if given.reference is not None:
            for name in from_released(given.reference, given.out):
                print(f"dropped {name}: no forward of the released model reads it")
        else:
            to_released(given.checkpoint, given.out)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
