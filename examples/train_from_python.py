"""Train a wire of the embedded toy pair from Python, and ask both receivers a question.

python examples/train_from_python.py --output runs/example-wire
python examples/train_from_python.py --output runs/example-wire --steps 20     # a try that learns nothing
"""

from __future__ import annotations

import sys
from pathlib import Path

from latentwire import LatentWire, train
from latentwire.cli import run_script

CONTEXT = "Ben owns a duck. Ben lives in Seoul. Quinn owns a cat. Quinn lives in Delhi."
QUESTION = "Where is the home of Ben?"


def main(*, output: Path, steps: int = 900, samples: int = 20_000) -> None:
    """Train, export, encode one context, and let each receiver answer from the message.

    Args:
        output: Directory for checkpoints and the export; must not exist yet.
        steps: Training steps.
    """
    overrides = {
        "training.max_steps": steps,
        "training.evaluate_every": max(1, steps // 3),
        "evaluation.tuned_text.steps": min(100, steps),
    }
    result = train("toy", output=output, overrides=overrides)
    wire = LatentWire.from_pretrained(str(result.export))
    message = wire.encode([CONTEXT])
    print(f"message: {message.packed_size()} bytes")
    for receiver in wire.receivers:
        (answer,) = wire.answer(message, QUESTION, receiver)
        print(f"{receiver}: {answer}")


if __name__ == "__main__":
    sys.exit(run_script(main, __doc__))
