"""Score a checkpoint or export: ``latentwire evaluate`` with the same flags.

python latentwire/evaluate.py --checkpoint runs/test/best
python latentwire/evaluate.py --checkpoint runs/squad/best --tokens_per_latent 4 8 16 --bits 8 4
python latentwire/evaluate.py --predictions answers.json --dataset squad --data_dir <directory with SQuAD>
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # This folder would come first, and its evaluate.py hide Hugging Face's package.
    sys.path[0] = str(Path(__file__).parents[1])
    from latentwire.cli import as_written, main

    sys.exit(main(["evaluate", *as_written(sys.argv[1:])]))
